"""What crosses between the service and a child process, typed.

Service → child: one `Job`. Child → service: one `Message` a line, as JSON, over a pipe of its own; end of file without
`Done` is a crash.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictInt, StrictStr, TypeAdapter

from app.prices import OwnPrices
from app.spec import SandboxLimits, Spec

ErrorClass = Literal["infrastructure", "evaluation", "model", "limit", "cancelled"]
"""Whose fault: the platform's, the task's or its code's, the model provider's, a limit of the spec, a user's wish."""

LOGS = "logs"
"""Folder of a job's directory in which Inspect writes."""
ENDED = "ended"
"""Folder beside it with a copy of the log as of the last sample that ended: Inspect may be writing to its own."""

MESSAGE_LIMIT = 16 * 2**20
"""Bytes of one message, at most. Ours: a thousand times the usual one."""

SampleId = StrictInt | StrictStr


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class SampleRef(_Value):
    """One sample: a dataset item (its id as Inspect has it: 7 and "007" differ) at one epoch (1-based)."""

    id: SampleId
    epoch: int = Field(ge=1)


VALUES = ".values.eval"
"""How the copy of a log is named that has, beside Inspect's members, values that JSON loses."""


class Transcript(_Value):
    """Where a sample's full record lies: the URL of an Inspect log. `digest`: the planned sample's, if it is known."""

    sample: SampleRef
    log: str
    digest: int | None = None


Launcher = Literal["bubblewrap", "cloud_run"]
"""What starts the sandbox `proctor`'s commands: bubblewrap, or the platform's own `sandbox do`."""


Bounds = Literal["control group", "watchdog"]
"""What bounds the memory of a sample in sum: the kernel, all of it; or who looks, what can be seen."""


class Containment(_Value):
    """How agents' code is held on this worker. `launcher`: the one that passed its probe; None: `refusal` says why there is
    none. `bounds`: None if that is not known. `at_once`: how many samples may use a sandbox at once, by turns in the folder
    `turns`; None for as many as there are. `allowed`: patterns of the sandbox types that tasks may use. `hidden`: folders
    that no sandbox may show. `child_memory`: bytes of address space for the child itself."""

    launcher: Launcher | None = "bubblewrap"
    refusal: str = ""
    bounds: Bounds | None = None
    at_once: int | None = None
    turns: str | None = None
    limits: SandboxLimits = SandboxLimits()
    allowed: tuple[str, ...] = ("proctor",)
    hidden: tuple[str, ...] = ()
    child_memory: int | None = None


class Job(_Value):
    """One attempt's work, as the child gets it.

    `directory` is the attempt's own local folder; Inspect's logs go to `directory`/logs. `samples` is for `run`: all of the
    execution's, for Inspect resumes only what has the same samples as before; `digests` are theirs, as planned (none: by a
    Proctor that kept none); `scored` are those among them that have their
    result; `resumes` is the earlier attempt whose logs and checkpoints lie in the folder already. For `report`: `plan_log`
    (address), `transcripts`, and `artifacts`, the address below which all attempts' folders lie (None: none is kept, and the
    merged log goes to `directory`/logs). `prices`: the operator's own.
    """

    kind: Literal["plan", "run", "report"]
    evaluation_id: str
    execution_id: str
    attempt: int
    spec: Spec
    directory: str
    containment: Containment = Containment()
    samples: tuple[SampleRef, ...] = ()
    digests: tuple[int, ...] = ()
    scored: tuple[SampleRef, ...] = ()
    resumes: int | None = None
    plan_log: str | None = None
    transcripts: tuple[Transcript, ...] = ()
    prices: OwnPrices = Field(default_factory=dict)
    artifacts: str | None = None


class Failure(_Value):
    """Why something failed: one readable sentence, and whose fault it was. `final`: trying again cannot help."""

    error_class: ErrorClass
    message: str
    final: bool = False
    traceback: str | None = None


class ScoreValue(_Value):
    """One scorer's judgement of one sample. `cut`: which of them are only the beginning (`app.runner.excerpt`); the log has
    them whole."""

    value: JsonValue
    answer: str | None = None
    explanation: str | None = None
    cut: tuple[Literal["value", "answer", "explanation"], ...] = Field(default=(), exclude_if=lambda cut: not cut)


