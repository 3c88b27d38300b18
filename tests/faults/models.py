"""A model provider that follows a script: the chat completions of OpenAI's API over real HTTP, with faults on demand.

Inspect uses it as `openai-api/NAME/MODEL`, with NAME_BASE_URL and NAME_API_KEY in the children's environment, or with the
spec's `model_args` {"base_url": …, "api_key": …}; for a role, `model_roles` {"grader": "openai-api/NAME/judge"} and the
environment (`Models.environment`).

The agent calls a tool while its conversation has fewer than `Script.turns` replies, then submits. What is asked for a
"GRADE:" without tools is a judge. The answer depends on the conversation alone, so that it can be gone on with anywhere.
"""

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Self

Kind = Literal["agent", "judge"]
Messages = list[dict[str, Any]]

_NAMED = re.compile(r"\bconversation (\S*\w)")
_UNNAMED = 60
_REASONS = {200: "OK", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests", 500: "Internal Server Error"}
_ERRORS = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


@dataclass(frozen=True)
class Script:
    """`command`: for the tool, with `{turn}` (from 0) and `{conversation}` filled in; it goes to the tool's first argument.
    `latency`: seconds before each answer. `usage`: what each answer says it has cost, in OpenAI's form; None: a little."""

    turns: int = 3
    tool: str = "bash"
    command: str = "echo {turn} >> steps.txt"
    submission: str = "done"
    verdict: str = "It meets the criterion.\n\nGRADE: C"
    latency: float = 0.0
    usage: dict[str, Any] | None = None


@dataclass
class Request:
    """One that has arrived at `at` (monotonic seconds). `conversation`: NAME, where the first user message says
    "conversation NAME", else that message's beginning; a judge's prompt quotes the agent's, so it has the same.
    `turns`: the model's replies in it so far. `number`: the how manieth of its conversation and kind, from 1. `status`:
    what was answered; None: nothing, yet or ever."""

    at: float
    kind: Kind
    conversation: str
    turns: int
    number: int
    tokens: int
    """What the answer says it has cost, input and output; nothing is paid for an error."""
    status: int | None = None
    answered: float | None = None


@dataclass(eq=False)
class Fault:
    """Befalls the next `times` requests that fit: of that conversation, kind and number, as far as given. `status` None:
    no answer until it is removed, and then the right one. `body`: the answer, of whatever type. `retry_after`: seconds that
    the answer asks for before the next request. `happened`: how often it has."""

    status: int | None
    times: int = 1
    retry_after: int | None = None
    conversation: str | None = None
    kind: Kind | None = None
    number: int | None = None
    body: str | None = None
    happened: int = 0
    removed: asyncio.Event = field(default_factory=asyncio.Event)

    def fits(self, request: Request) -> bool:
        return (
            self.happened < self.times
            and self.conversation in (None, request.conversation)
            and self.kind in (None, request.kind)
            and self.number in (None, request.number)
        )

    def remove(self) -> None:
        self.times = self.happened
        self.removed.set()


class Models:
    """An async context manager, to be used from its own event loop. From elsewhere, such as a thread without a loop:
    `with anyio.from_thread.start_blocking_portal() as portal, portal.wrap_async_context_manager(Models()) as models`,
    and `portal.call` for its methods.

    `script`: one for all conversations, or which one by their name.
    """

    def __init__(self, script: Script | Callable[[str], Script] | None = None) -> None:
        self._script_of = script if callable(script) else lambda _: script or Script()
        self.url = ""
        """The base URL, known once it is entered."""
        self.requests: list[Request] = []
        """In the order of arrival."""
        self._faults: list[Fault] = []
        self._counts: Counter[tuple[str, Kind]] = Counter()
        self._arrived = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in tuple(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def environment(self, name: str = "scripted") -> dict[str, str]:
        """For the processes that are to know it as `openai-api/NAME/…`."""
        return {f"{name.upper()}_BASE_URL": self.url, f"{name.upper()}_API_KEY": "none"}

    @property
    def model_args(self) -> dict[str, str]:
        """For a spec whose model is `openai-api/scripted/…`, in processes that do not know it."""
        return {"base_url": self.url, "api_key": "none"}

    def fail(self, status: int, times: int = 1, **which: Any) -> Fault:
        """The next `times` requests (`which`: see `Fault`) are answered with this HTTP status. Inspect tries 429 and 500
        again, after 3 s and longer; 401 is final."""
        return self._befall(Fault(status, times, **which))

    def hang(self, times: int = 1, **which: Any) -> Fault:
        """The next `times` requests get no answer before the fault is removed."""
        return self._befall(Fault(None, times, **which))

    def garble(self, body: str, times: int = 1, **which: Any) -> Fault:
        """The next `times` requests are answered 200 with this body, which is no completion."""
        return self._befall(Fault(200, times, body=body, **which))

    async def arrival(self, conversation: str, number: int = 1, kind: Kind = "agent") -> Request:
        """The conversation's request of that number, as soon as it is there."""
        while True:
            for request in self.of(conversation, kind):
                if request.number == number:
                    return request
            await self._arrived.wait()

    def of(self, conversation: str, kind: Kind = "agent") -> list[Request]:
        return [r for r in self.requests if r.conversation == conversation and r.kind == kind]

    # Serving ----------------------------------------------------------------------------------------------------------

    def _befall(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                while True:
                    await self._serve(reader, writer)
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split(" ", 2)[1]
        length = re.search(r"^content-length: *(\d+)", head, re.IGNORECASE | re.MULTILINE)
        body = await reader.readexactly(int(length[1]) if length else 0)
        chat = path.endswith("/chat/completions")
        status, answer, after = await self._answer(json.loads(body)) if chat else (*_error(404), None)
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        kind = "text/html" if data.startswith(b"<") else "application/json"
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Answer')}", f"Content-Type: {kind}"]
        if after is not None:
            lines.append(f"Retry-After: {after}")
        writer.write("\r\n".join([*lines, f"Content-Length: {len(data)}", "", ""]).encode() + data)
        await writer.drain()

    async def _answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any] | str, int | None]:
        """Its status, its body, and after how many seconds to ask again."""
        request = self._arrive(body)
        script = self._script_of(request.conversation)
        fault = next((fault for fault in self._faults if fault.fits(request)), None)
        if fault is not None:
            fault.happened += 1
            if fault.status is None:
                await fault.removed.wait()
        await asyncio.sleep(script.latency)
        request.status = 200 if fault is None or fault.status is None else fault.status
        request.answered = time.monotonic()
        if fault is not None and fault.body is not None:
            return request.status, fault.body, None
        if request.status == 200:
            return 200, _completion(body, request, script), None
        return *_error(request.status), fault.retry_after if fault else None

    def _arrive(self, body: dict[str, Any]) -> Request:
        messages: Messages = body["messages"]
        grade = not body.get("tools") and any("GRADE:" in _text(message) for message in messages)
        kind: Kind = "judge" if grade else "agent"
        conversation = _conversation(messages)
        self._counts[conversation, kind] += 1
        turns = sum(message["role"] == "assistant" for message in messages)
        number = self._counts[conversation, kind]
        request = Request(time.monotonic(), kind, conversation, turns, number, _input(messages) + _OUTPUT)
        self.requests.append(request)
        self._arrived.set()
        self._arrived = asyncio.Event()
        return request


_OUTPUT = 10
"""Tokens of each answer."""


def _input(messages: Messages) -> int:
    return 10 * len(messages)


def _completion(body: dict[str, Any], request: Request, script: Script) -> dict[str, Any]:
    message = _reply(body, request, script)
    return {
        "id": f"{request.conversation}-{request.number}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": _finish(message)}],
        "usage": script.usage
        or {
            "prompt_tokens": request.tokens - _OUTPUT,
            "completion_tokens": _OUTPUT,
            "total_tokens": request.tokens,
        },
    }


