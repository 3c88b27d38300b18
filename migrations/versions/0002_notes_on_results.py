"""What to know of how a result came about: resumed, or begun again, and why.

Revision ID: 0002
Revises: 0001
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
serves_from: str = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("sample_results", sa.Column("note", sa.Text()))


def downgrade() -> None:
    op.drop_column("sample_results", "note")
