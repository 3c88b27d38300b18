"""Proctor's HTTP API from the outside: what the command line and the demo use.

Views are the API's own JSON objects (see /docs of the service). Nothing of the service is imported here: a command must
start in a moment.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import httpx
from tenacity import RetryCallState, Retrying, stop_after_attempt, wait_exponential_jitter

from app import shapes
from app.errors import ProctorError
from app.shapes import Shape, fits

Json = dict[str, Any]

TRIES = 4
"""Of one request, about 2 s in all when nobody answers. Ours: a service that restarts is ridden out, a wrong address is
told soon."""

TIMEOUT = httpx.Timeout(10, connect=3)
SLOW_TIMEOUT = httpx.Timeout(60, connect=3)
"""For a request that must not be sent twice: the service may wait for its queue (20 s) before it answers."""

MAX_PAGE = 200
"""Evaluations in one answer, at most. Source: the API."""

MAX_SAMPLES_PAGE = 1000
"""Samples in one answer, at most. Source: the API."""

SHOWN_RUNNING = 5
"""Executions of which `running` asks what they do: one request each."""

MIN_PREFIX = 6

HOW_TO_BE_KNOWN = "PROCTOR_TOKEN must be an ID token, as of `gcloud auth print-identity-token`."


class Refused(ProctorError):
    """The request is wrong, and will be the next time too."""

    title = "Refused"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(ProctorError):
    """Nobody answers, or only with 5xx."""

    status = 503
    title = "Service not reachable"


@dataclass(frozen=True)
class Running:
    """What runs now: `what` names the samples, or planning, or the report; `progress` is the execution's."""

    what: str
    progress: Json


@dataclass(frozen=True)
class Seen:
    """The evaluation as it was last seen; `away` says why that was not just now."""

    view: Json
    running: Sequence[Running] = ()
    away: str | None = None

    @property
    def over(self) -> bool:
        return bool(self.view["state"] != "running")


