"""The ledger: evaluations, executions, attempts, sample results."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0001"
down_revision: str | None = None
serves_from: str = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "evaluations",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("created_by", sa.Text(), nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("spec", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("spec_digest", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="running", nullable=False),
        sa.Column("remaining", sa.Integer(), server_default="1", nullable=False),
        sa.Column("cancel_requested_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("results", sa.JSON(), nullable=True),
        sa.Column("usage", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("error", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("log", sa.Text(), nullable=True),
        sa.Column("versions", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("(state = 'running') = (finished_at IS NULL)", name=op.f("evaluations_finished_check")),
        sa.CheckConstraint("state = 'running' OR remaining = 0", name=op.f("evaluations_ended_check")),
        sa.CheckConstraint(
            "state IN ('running', 'succeeded', 'failed', 'cancelled')", name=op.f("evaluations_state_check")
        ),
        sa.CheckConstraint("remaining >= 0", name=op.f("evaluations_remaining_check")),
        sa.PrimaryKeyConstraint("id", name=op.f("evaluations_pkey")),
        sa.UniqueConstraint("created_by", "idempotency_key", name=op.f("evaluations_created_by_idempotency_key_key")),
    )
    op.create_index(
        "evaluations_newest_idx",
        "evaluations",
        [sa.literal_column("created_at DESC"), sa.literal_column("id DESC")],
        unique=False,
    )
    op.create_index(
        "evaluations_state_idx",
        "evaluations",
        ["state", sa.literal_column("created_at DESC"), sa.literal_column("id DESC")],
        unique=False,
    )
    op.create_index(
        "evaluations_tags_idx",
        "evaluations",
        [sa.literal_column("(spec -> 'tags') jsonb_path_ops")],
        unique=False,
        postgresql_using="gin",
    )
    op.create_table(
        "task_executions",
        sa.Column("id", sa.Text(collation="C"), nullable=False),
        sa.Column("evaluation_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("samples", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("state", sa.Text(), server_default="pending", nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("crashes", sa.Integer(), server_default="0", nullable=False),
        sa.Column("claim_id", sa.Uuid(), nullable=True),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("progress", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("enqueues", sa.Integer(), server_default="0", nullable=False),
        sa.Column("sweep_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column(
            "created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("(kind = 'run') = (samples IS NOT NULL)", name=op.f("task_executions_samples_check")),
        sa.CheckConstraint("(state = 'running') = (claim_id IS NOT NULL)", name=op.f("task_executions_claimed_check")),
        sa.CheckConstraint(
            "(state = 'running') = (lease_expires_at IS NOT NULL)", name=op.f("task_executions_leased_check")
        ),
        sa.CheckConstraint("(state = 'running') = (worker IS NOT NULL)", name=op.f("task_executions_held_check")),
        sa.CheckConstraint(
            "(state IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)",
            name=op.f("task_executions_finished_check"),
        ),
        sa.CheckConstraint(
            "(state IN ('succeeded', 'failed', 'cancelled')) = (sweep_at IS NULL)",
            name=op.f("task_executions_swept_check"),
        ),
        sa.CheckConstraint("kind IN ('plan', 'run', 'report')", name=op.f("task_executions_kind_check")),
        sa.CheckConstraint("state <> 'running' OR attempt > 0", name=op.f("task_executions_attempted_check")),
        sa.CheckConstraint(
            "state IN ('pending', 'running', 'succeeded', 'failed', 'cancelled')",
            name=op.f("task_executions_state_check"),
        ),
        sa.CheckConstraint(
            "attempt >= 0 AND failures >= 0 AND crashes >= 0 AND enqueues >= 0",
            name=op.f("task_executions_counts_check"),
        ),
        sa.ForeignKeyConstraint(["evaluation_id"], ["evaluations.id"], name=op.f("task_executions_evaluation_id_fkey")),
        sa.PrimaryKeyConstraint("id", name=op.f("task_executions_pkey")),
    )
    op.create_index("task_executions_evaluation_idx", "task_executions", ["evaluation_id", "position"], unique=False)
    op.create_index("task_executions_state_idx", "task_executions", ["evaluation_id", "state"], unique=False)
    op.create_index(
        "task_executions_sweep_idx",
        "task_executions",
        ["sweep_at"],
        unique=False,
        postgresql_where=sa.text("state IN ('pending', 'running')"),
    )
    op.create_table(
        "execution_attempts",
        sa.Column("execution_id", sa.Text(collation="C"), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("claim_id", sa.Uuid(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=False),
        sa.Column("push", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column(
            "started_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=True),
        sa.Column("error", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("usage", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("cost", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "outcome IN ('succeeded', 'failed', 'cancelled', 'interrupted')",
            name=op.f("execution_attempts_outcome_check"),
        ),
        sa.CheckConstraint("(outcome IS NULL) = (ended_at IS NULL)", name=op.f("execution_attempts_ended_check")),
        sa.ForeignKeyConstraint(
            ["execution_id"], ["task_executions.id"], name=op.f("execution_attempts_execution_id_fkey")
        ),
        sa.PrimaryKeyConstraint("execution_id", "attempt", name=op.f("execution_attempts_pkey")),
    )
    op.create_table(
        "sample_results",
        sa.Column("evaluation_id", sa.Uuid(), nullable=False),
        sa.Column("sample_id", sa.Text(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("execution_id", sa.Text(collation="C"), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("scores", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("usage", postgresql.JSONB(astext_type=sa.Text()), nullable=False),
        sa.Column("cost", sa.Double(), nullable=True),
        sa.Column("limit", sa.Text(), nullable=True),
        sa.Column("error", postgresql.JSONB(astext_type=sa.Text()), nullable=True),
        sa.Column("duration", sa.Double(), nullable=True),
        sa.Column("transcript", sa.Text(), nullable=False),
        sa.Column(
            "recorded_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
        sa.CheckConstraint("epoch > 0", name=op.f("sample_results_epoch_check")),
        sa.ForeignKeyConstraint(["evaluation_id"], ["evaluations.id"], name=op.f("sample_results_evaluation_id_fkey")),
        sa.ForeignKeyConstraint(
            ["execution_id"], ["task_executions.id"], name=op.f("sample_results_execution_id_fkey")
        ),
        sa.PrimaryKeyConstraint("evaluation_id", "sample_id", "epoch", name=op.f("sample_results_pkey")),
    )


def downgrade() -> None:
    op.drop_table("sample_results")
    op.drop_table("execution_attempts")
    op.drop_index(
        "task_executions_sweep_idx",
        table_name="task_executions",
        postgresql_where=sa.text("state IN ('pending', 'running')"),
    )
    op.drop_index("task_executions_state_idx", table_name="task_executions")
    op.drop_index("task_executions_evaluation_idx", table_name="task_executions")
    op.drop_table("task_executions")
    op.drop_index("evaluations_tags_idx", table_name="evaluations", postgresql_using="gin")
    op.drop_index("evaluations_state_idx", table_name="evaluations")
    op.drop_index("evaluations_newest_idx", table_name="evaluations")
    op.drop_table("evaluations")
