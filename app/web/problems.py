"""One rendering for everything that goes wrong: ``application/problem+json``."""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from app.errors import BodyTooLarge, InvalidRequest, MalformedBody, ProctorError
from app.web.headers import SAFE

MAX_WRONG = 20
"""Wrong fields that are named, of however many. Ours: more do not help."""

MAX_FIELD, MAX_DETAIL = 200, 2000
"""Characters of a field's name, and of a detail: both may repeat what was sent. Ours."""

log = structlog.get_logger(__name__)


class Problem(BaseModel):
    """RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = Field(description="What happened, to what, and what to do.")
    errors: list[dict[str, str]] | None = Field(default=None, description="Each wrong field: `field` and `message`.")


class ProblemResponse(JSONResponse):
    media_type = "application/problem+json"


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For the OpenAPI description of a route."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def problem(status: int, title: str, detail: str, errors: list[dict[str, str]] | None = None) -> ProblemResponse:
    body = Problem(title=title, status=status, detail=_sayable(detail, MAX_DETAIL), errors=errors)
    return ProblemResponse(body.model_dump(exclude_none=True), status_code=status)


def install(app: FastAPI, *, tokens: bool) -> None:
    """Handlers for every kind of error, and the schema that the routes' descriptions refer to. `tokens`: callers need
    one, and the description says so."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        description = describe()
        description["components"]["schemas"].setdefault("Problem", Problem.model_json_schema())
        if tokens:
            _ask_for_tokens(description)
        return description

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it

    @app.exception_handler(ProctorError)
    async def ours(_: Request, error: ProctorError) -> ProblemResponse:
        errors = error.errors if isinstance(error, InvalidRequest) else None
        return problem(error.status, error.title, str(error), errors or None)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> ProblemResponse:
        found = _invalid(error.errors())
        return problem(found.status, found.title, str(found), found.errors or None)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> ProblemResponse:
        phrase = HTTPStatus(error.status_code).phrase
        detail = f"{request.method} {request.url.path}: {error.detail}"
        response = problem(error.status_code, phrase, detail)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> ProblemResponse:
        log.exception("unexpected error", method=request.method, path=request.url.path, exc_info=error)
        response = problem(500, "Internal error", "Something unexpected went wrong; it is in the service's log.")
        response.headers.update(SAFE)
        return response


def _ask_for_tokens(description: dict[str, Any]) -> None:
    """Everywhere but where everybody is admitted."""
    description["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    for path, operations in description["paths"].items():
        if not path.startswith("/health/"):
            for operation in operations.values():
                operation["security"] = [{"token": []}]


def _invalid(errors: Sequence[Any]) -> InvalidRequest:
    for error in errors:
        if error["type"] == "json_invalid":
            reason = error.get("ctx", {}).get("error", "invalid")
            return MalformedBody(f"The body is not JSON: {reason} at character {error['loc'][-1]}.")
    if any(e["type"] == "model_attributes_type" and isinstance(e["input"], bytes | str) for e in errors):
        return MalformedBody("The body was not sent as JSON: set the header Content-Type: application/json.")
    found = [{"field": _field(e), "message": _sayable(_message(e), MAX_DETAIL)} for e in errors[:MAX_WRONG]]
    more = f"; and {len(errors) - len(found)} more" if len(errors) > len(found) else ""
    return InvalidRequest("; ".join(f"{e['field']}: {e['message']}" for e in found) + more, found)


def _field(error: Any) -> str:
    return _sayable(".".join(str(part) for part in error["loc"]), MAX_FIELD)


def _sayable(text: str, most: int) -> str:
    """What JSON can carry, and not longer than anybody reads."""
    said = text.encode("utf-8", "backslashreplace").decode()
    return said if len(said) <= most else f"{said[: most - 1]}…"


def _message(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "there is no such field"
    return str(error["msg"]).removeprefix("Value error, ")


class BodyLimit:
    """ASGI: refuses a body of more than `limit` bytes, by its announced length or as it comes in."""

    def __init__(self, app: Any, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self._limit:
            await self._refuse(scope, receive, send)
            return
        seen = 0

        async def limited() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise HTTPException(413, str(self._error()))
            return message

        await self._app(scope, limited, send)

    async def _refuse(self, scope: Any, receive: Any, send: Any) -> None:
        error = self._error()
        await problem(error.status, error.title, str(error))(scope, receive, send)

    def _error(self) -> BodyTooLarge:
        return BodyTooLarge(f"The body has more than {self._limit} bytes, the most that is taken.")
