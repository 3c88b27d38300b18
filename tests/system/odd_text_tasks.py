"""Samples whose every text is such as UTF-8 cannot encode or Postgres cannot store."""

import os
from typing import Any

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageAssistant, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import Score, Target, mean, scorer
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.tool import ToolCall

HALF, NUL = "\ud83d", "\0"
ODD = f"half {HALF} and nul {NUL}"


@scorer(metrics=[mean()])
def one():  # type: ignore[no-untyped-def]  # Inspect's decorator gives it its type
    async def score(state: TaskState, target: Target) -> Score:
        where = state.metadata["where"]
        if where == "value":
            return Score(value={ODD: ODD, "plain": 1})
        if where == "explanation":
            return Score(value=1, answer=ODD, explanation=ODD, metadata={ODD: [ODD]})
        if where == "list":
            return Score(value=[ODD, 1])
        if where == "scorer":
            raise ValueError(ODD)
        return Score(value=1)

    return score


@solver
def odd() -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        where = state.metadata["where"]
        if where == "error":
            raise RuntimeError(ODD)
        if where == "print":
            os.write(1, b"\0\xff\0")
            os._exit(3)
        if where == "store":
            state.store.set(ODD, ODD)
            state.metadata[ODD] = ODD
        calls = [ToolCall(id="1", function=ODD, arguments={ODD: ODD})] if where == "tool" else None
        output = ModelOutput.from_content("mockllm/model", ODD if where == "output" else "fine")
        if calls:
            output.choices[0].message = ChatMessageAssistant(content="", tool_calls=calls)
        output.usage = ModelUsage(input_tokens=10, output_tokens=5, total_tokens=15)
        state.output = await get_model("mockllm/model", custom_outputs=[output], memoize=False).generate(state.messages)
        return state

    return solve


@task
def odd_text(where: list[Any]) -> Task:
    samples = [Sample(id=place, input="x", metadata={"where": name}) for place, name in enumerate(where, start=1)]
    return Task(dataset=samples, solver=odd(), scorer=one(), fail_on_error=False)
