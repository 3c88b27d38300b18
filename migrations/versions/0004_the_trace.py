"""The trace of an evaluation, for the Cloud Tasks that are made for it later and by others.

Revision ID: 0004
Revises: 0003
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
serves_from: str = "0001"  # code that knows nothing of the column runs on
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("evaluations", sa.Column("traceparent", sa.Text()))


def downgrade() -> None:
    op.drop_column("evaluations", "traceparent")