class Client:
    """A context manager. Raises `Refused` and `Unreachable`. `token`: an ID token, for a service that asks who calls."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        # a proxy from the environment is for addresses elsewhere
        here = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        headers = _authorization(token, clear=not here and self.url.startswith("http:")) if token else None
        self._http = httpx.Client(base_url=self.url, timeout=TIMEOUT, trust_env=not here, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def submit(self, spec: Json, idempotency_key: str | None = None) -> Json:
        """Always with a key, so that sending it again after a lost answer is harmless."""
        headers = {"Idempotency-Key": idempotency_key or str(uuid4())}
        return self._send(
            self._http.build_request("POST", "/evaluations", json=spec, headers=headers), shapes.EVALUATION
        )

    def evaluation(self, evaluation_id: str) -> Json:
        return self._get(f"/evaluations/{evaluation_id}", shapes.EVALUATION)

    def evaluations(self, *, state: str | None = None, tags: Sequence[str] = (), limit: int = 50) -> Json:
        """Newest first, as one page of the API's form whatever `limit` is."""
        found: list[Json] = []
        query: dict[str, Any] = {"tag": list(tags)} | ({"state": state} if state else {})
        while True:
            page = self._get("/evaluations", shapes.EVALUATIONS, {**query, "limit": min(MAX_PAGE, limit - len(found))})
            found += page["evaluations"]
            query["cursor"] = page["next"]
            if page["next"] is None or len(found) >= limit:
                return {"evaluations": found, "next": page["next"]}

    def samples(self, evaluation_id: str, limit: int = 100) -> Json:
        """In the dataset's order, as one page of the API's form whatever `limit` is."""
        found: list[Json] = []
        query: dict[str, Any] = {}
        while True:
            query["limit"] = min(MAX_SAMPLES_PAGE, limit - len(found))
            page = self._get(f"/evaluations/{evaluation_id}/samples", shapes.SAMPLES, query)
            found += page["samples"]
            query["cursor"] = page["next"]
            if page["next"] is None or len(found) >= limit:
                return {"samples": found, "next": page["next"]}

    def sample(self, evaluation_id: str, sample_id: str) -> list[Json]:
        """One sample, in each of its epochs. Raises `Refused` if there is none of that id."""
        page: Json = {"next": None}
        found: list[Json] = []
        while True:
            query = {"limit": MAX_SAMPLES_PAGE, "cursor": page["next"]}
            page = self._get(f"/evaluations/{evaluation_id}/samples", {k: v for k, v in query.items() if v})
            found += [sample for sample in page["samples"] if str(sample["id"]) == sample_id]
            if page["next"] is None:
                break
        if not found:
            raise Refused(f"Evaluation {evaluation_id} has no sample {sample_id!r} (yet).", 404)
        return found

    def execution(self, execution_id: str) -> Json:
        return self._get(f"/executions/{execution_id}", shapes.EXECUTION)

    def explanation(self, given: str) -> Json:
        """`given`: an evaluation, as for `find`; or one of its executions (`.plan`, `.7`, `.report` behind that), whose
        answer has an `evaluation_id`."""
        evaluation, dot, execution = given.partition(".")
        if dot and not re.fullmatch(r"plan|report|[0-9]+", execution):
            raise Refused(f"{given!r} is not an execution's id: its evaluation's, and .plan, .1, .2 … or .report.", 422)
        id = self.find(evaluation)
        return (
            self.execution(f"{id}.{execution}")
            if dot
            else self._get(f"/evaluations/{id}/explanation", shapes.EXPLANATION)
        )

    def cancel(self, evaluation_id: str) -> Json:
        return self._send(self._http.build_request("POST", f"/evaluations/{evaluation_id}/cancel"), shapes.STATE)

    def retry(self, evaluation_id: str) -> Json:
        """Sent once: a second one would be told that the evaluation runs already."""
        path = f"/evaluations/{evaluation_id}/retry"
        return self._send(self._http.build_request("POST", path, timeout=SLOW_TIMEOUT), shapes.RETRIED, again=False)

    def find(self, given: str) -> str:
        """The evaluation's whole id; `given` is that, or the beginning of one of the newest."""
        with suppress(ValueError):
            return str(UUID(given))
        if not re.fullmatch(rf"[0-9a-f-]{{{MIN_PREFIX},36}}", given.lower()):
            raise Refused(f"{given!r} is not an evaluation's id, nor {MIN_PREFIX} or more characters of one.", 422)
        newest = self.evaluations(limit=MAX_PAGE)["evaluations"]
        found = [view["id"] for view in newest if view["id"].startswith(given.lower())]
        if len(found) == 1:
            return str(found[0])
        which = "no one" if not found else f"{len(found)}"
        raise Refused(f"Of the newest {MAX_PAGE} evaluations, {which} begins with {given!r}: give the whole id.", 404)

    def running(self, view: Json) -> list[Running]:
        """What the evaluation does now; where it has more samples than a page, of those on the first page."""
        counts = view["samples"]
        if not counts["total"]:
            return self._progress({"planning": f"{view['id']}.plan"})
        if not counts["running"] and not counts["pending"]:
            return self._progress({"reporting": f"{view['id']}.report"})
        executions: dict[str, list[str]] = {}
        for sample in self.samples(view["id"], MAX_SAMPLES_PAGE)["samples"]:
            if sample["state"] == "running":
                executions.setdefault(sample["execution"], []).append(_name(sample))
        return self._progress({_some(names): id for id, names in list(executions.items())[:SHOWN_RUNNING]})

    def _progress(self, executions: dict[str, str]) -> list[Running]:
        found = []
        for what, execution_id in executions.items():
            with suppress(Refused):  # it is not there yet
                execution = self.execution(execution_id)
                if execution["state"] == "running":
                    found.append(Running(what, execution["progress"] or {}))
        return found

    def _get(self, path: str, shape: Shape, query: Json | None = None) -> Json:
        return self._send(self._http.build_request("GET", path, params=query), shape)

    def _send(self, request: httpx.Request, shape: Shape, *, again: bool = True) -> Json:
        """`again`: it may be sent again when nobody knows whether it arrived."""

        def transient(state: RetryCallState) -> bool:
            assert state.outcome is not None
            error = state.outcome.exception()
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                return True
            return again and (isinstance(error, httpx.TransportError) or (not error and _down(state.outcome.result())))

        tries = Retrying(
            retry=transient,
            stop=stop_after_attempt(TRIES),
            wait=wait_exponential_jitter(initial=0.25, max=2, jitter=0.1),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )
        try:
            response: httpx.Response = tries(self._http.send, request)
        except httpx.RequestError as error:
            reason = str(error) or type(error).__name__
            raise Unreachable(
                f"No answer from {self.url}: {reason}. Is it running, and is --url (PROCTOR_URL) right?"
            ) from error
        return self._body(response, shape)

    def _body(self, response: httpx.Response, shape: Shape) -> Json:
        body = _json(response)
        if response.is_success and fits(body, shape):
            return dict(body)
        problem = body if _is_problem(response, body) else {}
        said = str(problem.get("detail") or f"{response.status_code} {response.reason_phrase}")
        if _down(response):
            raise Unreachable(f"The service at {self.url} cannot answer now: {said} Try again in a while.")
        if response.status_code in (401, 403):
            hint = f" {HOW_TO_BE_KNOWN}" if response.status_code == 401 else ""
            raise Refused(f"{self.url} does not let you in: {said}{hint}", response.status_code)
        if not problem:
            where = f", to {response.headers['location']}" if response.has_redirect_location else ""
            what = (
                "is not Proctor, or of another version"
                if fits(body, dict) and response.is_success
                else "is not Proctor"
            )
            raise Refused(f"What answers at {self.url} {what} ({said}{where}): is --url (PROCTOR_URL) right?", 404)
        raise Refused(said, response.status_code)


