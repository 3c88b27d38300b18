"""What the database complains of may be logged with its stack, and does not quote the data."""

from typing import Any

import pytest
import structlog
from sqlalchemy import TextClause, bindparam, text
from sqlalchemy.dialects.postgresql import JSONB

from app.database.session import Database
from app.settings import Settings
from tests.logged import logged

log = structlog.get_logger(__name__)

UNIQUE = text("""
INSERT INTO evaluations (id, created_by, idempotency_key, spec, spec_digest, state)
VALUES (gen_random_uuid(), 'me', :value, :spec, '', 'no such state')
""").bindparams(bindparam("spec", type_=JSONB()))


@pytest.mark.parametrize(
    ("statement", "parameters", "complaint"),
    [
        (UNIQUE, {"spec": {"task_args": {"prompt": "SECRET"}}, "value": "SECRET\nSECRET"}, "violates check constraint"),
        (text("SELECT CAST(:value AS int) + 1"), {"value": "SECRET"}, "invalid input for query argument"),
        (text("SELECT CAST(CAST(:value AS text) AS jsonb)"), {"value": "{SECRET"}, "invalid input syntax"),
        (text("SELECT CAST(CAST(:value AS text) AS uuid)"), {"value": "SECRET"}, "invalid input syntax"),
    ],
)
async def test_an_error_of_the_database_does_not_quote_what_it_was_given(
    database: Database, settings: Settings, statement: TextClause, parameters: dict[str, Any], complaint: str
) -> None:
    with logged(settings) as logs:
        try:
            await database.run(statement, parameters)
        except Exception:
            log.exception("it failed")
    assert complaint in logs.text
    assert "SECRET" not in logs.text
