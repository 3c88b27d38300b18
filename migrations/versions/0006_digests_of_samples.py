"""What each sample of a run was when it was planned.

Revision ID: 0006
Revises: 0005
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0006"
down_revision: str | None = "0005"
serves_from: str = "0001"  # code that knows nothing of the column runs on
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("task_executions", sa.Column("digests", postgresql.ARRAY(sa.BigInteger())))


def downgrade() -> None:
    op.drop_column("task_executions", "digests")