def follow(
    client: Client, evaluation_id: str, *, every: float = 1, patience: float = 300, details: bool = True
) -> Iterator[Seen]:
    """The evaluation about each `every` seconds until it is over. While the service is away, for up to `patience`
    seconds, the last view comes again. `details`: ask what runs, too."""
    seen = Seen(client.evaluation(evaluation_id))
    last = time.monotonic()
    yield seen
    while not seen.over:
        time.sleep(every)
        try:
            view = client.evaluation(evaluation_id)
            running = client.running(view) if details and view["state"] == "running" else ()
            seen, last = Seen(view, running), time.monotonic()
        except Unreachable as error:
            if time.monotonic() - last > patience:
                raise
            seen = Seen(seen.view, away=str(error))
        yield seen


def _authorization(token: str, *, clear: bool) -> dict[str, str]:
    token = token.strip()
    if not re.fullmatch(r"[A-Za-z0-9_.~+/=-]+", token):
        raise Refused(HOW_TO_BE_KNOWN, 401)
    if clear:
        raise Refused("PROCTOR_TOKEN is not sent over http, where everybody on the way can read it: use https.", 401)
    return {"Authorization": f"Bearer {token}"}


def _down(response: httpx.Response) -> bool:
    return response.status_code >= 500 or response.status_code == 429


def _is_problem(response: httpx.Response, body: Any) -> bool:
    """Other servers have a `detail`, too, for a path that they have not."""
    ours = isinstance(body, dict) and isinstance(body.get("detail"), str) and not response.is_success
    return ours and ("title" in body or response.status_code not in (404, 405))


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _name(sample: Json) -> str:
    return f"{sample['id']}" if sample["epoch"] == 1 else f"{sample['id']} (epoch {sample['epoch']})"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"sample{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"
