"""Migrating never stops service: it waits for nobody for long, and the code that serves meanwhile runs on."""

import asyncio
import io
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from subprocess import PIPE

import asyncpg
import pytest
from alembic import command
from alembic.config import Config
from alembic.script import Script, ScriptDirectory
from sqlalchemy import text

from app.database.migrate import BRIEF, MIGRATIONS, config, migrate_async, newest_revision
from app.database.session import Database
from app.errors import DatabaseUnavailable
from app.settings import load

CONTRACTS = {
    "adding-not-nullable-field",
    "adding-required-field",
    "ban-drop-column",
    "ban-drop-database",
    "ban-drop-not-null",
    "ban-drop-table",
    "ban-truncate-cascade",
    "changing-column-type",
    "renaming-column",
    "renaming-table",
}
"""Squawk's rules for what older code does not survive: for a migration that says so by its `serves_from`."""

OF_NO_CONCERN = {
    "prefer-bigint-over-int",
    "prefer-bigint-over-smallint",
    "prefer-text-field",  # alembic's own table has it
    "prefer-robust-stmts",  # a migration is a transaction; for what is outside, see script.py.mako
    "require-lock-timeout",  # env.py sees to these two
    "require-statement-timeout",
}

PATIENCE = 60


# What a migration may hold --------------------------------------------------------------------------------------------


def scripts(of: Config) -> list[Script]:
    """The oldest first."""
    return list(ScriptDirectory.from_config(of).walk_revisions())[::-1]


def oldest_served(script: Script) -> str:
    return str(script.module.serves_from)


def complaints(of: Config) -> Iterator[str]:
    """Against the migrations, one sentence each."""
    known: list[str] = []
    served = ""
    for script in scripts(of):
        name, before = script.revision, served
        served = oldest_served(script)
        if known and served not in known:
            yield f"{name} serves no revision before it: the code that runs while it is migrated stops"
        if before and served in known and known.index(served) < known.index(before):
            yield f"{name} says that it serves {served}, which {known[-1]} did not"
        found = squawk(sql(of, f"{known[-1] if known else 'base'}:{name}")) - OF_NO_CONCERN
        if locks := found - CONTRACTS:
            yield f"{name} stops service: {', '.join(sorted(locks))}"
        if (contracts := found & CONTRACTS) and served == before:
            yield f"{name} contracts and says that it does not: {', '.join(sorted(contracts))}"
        known.append(name)


def sql(of: Config, steps: str) -> str:
    of.output_buffer = io.StringIO()
    command.upgrade(of, steps, sql=True)
    return str(of.output_buffer.getvalue())


def squawk(statements: str) -> set[str]:
    """The rules that they break."""
    run = [str(Path(sys.executable).with_name("squawk")), "--reporter", "json", "--pg-version", "15.0"]
    told = subprocess.run(run, input=statements, capture_output=True, text=True, check=False)
    return {str(broken["rule_name"]) for broken in json.loads(told.stdout)}


def test_no_migration_stops_service() -> None:
    assert list(complaints(config())) == []


def added(folder: Path, body: str, *, revision: str = "9999", serves: str = "0001") -> Config:
    """Our migrations, and behind them one more."""
    (folder / f"{revision}.py").write_text(
        f"from alembic import op\nrevision, down_revision, serves_from = {revision!r}, {newest_revision()!r}, {serves!r}\n"
        f"def upgrade():\n    {body}\n"
    )
    ours = config()
    ours.set_main_option("script_location", str(MIGRATIONS))
    ours.set_main_option("path_separator", "os")
    ours.set_main_option("version_locations", os.pathsep.join([str(MIGRATIONS / "versions"), str(folder)]))
    ours.toml_file_name = None
    return ours


