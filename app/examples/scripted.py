"""A model provider that follows scripts: `scripted/agent` and `scripted/judge`, without a key or a network.

Below `scripts/` is one Markdown file for each programming problem: what the agent says and runs, turn by turn, what it
submits, and the judge's verdict. Some of the solutions are wrong on purpose. A reply depends on the conversation alone,
so that an evaluation can be resumed anywhere, and comes out the same each time.
"""

import functools
import re
from dataclasses import dataclass

import anyio
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo

from app.examples.problem import load_problems, markdown_files, sections

_CHARACTERS_PER_TOKEN = 4  # a rule of thumb for English; usage must be set, or Inspect downloads a tokenizer to count


@dataclass(frozen=True)
class Turn:
    """What the agent says, and the command it runs then."""

    says: str
    runs: str


@dataclass(frozen=True)
class Script:
    turns: tuple[Turn, ...]
    submission: str
    verdict: str


@modelapi(name="scripted")
class ScriptedAPI(ModelAPI):
    """`latency`: seconds before each reply, so that a demonstration can be watched."""

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        latency: float = 0.0,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        if model_name not in ("agent", "judge"):
            raise ValueError(f"There is no model scripted/{model_name}: only scripted/agent and scripted/judge.")
        if not isinstance(latency, int | float) or latency < 0:
            raise ValueError(f"The model argument latency is a number of seconds, not {latency!r}.")
        self.latency = latency

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        await anyio.sleep(self.latency)
        output = _agent(self.model_name, input) if tools else _judge(self.model_name, input)
        output.usage = _usage(input, output)
        return output


def _agent(model: str, input: list[ChatMessage]) -> ModelOutput:
    """The next turn: as many are over as the conversation has replies of ours."""
    script = _script(input)
    if script is None:
        return ModelOutput.for_tool_call(model, "submit", {"answer": "I have no script for this."})
    done = sum(isinstance(message, ChatMessageAssistant) for message in input)
    if done < len(script.turns):
        turn = script.turns[done]
        return ModelOutput.for_tool_call(model, "bash", {"command": turn.runs}, content=turn.says)
    return ModelOutput.for_tool_call(model, "submit", {"answer": script.submission})


def _judge(model: str, input: list[ChatMessage]) -> ModelOutput:
    """A judge is asked without tools, about the same problem's text."""
    script = _script(input)
    return ModelOutput.from_content(model, script.verdict if script else "I have no verdict on this.\n\nGRADE: I")


def _script(input: list[ChatMessage]) -> Script | None:
    text = "\n".join(message.text for message in input if message.role == "user")
    return next((script for prompt, script in _scripts() if prompt in text), None)


@functools.cache
def _scripts() -> tuple[tuple[str, Script], ...]:
    """Each problem's prompt, by which it is recognised, and its script."""
    problems = load_problems()
    return tuple((problems[name].prompt, _parse(text)) for name, text in markdown_files("scripts").items())


def _parse(text: str) -> Script:
    part = sections(text)
    turns = re.findall(r"(.*?)^```bash\n(.*?)^```$", part["Turns"], flags=re.MULTILINE | re.DOTALL)
    return Script(tuple(Turn(says.strip(), runs) for says, runs in turns), part["Submission"], part["Verdict"])


def _usage(input: list[ChatMessage], output: ModelOutput) -> ModelUsage:
    read = sum(len(message.text) for message in input) // _CHARACTERS_PER_TOKEN
    calls = output.message.tool_calls or []
    written = (len(output.completion) + sum(len(str(call.arguments)) for call in calls)) // _CHARACTERS_PER_TOKEN
    return ModelUsage(input_tokens=read, output_tokens=written, total_tokens=read + written)
