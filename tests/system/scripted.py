"""A model that follows a script, over HTTP: what it was asked is known to the call.

OpenAI's chat completions. An agent is told `turns` times to run a command, then to submit; a judge says that the answer is
correct.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

JUDGE, AGENT = "judge", "agent"


class Model:
    """`calls`: kind and number of turns that the conversation had before, in the order of arrival."""

    def __init__(self, turns: int) -> None:
        self.turns = turns
        self.url = ""
        self.calls: list[tuple[str, int]] = []
        self.seen: list[Any] = []
        """The messages of each call."""
        self.seconds = 0.0
        """That an answer takes."""
        self.hold: set[tuple[str, int]] = set()
        """Calls that are not answered, as long as they are in here."""
        self.refuse: dict[tuple[str, int], int] = {}
        """Calls that are answered with this status, once."""

    async def called(self, kind: str, turn: int, times: int = 1) -> None:
        with anyio.fail_after(90):
            while self.calls.count((kind, turn)) < times:
                await anyio.sleep(0.02)

    @property
    def spec(self) -> dict[str, Any]:
        """The part of a spec that leads here."""
        return {
            "model": "openai-api/scripted/m",
            "model_args": {"base_url": f"{self.url}/v1", "api_key": "none"},
        }

    async def answer(self, request: Request) -> JSONResponse:
        asked = await request.json()
        text = json.dumps(asked["messages"])
        kind = JUDGE if "GRADE:" in text else AGENT
        turn = sum(message["role"] == "assistant" for message in asked["messages"])
        self.calls.append((kind, turn))
        self.seen.append(asked["messages"])
        await asyncio.sleep(self.seconds)
        while (kind, turn) in self.hold:
            await asyncio.sleep(0.02)
        if status := self.refuse.pop((kind, turn), None):
            return JSONResponse({"error": {"message": f"refused with {status}"}}, status)
        message: dict[str, Any] = {"role": "assistant", "content": "Correct.\nGRADE: C" if kind == JUDGE else ""}
        if kind == AGENT:
            call = _submit() if turn >= self.turns else _use(asked["tools"][0]["function"]["name"], turn)
            message["tool_calls"] = [{"id": f"call-{turn}", "type": "function", "function": call}]
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if kind == AGENT else "stop"}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        told = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
        return JSONResponse(told)


def _submit() -> dict[str, str]:
    return {"name": "submit", "arguments": json.dumps({"answer": "done"})}


def _use(tool: str, turn: int) -> dict[str, str]:
    arguments = {"command": f"echo {turn} >> steps.txt; cat steps.txt"} if tool == "bash" else {"text": f"{turn}"}
    return {"name": tool, "arguments": json.dumps(arguments)}


@asynccontextmanager
async def scripted(turns: int) -> AsyncIterator[Model]:
    model = Model(turns)
    app = FastAPI()
    app.post("/v1/chat/completions")(model.answer)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
    serving = asyncio.create_task(server._serve())
    while not server.started:
        await asyncio.sleep(0.01)
    model.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield model
    finally:
        model.hold.clear()
        server.should_exit = True
        await serving
