"""Where a request comes from, as far as its `traceparent` says."""

from typing import Any

from starlette.datastructures import Headers

from app.tracing import coming_from


class IncomingTrace:
    """ASGI: what a request logs can be found by the trace that the platform, or the client, has begun."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with coming_from(Headers(scope=scope).get("traceparent")):
            await self._app(scope, receive, send)
