"""What a user asks for: the evaluation's immutable request.

The words are Inspect AI's own (``task``, ``model``, ``epochs``, ``limit`` …), so that a spec reads like the
``inspect eval`` command it stands for.
"""

import hashlib
import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints

Name = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=r"^[^\x00-\x1f\x7f]+$")]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]


class SandboxLimits(BaseModel):
    """What one sample's code may use in the sandbox `proctor`. In a spec, a limit may be lowered, not raised."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory: int | None = Field(
        default=None, ge=2**26, description="Bytes for each process, and for all of them together. At least 64 MiB."
    )
    processes: int | None = Field(default=None, ge=16, description="Processes and threads at the same time.")
    workspace: int | None = Field(default=None, ge=2**20, description="Bytes of files in `/workspace`.")
    tmp: int | None = Field(default=None, ge=2**20, description="Bytes of files in `/tmp`.")
    cpu: int | None = Field(default=None, ge=1, description="Seconds of CPU for each process.")
    output: int | None = Field(
        default=None, ge=1024, description="Bytes kept of each output stream of a command: its last ones."
    )

    def lowered(self, by: "SandboxLimits | None") -> "SandboxLimits":
        """The lower of each two."""
        asked = by.model_dump(exclude_none=True) if by else {}
        ours = self.model_dump(exclude_none=True)
        return SandboxLimits(**(ours | {name: min(value, ours.get(name, value)) for name, value in asked.items()}))


class Spec(BaseModel):
    """One evaluation's request. Unknown fields are refused: a misspelt limit must not be silently no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid", title="Spec")

    task: Name = Field(
        description="An Inspect task: `package/name`, `file.py@name`, or `proctor/NAME` for one of Proctor's examples.",
        examples=["proctor/programming"],
    )
    model: Name = Field(
        description="A model in Inspect's form, `provider/name`.",
        examples=["scripted/agent", "openai/gpt-5", "openai-api/local/qwen3"],
    )
    task_args: dict[str, JsonValue] = Field(default_factory=dict, description="Arguments of the task's function.")
    model_args: dict[str, JsonValue] = Field(default_factory=dict, description="Arguments of the model's provider.")
    model_roles: dict[str, Name] = Field(
        default_factory=dict, description="Models by role, for example the judge's: `{'grader': 'openai/gpt-5'}`."
    )
    limit: int | None = Field(default=None, ge=1, description="Run only the first so many samples of the dataset.")
    epochs: int | None = Field(
        default=None, ge=1, le=1000, description="Run each sample so many times. Default: the task's own."
    )
    message_limit: int | None = Field(default=None, ge=1, description="Messages in one sample's conversation.")
    token_limit: int | None = Field(default=None, ge=1, description="Tokens one sample may use.")
    time_limit: int | None = Field(default=None, ge=1, description="Seconds on the clock for one sample.")
    working_limit: int | None = Field(
        default=None,
        ge=1,
        description="Seconds of work for one sample: the clock's, less waiting for rate limits and retries.",
    )
    cost_limit: float | None = Field(default=None, gt=0, description="US dollars one sample may cost.")
    fail_on_error: bool | float | None = Field(
        default=None,
        description="When errored samples fail the evaluation: true: at the first; false: never; a number below 1: from"
        " that share of the samples on; a number above 1: from that many on. Default: the task's own, else true.",
    )
    sandbox: Literal["proctor", "local"] | None = Field(
        default=None,
        description="Replaces the sandbox that the task declares. `local` isolates nothing: the service must allow it.",
    )
    sandbox_limits: SandboxLimits | None = Field(
        default=None, description="Lowers what a sample's code may use in the sandbox `proctor`."
    )
    retry_on_error: int | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Run an errored sample again at once, so many times, within the same attempt. Default: the task's own,"
        " else 0.",
    )
    checkpoint: Literal["turn", "minute", "off"] | None = Field(
        default=None,
        description="How often the state of a running sample is saved, so that a lost worker costs no more than that: after"
        " each of the agent's turns, once a minute, or never. For agents that checkpoint (Inspect's `react()` and"
        " `deepagent()`, and those that use `checkpointer()`). Default: the task's own, else once a minute.",
    )
    samples_per_execution: int = Field(
        default=1, ge=1, le=1000, description="Samples that one unit of queue work runs."
    )
    max_failures: int = Field(
        default=2,
        ge=1,
        le=10,
        description="How often a sample may fail by its own fault. Lost workers are not charged.",
    )
    tags: dict[Tag, Tag] = Field(
        default_factory=dict, max_length=20, description="Your labels, to find evaluations by."
    )

    def digest(self) -> str:
        """SHA-256 (hex) of the spec as sent: two specs that say the same thing in the same fields have the same one."""
        sent = self.model_dump(mode="json", exclude_unset=True)
        return hashlib.sha256(json.dumps(sent, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
