"""How many errored samples an evaluation may have, and that it was stopped because it had more.

Revision ID: 0007
Revises: 0006
"""

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
serves_from: str = "0001"  # code that knows nothing of the columns runs on
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

COLUMNS: tuple[tuple[str, str, sa.types.TypeEngine[Any], dict[str, Any]], ...] = (
    ("evaluations", "error_limit", sa.Integer(), {}),
    ("evaluations", "stopped_at", sa.DateTime(timezone=True), {}),
    ("evaluations", "stop_reason", sa.Text(), {}),
    ("task_executions", "errored", sa.Integer(), {"nullable": False, "server_default": "0"}),
)


def upgrade() -> None:
    for table, name, kind, more in COLUMNS:
        op.add_column(table, sa.Column(name, kind, **more))


def downgrade() -> None:
    for table, name, _, _ in COLUMNS:
        op.drop_column(table, name)