def _reply(body: dict[str, Any], request: Request, script: Script) -> dict[str, Any]:
    if request.kind == "judge":
        return {"role": "assistant", "content": script.verdict}
    tools = {tool["function"]["name"]: tool["function"] for tool in body.get("tools") or ()}
    if script.tool in tools and request.turns < script.turns:
        command = script.command.format(turn=request.turns, conversation=request.conversation)
        return _call(script.tool, tools, command, request.turns)
    if "submit" in tools:
        return _call("submit", tools, script.submission, request.turns)
    return {"role": "assistant", "content": script.submission}


def _call(name: str, tools: dict[str, Any], argument: str, turn: int) -> dict[str, Any]:
    """`argument` goes to the tool's first parameter, whatever its name."""
    first = next(iter(tools[name]["parameters"]["properties"]))
    function = {"name": name, "arguments": json.dumps({first: argument})}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": f"call_{turn}", "type": "function", "function": function}],
    }


def _finish(message: dict[str, Any]) -> str:
    return "tool_calls" if "tool_calls" in message else "stop"


def _error(status: int) -> tuple[int, dict[str, Any]]:
    message = f"{_REASONS.get(status, 'An error')}, by request of the test."
    return status, {"error": {"message": message, "type": "scripted", "code": _ERRORS.get(status, str(status))}}


def _conversation(messages: Messages) -> str:
    first = next((_text(message) for message in messages if message["role"] == "user"), "")
    named = _NAMED.search(first)
    return named[1] if named else first[:_UNNAMED].strip()


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(part.get("text", "") for part in content)
