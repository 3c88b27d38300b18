"""The scripted model: what it says depends on the conversation alone."""

import time

import pytest
from inspect_ai.model import ChatMessageUser, Model, get_model
from inspect_ai.tool import ToolInfo

from app.examples.problem import load_problems

# Inspect's own use of tenacity, when it calls a model. Warnings are errors here.
pytestmark = pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning")

BASH = ToolInfo(name="bash", description="Runs a command.")
SUBMIT = ToolInfo(name="submit", description="Submits.")


async def _conversation(model: Model, prompt: str) -> list[str]:
    """The names of the tools that the model calls, until it submits."""
    messages: list[object] = [ChatMessageUser(content=prompt)]
    called: list[str] = []
    while "submit" not in called:
        output = await model.generate(messages, tools=[BASH, SUBMIT])  # type: ignore[arg-type] # list is invariant
        messages.append(output.message)
        called += [call.function for call in output.message.tool_calls or []]
    return called


async def test_the_agent_follows_its_script_and_submits() -> None:
    prompt = load_problems()["topological_sort"].prompt
    assert await _conversation(get_model("scripted/agent"), prompt) == ["bash", "bash", "bash", "submit"]


async def test_the_agent_gives_up_on_what_it_has_no_script_for() -> None:
    assert await _conversation(get_model("scripted/agent"), "Prove that P is not NP.") == ["submit"]


@pytest.mark.parametrize("model", ["scripted/agent", "scripted/judge"])
async def test_either_model_judges_when_asked_without_tools(model: str) -> None:
    question = f"Please grade this.\n{load_problems()['rate_limiter'].prompt}\nGRADE: $LETTER"
    output = await get_model(model).generate(question)
    assert output.completion.endswith("GRADE: P")
    assert output.usage is not None
    assert output.usage.total_tokens == output.usage.input_tokens + output.usage.output_tokens > 0


async def test_a_reply_takes_as_long_as_asked_for() -> None:
    started = time.monotonic()
    await get_model("scripted/agent", latency=0.2).generate("hello")
    assert time.monotonic() - started >= 0.2


def test_other_models_and_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="no model scripted/genius: only scripted/agent"):
        get_model("scripted/genius")
    with pytest.raises(ValueError, match="latency is a number of seconds, not -1"):
        get_model("scripted/agent", latency=-1)
    with pytest.raises(TypeError, match="speed"):
        get_model("scripted/agent", speed=1)
