"""By which versions the state was made that an attempt went on from.

Revision ID: 0005
Revises: 0004
"""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision: str = "0005"
down_revision: str | None = "0004"
serves_from: str = "0001"  # code that knows nothing of the column runs on
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("execution_attempts", sa.Column("earlier_versions", postgresql.JSONB()))


def downgrade() -> None:
    op.drop_column("execution_attempts", "earlier_versions")
