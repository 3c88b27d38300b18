"""The tables, and the CHECKs that refuse impossible rows. `migrations/` builds the same; a test compares the two.

                    claim (attempt + 1)              settle
         pending ─────────────────────► running ─────────────────► succeeded | failed | cancelled
            ▲                            │   ▲ │                        │
            │  settle: interrupted, or   │   └─┘ claim by another       │
            └── failed with tries left ──┘       once the lease is over │
            └──────────────── retry of the evaluation ──────────────────┘

State lives once: an evaluation's progress is counted from its executions, a sample's state is its execution's until it
has a result. Every time is the database's clock.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
    }
)

EVALUATION_STATES = ("running", "succeeded", "failed", "cancelled")
EXECUTION_STATES = ("pending", "running", "succeeded", "failed", "cancelled")
TERMINAL = ("succeeded", "failed", "cancelled")
OUTCOMES = ("succeeded", "failed", "cancelled", "interrupted")
KINDS = ("plan", "run", "report")


def _in(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(v) for v in values)})"


def _instant(name: str, *, default: bool = False) -> Column[object]:
    now = func.clock_timestamp() if default else None
    return Column(name, DateTime(timezone=True), server_default=now, nullable=not default)


# ids sort by bytes, so that many rows are locked in the same order whatever the server's locale
EXECUTION_ID = Text(collation="C")

evaluations = Table(
    "evaluations",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("created_by", Text, nullable=False),
    Column("idempotency_key", Text, nullable=False),  # the evaluation's own id where the caller gave none
    Column("spec", JSONB, nullable=False),
    Column("spec_digest", Text, nullable=False),
    Column("state", Text, nullable=False, server_default="running"),
    # plan and run executions that are not terminal yet: whoever brings it to 0 inserts the report
    Column("remaining", Integer, nullable=False, server_default="1"),
    _instant("cancel_requested_at"),
    Column("results", JSON),  # Inspect's EvalResults; not jsonb, which would forget the order of the metrics
    Column("usage", JSONB),  # tokens by model, of the samples that count
    Column("error", JSONB),
    Column("log", Text),  # URL of the merged Inspect log
    Column("versions", JSONB),
    Column("mixed_versions", JSONB),  # where the attempts behind its results were not made alike; none: they were
    _instant("created_at", default=True),
    _instant("finished_at"),
    _instant("retention_lease"),  # until when a sweep deletes what it no longer keeps
    _instant("transcripts_expired_at"),  # from then on its logs are being deleted, and it cannot be retried
    _instant("transcripts_deleted_at"),
    _instant("checkpoints_deleted_at"),
    # errored samples at which no further run shall start; none: any number
    Column("error_limit", Integer),
    _instant("stopped_at"),  # they were reached then
    Column("stop_reason", Text),
    Column("traceparent", Text),  # W3C's, of the span in which it was submitted
    UniqueConstraint("created_by", "idempotency_key"),
    CheckConstraint(_in("state", EVALUATION_STATES), name="state"),
    CheckConstraint("remaining >= 0", name="remaining"),
    CheckConstraint("(state = 'running') = (finished_at IS NULL)", name="finished"),
    CheckConstraint("state = 'running' OR remaining = 0", name="ended"),
    Index("evaluations_newest_idx", text("created_at DESC"), text("id DESC")),
    Index("evaluations_state_idx", "state", text("created_at DESC"), text("id DESC")),
    Index(
        "evaluations_tags_idx",
        text("(spec -> 'tags') jsonb_path_ops"),
        postgresql_using="gin",
    ),
    Index("evaluations_transcripts_idx", "finished_at", postgresql_where=text("transcripts_deleted_at IS NULL")),
    Index("evaluations_checkpoints_idx", "finished_at", postgresql_where=text("checkpoints_deleted_at IS NULL")),
)

task_executions = Table(
    "task_executions",
    metadata,
    Column("id", EXECUTION_ID, primary_key=True),  # <evaluation>.plan, <evaluation>.<n>, <evaluation>.report
    Column("evaluation_id", Uuid, ForeignKey("evaluations.id"), nullable=False),
    Column("kind", Text, nullable=False),
    Column("position", Integer, nullable=False),  # 0 for the plan, then the runs from 1, then the report
    Column("samples", JSONB),  # [{"id": 7, "epoch": 1}, …] of a run
    Column("digests", ARRAY(BigInteger)),  # of these samples, as planned: what each is, not only its name
    Column("state", Text, nullable=False, server_default="pending"),
    Column("attempt", Integer, nullable=False, server_default="0"),  # the fencing token: it only rises
    Column("failures", Integer, nullable=False, server_default="0"),  # charged to the evaluation
    Column("crashes", Integer, nullable=False, server_default="0"),  # take-overs since the last progress
    Column("errored", Integer, nullable=False, server_default="0"),  # its samples whose error is final
    Column("claim_id", Uuid),
    Column("worker", Text),
    _instant("lease_expires_at"),
    Column("progress", JSONB),
    Column("enqueues", Integer, nullable=False, server_default="0"),  # Cloud Tasks made for it, over its life
    _instant("sweep_at"),  # when the sweeper looks at it next
    Column("error", JSONB),
    _instant("created_at", default=True),
    _instant("finished_at"),
    CheckConstraint(_in("kind", KINDS), name="kind"),
    CheckConstraint(_in("state", EXECUTION_STATES), name="state"),
    CheckConstraint("(kind = 'run') = (samples IS NOT NULL)", name="samples"),
    CheckConstraint("(state = 'running') = (lease_expires_at IS NOT NULL)", name="leased"),
    CheckConstraint("(state = 'running') = (claim_id IS NOT NULL)", name="claimed"),
    CheckConstraint("(state = 'running') = (worker IS NOT NULL)", name="held"),
    CheckConstraint(f"({_in('state', TERMINAL)}) = (sweep_at IS NULL)", name="swept"),
    CheckConstraint(f"({_in('state', TERMINAL)}) = (finished_at IS NOT NULL)", name="finished"),
    CheckConstraint("state <> 'running' OR attempt > 0", name="attempted"),
    CheckConstraint("attempt >= 0 AND failures >= 0 AND crashes >= 0 AND enqueues >= 0", name="counts"),
    Index("task_executions_sweep_idx", "sweep_at", postgresql_where=text("state IN ('pending', 'running')")),
    Index("task_executions_evaluation_idx", "evaluation_id", "position"),
    Index("task_executions_state_idx", "evaluation_id", "state"),
)

execution_attempts = Table(
    "execution_attempts",
    metadata,
    Column("execution_id", EXECUTION_ID, ForeignKey("task_executions.id"), primary_key=True),
    Column("attempt", Integer, primary_key=True),
    Column("claim_id", Uuid, nullable=False),
    Column("worker", Text, nullable=False),
    Column("revision", Text, nullable=False),
    Column("push", JSONB),  # the X-CloudTasks-* headers: information, never an identity
    _instant("started_at", default=True),
    _instant("ended_at"),
    Column("outcome", Text),
    Column("error", JSONB),
    Column("usage", JSONB),  # its own last progress
    Column("cost", Double),  # US dollars
    Column("versions", JSONB),  # by name: packages, the task's own version, the container's image
    Column("earlier_versions", JSONB),  # a list of such: of the attempts by whose saved state it went on
    CheckConstraint(_in("outcome", OUTCOMES), name="outcome"),
    CheckConstraint("(outcome IS NULL) = (ended_at IS NULL)", name="ended"),
)

sample_results = Table(
    "sample_results",
    metadata,
    Column("evaluation_id", Uuid, ForeignKey("evaluations.id"), primary_key=True),
    Column("sample_id", Text, primary_key=True),
    Column("epoch", Integer, primary_key=True),
    Column("execution_id", EXECUTION_ID, ForeignKey("task_executions.id"), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("scores", JSONB, nullable=False),
    Column("usage", JSONB, nullable=False),
    Column("cost", Double),  # US dollars
    Column("limit", Text),  # the kind of limit that ended the sample
    Column("error", JSONB),
    Column("duration", Double),  # seconds
    Column("transcript", Text, nullable=False),  # URL of the Inspect log that has the sample whole
    Column("note", Text),  # resumed, or begun again, and why
    _instant("recorded_at", default=True),
    CheckConstraint("epoch > 0", name="epoch"),
)
