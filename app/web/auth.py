"""Who may call what: asked before anything of a request is read or routed, so that no new address can be forgotten."""

from typing import Any
from urllib.parse import urlsplit

import structlog
from structlog.contextvars import bound_contextvars

from app.errors import Forbidden, ProctorError, Unauthenticated
from app.settings import Settings
from app.web.identity import Identity, is_loopback
from app.web.problems import problem

READING = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""

log = structlog.get_logger(__name__)


class Guard:
    """ASGI: admits to `/health/*` everybody, to `/tasks/*` the queue and who debugs it, to everything else the API's
    callers; refuses what a browser sends on another site's behalf. The caller is in `request.state.caller`."""

    def __init__(self, app: Any, settings: Settings, identity: Identity) -> None:
        self._app = app
        self._settings = settings
        self._identity = identity

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or scope["path"].startswith("/health/"):
            await self._app(scope, receive, send)
            return
        try:
            caller = await self._identity.caller(scope["headers"])
            self._admit(caller, scope)
        except ProctorError as error:
            await _refuse(error, scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        with bound_contextvars(caller=caller):
            await self._app(scope, receive, send)

    def _admit(self, caller: str, scope: Any) -> None:
        settings = self._settings
        if settings.auth == "none":
            refuse_other_hosts(scope, settings)
        elif scope["path"].startswith("/tasks/"):
            if caller not in settings.pushers:
                raise Forbidden(
                    f"{caller} may not call {scope['path']}: it is for the queue's service account. The operator lists"
                    " others in PROCTOR_PUSH_CALLERS."
                )
        elif not admitted(caller, settings.callers):
            raise Forbidden(f"{caller} may not use this service: its operator lists who may in PROCTOR_CALLERS.")
        refuse_other_sites(scope)


def admitted(email: str, callers: tuple[str, ...]) -> bool:
    """`callers`: e-mails and domains as `@example.com`. All in small letters; a domain is that domain and none below."""
    return email in callers or f"@{email.rpartition('@')[2]}" in callers


def refuse_other_hosts(scope: Any, settings: Settings) -> None:
    """Without tokens, being on this machine is what admits; a browser here must not be led to it under a name that some
    website has given it (DNS rebinding)."""
    host = _name(f"//{_header(scope, b'host') or ''}")
    if not is_loopback(host) and host != _name(settings.service_url):
        raise Forbidden(f"PROCTOR_AUTH is none, and so only requests to a loopback address are taken, not to {host!r}.")


def refuse_other_sites(scope: Any) -> None:
    """What changes something is not taken from a page of another site. Browsers say so in Sec-Fetch-Site, which no page
    can set; older ones only whose page it is."""
    if scope.get("method", "GET") in READING:
        return
    site, origin = _header(scope, b"sec-fetch-site"), _header(scope, b"origin")
    own = origin is None or origin.partition("://")[2] == _header(scope, b"host")
    if site not in ("same-origin", "none", None) or (site is None and not own):
        raise Forbidden("A browser sent this for a page of another site, which may change nothing here.")


def tell_admitted(settings: Settings) -> None:
    """At start-up: who may call, and whether that is nobody."""
    if settings.auth == "none":
        return
    log.info("callers", auth=settings.auth, callers=settings.callers, push_callers=sorted(settings.pushers))
    if not settings.callers:
        log.warning("nobody may use the API: PROCTOR_CALLERS lists nobody")
    if not settings.pushers:
        log.warning(
            "the queue may not push: set PROCTOR_QUEUE_SERVICE_ACCOUNT to the account whose token its pushes carry"
        )


async def _refuse(error: ProctorError, scope: Any, receive: Any, send: Any) -> None:
    log.info("refused", status=error.status, reason=str(error), path=scope["path"])
    response = problem(error.status, error.title, str(error))
    if isinstance(error, Unauthenticated):
        response.headers["WWW-Authenticate"] = "Bearer"
    await response(scope, receive, send)


def _header(scope: Any, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)


def _name(address: str) -> str:
    """The host's, empty where the address is none."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""
