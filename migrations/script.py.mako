"""${message}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
"""
# The order of a deploy: this runs first, while the revision before still serves and may be started again; then the new
# code is deployed. So a change comes in two parts, with a deploy between them:
#
# expand    Add what the new code needs, so that the code before runs on: columns that may be null or have a constant
#           default, tables, indexes (CONCURRENTLY, see below), constraints that are NOT VALID and validated by a later
#           migration. `serves_from` is that of the migration before. A new table needs a GRANT to the service's user.
# contract  Once no revision that needs it serves any more: drop, rename, forbid null, change a type. `serves_from` is then
#           the oldest revision whose code does without; code before that is refused at its start.
#
# Rows are not rewritten here, but by the code as it meets them, or in small batches afterwards.
#
# Each migration is one transaction in which a lock is waited for and a statement may last for some seconds only
# (app.database.migrate.BRIEF, set for each by env.py); a lock not had in time is tried again. What takes longer, and locks
# nobody out, goes outside the transaction. It may end half-way and is then run again whole:
#
#     with op.get_context().autocommit_block():
#         op.drop_index("table_column_idx", if_exists=True, postgresql_concurrently=True)  # an invalid one, left behind
#         op.create_index("table_column_idx", "table", ["column"], postgresql_concurrently=True)
#
# and whatever comes before that block is written to be harmless the second time (`if_not_exists=True`).

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision: str = ${repr(up_revision)}
down_revision: str | None = ${repr(down_revision)}
serves_from: str = ""  # the oldest revision whose code runs on these tables: that of the migration before, unless this contracts
branch_labels: str | Sequence[str] | None = ${repr(branch_labels)}
depends_on: str | Sequence[str] | None = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