@pytest.mark.parametrize(
    ("body", "serves", "expected"),
    [
        ('op.execute("ALTER TABLE evaluations ADD COLUMN more text")', "0001", ""),
        ('op.execute("ALTER TABLE evaluations DROP COLUMN log")', "0001", "contracts and says that it does not"),
        ('op.execute("ALTER TABLE evaluations RENAME COLUMN log TO url")', "0001", "renaming-column"),
        ('op.execute("ALTER TABLE evaluations ADD COLUMN more int NOT NULL")', "0001", "adding-required-field"),
        ('op.execute("ALTER TABLE evaluations ALTER COLUMN log TYPE json")', "0001", "changing-column-type"),
        ('op.execute("ALTER TABLE evaluations DROP COLUMN log")', "0002", ""),
        ('op.execute("CREATE INDEX i ON evaluations (log)")', "0002", "stops service: require-concurrent-index"),
        ("op.execute(\"ALTER TABLE evaluations ADD CHECK (log <> '')\")", "0001", "constraint-missing-not-valid"),
        ("pass", "9999", "serves no revision before it"),
    ],
)
def test_what_does_is_found(tmp_path: Path, body: str, serves: str, expected: str) -> None:
    found = list(complaints(added(tmp_path, body, serves=serves)))
    assert [expected in complaint for complaint in found] == ([True] if expected else [])


# How it waits ---------------------------------------------------------------------------------------------------------

ALTER = 'op.execute("/* the migration */ ALTER TABLE evaluations ADD COLUMN more text")'


@pytest.fixture
async def other(database_url: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def test_a_migration_waits_briefly_and_comes_again_and_others_do_not_queue_behind_it(
    database_url: str,
    database: Database,
    other: "asyncpg.Connection[asyncpg.Record]",
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(BRIEF, "lock_timeout", 0.2)
    settings, more = load(database_url=database_url), added(tmp_path, ALTER)
    transaction = other.transaction()
    await transaction.start()
    await other.execute("SELECT FROM evaluations")  # a long report by hand, say

    with pytest.raises(DatabaseUnavailable, match="a transaction that lasts, end it, and run `proctor migrate` again"):
        await migrate_async(settings, scripts=more, patience=0.1)

    again = asyncio.create_task(migrate_async(settings, scripts=more, patience=PATIENCE))
    async with asyncio.timeout(PATIENCE):
        await waiting(database)
        assert await database.run(text("SELECT count(*) FROM evaluations"), patience=0) == [(0,)]
        assert not again.done()
        await transaction.rollback()
        assert await again == (newest_revision(), "9999")
    assert await other.fetchval("SELECT count(more) FROM evaluations") == 0


async def test_a_migration_that_takes_long_is_undone_and_says_so(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BRIEF, "statement_timeout", 0.1)
    slow = added(tmp_path, f'{ALTER}\n    op.execute("SELECT pg_sleep(60)")')
    with pytest.raises(DatabaseUnavailable, match="took longer than it may while others serve"):
        await migrate_async(load(database_url=database_url), scripts=slow)
    assert await migrate_async(load(database_url=database_url)) == (newest_revision(), newest_revision())


async def waiting(database: Database) -> None:
    """Returns when the migration has queued for its lock."""
    queued = text(
        "SELECT count(*) AS n FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '/* the migration%'"
    )
    while not (await database.run(queued))[0].n:
        await asyncio.sleep(0.005)


# What serves meanwhile ------------------------------------------------------------------------------------------------


def earlier_code() -> str | None:
    """The newest commit whose tables are those before the newest migration."""
    newest, before = (f"migrations/versions/{Path(s.path).name}" for s in scripts(config())[:-3:-1])
    for commit in git("rev-list", "--full-history", "HEAD", "--", "migrations/versions").split():
        for parent in git("rev-parse", f"{commit}^@").split():
            files = git("ls-tree", "-r", "--name-only", parent, "migrations/versions").split()
            if before in files and newest not in files:
                return parent
    return None


def git(*arguments: str) -> str:
    """Nothing where there is no history: no git, an unpacked archive, a shallow clone."""
    try:
        told = subprocess.run(["git", *arguments], cwd=MIGRATIONS.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return told.stdout if told.returncode == 0 else ""


async def test_the_code_of_the_revision_before_runs_on_the_new_tables(database_url: str, tmp_path: Path) -> None:
    commit = earlier_code()
    if commit is None:
        pytest.skip("there is no history here with the code of the revision before (an archive, or a shallow clone)")
    archive = subprocess.run(
        ["git", "archive", commit, "app", "migrations", "pyproject.toml"], cwd=MIGRATIONS.parent, stdout=PIPE
    )
    subprocess.run(["tar", "-x", "-C", tmp_path], input=archive.stdout, check=True)
    lived = subprocess.run(
        [sys.executable, Path(__file__).with_name("life.py"), database_url],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (lived.returncode, lived.stdout.split()) == (0, [str(tmp_path / "app"), "succeeded"]), lived.stderr
