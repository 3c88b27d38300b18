"""What a user asks for: the evaluation's immutable request.

The words are Inspect AI's own (``task``, ``model``, ``epochs``, ``limit`` …), so that a spec reads like the
``inspect eval`` command it stands for.
"""

import hashlib
import json
from math import isfinite
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, StringConstraints

from app import yaml_text

PRINTABLE = r"^[^\x00-\x1f\x7f]+$"
"""No control characters."""

MAX_DEPTH = 32
"""Of arguments' lists and objects. Ours: people write three or four."""

MAX_ARGUMENTS = 64 * 2**10
"""Bytes of a field's arguments as JSON. Ours: some twenty pages of text; longer ones belong into the dataset."""

INT4 = 2**31 - 1
"""The largest integer that everything on the way takes: the database, and languages that read the API."""


QUEUE_ID = r"^[A-Za-z0-9-]{1,100}$"
"""A queue's own name, the end of its resource name. Source: the documentation of Cloud Tasks."""


def _bounded(value: Any) -> Any:
    """What neither the interpreter's stack nor Postgres's jsonb can take is refused; without recursion."""
    left = [(value, 1)]
    while left:
        one, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"must not be nested more than {MAX_DEPTH} deep")
        if isinstance(one, dict):
            left += [(part, depth + 1) for pair in one.items() for part in pair]
        elif isinstance(one, list | tuple):
            left += [(part, depth + 1) for part in one]
        elif isinstance(one, str) and not _storable(one):
            raise ValueError("must not have NUL characters or half surrogate pairs: no database keeps them")
        elif isinstance(one, float) and not isfinite(one):
            raise ValueError("must not have NaN or Infinity: JSON has neither")
    if len(json.dumps(value, default=str)) > MAX_ARGUMENTS:
        raise ValueError(f"must not have more than {MAX_ARGUMENTS} bytes as JSON")
    yaml_text.check(value)
    return value


def _storable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


Name = Annotated[str, StringConstraints(min_length=1, max_length=500, pattern=PRINTABLE)]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=100, pattern=PRINTABLE)]
Arguments = Annotated[dict[str, JsonValue], BeforeValidator(_bounded), Field(max_length=100)]


class SandboxLimits(BaseModel):
    """What one sample's code may use in the sandbox `proctor`. In a spec, a limit may be lowered, not raised."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory: int | None = Field(
        default=None, ge=2**26, description="Bytes for each process, and for all of them together. At least 64 MiB."
    )
    processes: int | None = Field(default=None, ge=16, description="Processes and threads at the same time.")
    workspace: int | None = Field(default=None, ge=2**20, description="Bytes of files in `/workspace`.")
    tmp: int | None = Field(default=None, ge=2**20, description="Bytes of files in `/tmp`, `/var/tmp` and `/dev/shm`.")
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
    task_args: Arguments = Field(
        default_factory=dict,
        description="Arguments of the task's function. What JSON has no form for is given as YAML: `{'$yaml': '2021-02-03'}`"
        " is a date.",
    )
    model_args: Arguments = Field(
        default_factory=dict, description="Arguments of the model's provider, as for `task_args`. No keys."
    )
    model_roles: dict[Name, Name] = Field(
        default_factory=dict,
        max_length=20,
        description="Models by role, for example the judge's: `{'grader': 'openai/gpt-5'}`.",
    )
    limit: int | None = Field(
        default=None, ge=1, le=INT4, description="Run only the first so many samples of the dataset."
    )
    epochs: int | None = Field(
        default=None, ge=1, le=1000, description="Run each sample so many times. Default: the task's own."
    )
    message_limit: int | None = Field(default=None, ge=1, le=INT4, description="Messages in one sample's conversation.")
    token_limit: int | None = Field(default=None, ge=1, le=INT4, description="Tokens one sample may use.")
    time_limit: int | None = Field(default=None, ge=1, le=INT4, description="Seconds on the clock for one sample.")
    working_limit: int | None = Field(
        default=None,
        ge=1,
        le=INT4,
        description="Seconds of work for one sample: the clock's, less the waits that Inspect knows of. It takes off at once"
        " the wait for a turn at a model and between its own retries of a call. The wait within a call, which a provider's"
        " package makes before it tries again (for a rate limit, say), counts until the call returns: it can end the sample.",
    )
    max_retries: int | None = Field(
        default=None,
        ge=0,
        le=10_000,
        description="How often a call of a model is tried again after a rate limit or an error of its provider, before the"
        " sample fails (the provider's own client may send each try up to twice more). Default: without end.",
    )
    timeout: int | None = Field(
        default=None,
        ge=1,
        le=INT4,
        description="Seconds after which a call of a model that keeps failing is not tried again. Default: without end.",
    )
    attempt_timeout: int | None = Field(
        default=None,
        ge=1,
        le=INT4,
        description="Seconds that one try of a model's call may take; it then counts as failed. Default: the provider's"
        " client's.",
    )
    cost_limit: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="US dollars one sample may cost."
    )
    fail_on_error: bool | Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description="When errored samples fail the evaluation: true: at the first; false: never; a number below 1: from"
        " that share of the samples on; any other, 1.0 too: from that many on. No further sample starts then. Default: the"
        " task's own, else true.",
    )
    continue_on_fail: bool | None = Field(
        default=None,
        description="Run all samples though more of them have errored than `fail_on_error` allows, and fail in the end."
        " Default: the task's own, else false.",
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
    queue: Annotated[str, StringConstraints(pattern=QUEUE_ID)] | None = Field(
        default=None,
        description="The queue that paces this evaluation, for example one with a provider's rate limit: a name that the"
        " service allows. Default: its own.",
    )
    tags: dict[Tag, Tag] = Field(
        default_factory=dict, max_length=20, description="Your labels, to find evaluations by."
    )

    def digest(self) -> str:
        """SHA-256 (hex) of the spec as sent: two specs that say the same thing in the same fields have the same one."""
        sent = self.model_dump(mode="json", exclude_unset=True)
        return hashlib.sha256(json.dumps(sent, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
