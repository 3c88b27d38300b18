"""By which versions each attempt was made; and what of an ended evaluation is still kept.

Revision ID: 0003
Revises: 0002
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0003"
down_revision: str | None = "0002"
serves_from: str = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

COLUMNS = (
    ("execution_attempts", "versions", postgresql.JSONB()),
    ("evaluations", "mixed_versions", postgresql.JSONB()),
    ("evaluations", "retention_lease", sa.DateTime(timezone=True)),
    ("evaluations", "transcripts_expired_at", sa.DateTime(timezone=True)),
    ("evaluations", "transcripts_deleted_at", sa.DateTime(timezone=True)),
    ("evaluations", "checkpoints_deleted_at", sa.DateTime(timezone=True)),
)
INDEXES = {
    "evaluations_transcripts_idx": "transcripts_deleted_at IS NULL",
    "evaluations_checkpoints_idx": "checkpoints_deleted_at IS NULL",
}


def upgrade() -> None:
    for table, name, kind in COLUMNS:
        op.add_column(table, sa.Column(name, kind), if_not_exists=True)
    with op.get_context().autocommit_block():
        for name, where in INDEXES.items():
            op.drop_index(name, if_exists=True, postgresql_concurrently=True)  # an invalid one, left behind
            op.create_index(
                name, "evaluations", ["finished_at"], postgresql_where=sa.text(where), postgresql_concurrently=True
            )


def downgrade() -> None:
    for name in INDEXES:
        op.drop_index(name, "evaluations")
    for table, name, _ in COLUMNS:
        op.drop_column(table, name)