class SampleResult(_Value):
    """How one sample ended. `usage`: tokens by model, Inspect's `ModelUsage` without its nulls; of all attempts that went on
    from one another. `cost`: US dollars, where Inspect knows the price. `limit`: the kind of limit that ended the sample.
    `duration`: seconds. `note`: what to know of how the result came about. `log`: the log's file name within the attempt's
    log folder."""

    sample: SampleRef
    scores: dict[str, ScoreValue] = Field(default_factory=dict)
    usage: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    cost: float | None = None
    limit: str | None = None
    error: Failure | None = None
    duration: float | None = None
    note: str | None = None
    log: str


class Started(_Value):
    """The child runs. `versions`: packages that decide what a result means."""

    type: Literal["started"] = "started"
    pid: int
    versions: dict[str, str]


class Spent(_Value):
    """Tokens, and US dollars where Inspect knows the price."""

    tokens: int = 0
    cost: float = 0.0


class Progress(_Value):
    """Counts since the attempt began. `model_calls` and `tokens` grow; `step` says what happens now, for people.
    `providers`: what was spent at each model provider, for the metrics."""

    type: Literal["progress"] = "progress"
    samples_done: int = 0
    model_calls: int = 0
    tokens: int = 0
    cost: float = 0.0
    providers: dict[str, Spent] = Field(default_factory=dict)
    step: str = ""


NOT_KEPT = {"type", "providers"}
"""What of a progress does not go into the ledger."""


class Listed(_Value):
    """More of the plan's samples and digests than one message takes; `Planned` brings the last, after all others."""

    type: Literal["listed"] = "listed"
    samples: tuple[SampleRef, ...] = ()
    digests: tuple[int, ...] = ()


class Planned(_Value):
    """The samples that are to run, in the dataset's order, epoch by epoch. `digests`: of the dataset's samples
    (`app.runner.digest`), the same for each epoch. `whole`: they must be one execution, because the task stops early by
    itself or makes its samples as it goes. `log`: the plan's log file. `error_limit`: errored samples at which no further
    one shall start; None: any number. `task_version`: the task's own word on it."""

    type: Literal["planned"] = "planned"
    task: str
    samples: tuple[SampleRef, ...]
    digests: tuple[int, ...] = ()
    whole: bool
    log: str
    error_limit: int | None = None
    task_version: str | None = None


class Prepared(_Value):
    """The samples are about to run. `no_checkpoints`: why their state is not saved, if it is not. `task_version`: the task's
    own word on it. `whole`: the task decides by itself which of them end."""

    type: Literal["prepared"] = "prepared"
    no_checkpoints: str | None = None
    task_version: str | None = None
    whole: bool = False


class Paused(_Value):
    """Told to wind down, every sample that runs has saved its state and waits: nothing is lost by stopping now."""

    type: Literal["paused"] = "paused"


class Waiting(_Value):
    """A sample waits for its turn to use a sandbox, and has for long: the time will be missing to it."""

    type: Literal["waiting"] = "waiting"


class Checkpointed(_Value):
    """A sample can now resume from here: Inspect has committed checkpoint `number` to the attempt's log folder."""

    type: Literal["checkpointed"] = "checkpointed"
    sample: SampleRef
    number: int


class SampleEnded(_Value):
    type: Literal["sample_ended"] = "sample_ended"
    result: SampleResult


SLIM_BECAUSE = "log_without_transcripts"
"""Beside what Inspect's `EvalResults` hold: why the merged log has no transcripts, where it has none."""


class Packed(_Value):
    """Of the samples of a report's merged log, so many more are in the store where the next attempt finds them."""

    type: Literal["packed"] = "packed"
    samples: int


class Reported(_Value):
    """The evaluation's end: `results` is Inspect's `EvalResults` as JSON; `failure` is set if too many samples errored.
    `log`: the merged log's file name in the attempt's folder."""

    type: Literal["reported"] = "reported"
    results: dict[str, Any]
    usage: dict[str, dict[str, JsonValue]]
    failure: Failure | None = None
    log: str


class WriterFailed(_Value):
    """The child can tell nothing more, for the `reason` given, and ends at once: what it went on to spend would be lost."""

    type: Literal["writer_failed"] = "writer_failed"
    reason: str


class Done(_Value):
    """The last message. Nothing follows it; without it, the child crashed."""

    type: Literal["done"] = "done"
    failure: Failure | None = None


Message = Annotated[
    Started
    | Progress
    | Prepared
    | Listed
    | Planned
    | Checkpointed
    | Paused
    | Waiting
    | SampleEnded
    | Packed
    | Reported
    | WriterFailed
    | Done,
    Field(discriminator="type"),
]
MESSAGE: TypeAdapter[Message] = TypeAdapter(Message, config=ConfigDict(hide_input_in_errors=True))
