"""`proctor doctor`: each fault is made for real, and each finding says how to mend it."""

import asyncio
import json
import logging
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import asyncpg
import grpc
import pytest
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.cloud import tasks_v2
from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksGrpcAsyncIOTransport
from google.protobuf.duration_pb2 import Duration
from pydantic import SecretStr
from typer.testing import CliRunner

from app.cli import app
from app.cloud import doctor
from app.cloud.doctor import Finding, examine
from app.local.cloud_tasks import CloudTasksEmulator
from app.local.stack import create_queues
from app.settings import Settings, load

ADDRESS = "https://proctor-1.us-central1.run.app"


@pytest.fixture(scope="module")
async def emulator() -> AsyncIterator[CloudTasksEmulator]:
    async with CloudTasksEmulator() as emulator:
        yield emulator


@pytest.fixture
async def whole(database_url: str, emulator: CloudTasksEmulator, tmp_path: Path) -> Settings:
    """A deployment with nothing wrong: its own database, folder and queue."""
    settings = load(
        database_url=database_url,
        queue=f"projects/my-project/locations/us-central1/queues/{tmp_path.name.replace('_', '-')}",
        queue_endpoint=emulator.endpoint,
        artifacts=f"file://{tmp_path}/artifacts",
        scratch=tmp_path / "scratch",
    )
    await create_queues(settings, min_backoff=5)
    return settings


def _client(channel: Any) -> tasks_v2.CloudTasksAsyncClient:
    return tasks_v2.CloudTasksAsyncClient(transport=CloudTasksGrpcAsyncIOTransport(channel=channel))


async def _tell(settings: Settings, call: Callable[[tasks_v2.CloudTasksAsyncClient], Awaitable[Any]]) -> None:
    assert settings.queue_endpoint is not None
    async with grpc.aio.insecure_channel(settings.queue_endpoint) as channel:
        await call(_client(channel))


async def _database(settings: Settings, clock: doctor.Clock = time.time) -> dict[str, Finding]:
    return {finding.check: finding for finding in await doctor.check_database(settings, clock)}


async def test_a_whole_deployment_has_nothing_wrong(whole: Settings) -> None:
    """The queue is the local system's, so that and DESIGN's retry settings are one."""
    found = await examine(whole)
    assert [f.check for f in found] == [
        *("database", "clock", "schema", "connections", "queue", "artifacts", "sandbox", "restic", "pushes", "identity")
    ]
    wrong = [f for f in found if not f.ok]
    assert wrong == []
    assert [f.mend for f in found if f.mend] == []


# The database ---------------------------------------------------------------------------------------------------------


async def test_a_database_that_is_down_is_told_and_nothing_further_is_asked_of_it(whole: Settings) -> None:
    down = whole.model_copy(update={"database_url": SecretStr("postgresql://proctor:x@127.0.0.1:1/proctor")})
    found = await _database(down)
    assert list(found) == ["database"]
    assert not found["database"].ok
    assert found["database"].mend == "look whether it runs, and at PROCTOR_DATABASE_URL"


async def test_tables_of_another_version_are_told(whole: Settings) -> None:
    assert whole.database_url is not None
    connection = await asyncpg.connect(whole.database_url.get_secret_value())
    await connection.execute("UPDATE alembic_version SET version_num = '0001'")
    assert (await _database(whole))["schema"].says.startswith("The database is at revision 0001, not ")
    await connection.execute("DROP TABLE alembic_version")
    await connection.close()
    found = await _database(whole)
    assert (found["database"].ok, found["schema"].ok) == (True, False)
    assert found["schema"].says == "The database has no tables yet: run `proctor migrate`."
    assert "gcloud run jobs execute proctor-migrate" in (found["schema"].mend or "")


async def test_more_instances_than_the_database_has_connections_for_are_told(whole: Settings) -> None:
    many = whole.model_copy(update={"max_instances": 1000})
    finding = (await _database(many))["connections"]
    assert not finding.ok
    assert "1000 instances × 15 = 15000" in finding.says
    granted = int(finding.says.rsplit(" ", 1)[1])
    assert f"PROCTOR_MAX_INSTANCES to {granted // 15}" in (finding.mend or "")


@pytest.mark.parametrize("off", [-3600, 3600])
async def test_a_wrong_clock_is_told(off: int, whole: Settings) -> None:
    finding = (await _database(whole, clock=lambda: time.time() + off))["clock"]
    assert not finding.ok
    told = re.search(r"differ by (\d+) s", finding.says)
    assert told
    assert int(told[1]) == pytest.approx(3600, abs=60)  # by what the question itself took


# The queue ------------------------------------------------------------------------------------------------------------


async def test_a_missing_queue_is_told_with_the_command_that_makes_it(whole: Settings) -> None:
    gone = whole.model_copy(update={"queue": whole.queue + "-gone"})
    (finding,) = await doctor.check_queue(gone)
    assert finding.says == f"there is no {gone.queue}"
    name = gone.queue.rpartition("/")[2]
    made = f"gcloud tasks queues create {name} --location=us-central1 --project=my-project --max-attempts=-1 "
    assert (finding.mend or "").startswith(made)


async def test_every_queue_that_a_spec_may_name_is_looked_at(whole: Settings) -> None:
    findings = await doctor.check_queue(whole.model_copy(update={"allowed_queues": ("openai",)}))
    assert [(finding.ok, "openai" in finding.says) for finding in findings] == [(True, False), (False, True)]


async def test_a_queue_that_gives_up_or_dispatches_too_much_is_told(whole: Settings) -> None:
    wrong = tasks_v2.Queue(
        name=whole.queue,
        rate_limits=tasks_v2.RateLimits(max_concurrent_dispatches=16),
        retry_config=tasks_v2.RetryConfig(
            max_attempts=100,
            max_retry_duration=Duration(seconds=3600),
            min_backoff=Duration(nanos=100_000_000),
            max_backoff=Duration(seconds=3600),
            max_doublings=16,
        ),
    )
    await _tell(whole, lambda client: client.update_queue(queue=wrong))
    (finding,) = await doctor.check_queue(whole)
    assert finding.says.split("; ") == [
        "max_attempts is 100, not -1",
        "max_retry_duration is 3600, not 0",
        "min_backoff is 0.1, not 5",
        "max_backoff is 3600, not 60",
        "max_doublings is 16, not 4",
        "max_concurrent_dispatches is 16, all instances take 15",
    ]
    assert " update " in (finding.mend or "")
    assert "--max-attempts=-1 --max-retry-duration=0s --min-backoff=5s" in (finding.mend or "")


async def test_a_paused_queue_is_told(whole: Settings) -> None:
    await _tell(whole, lambda client: client.pause_queue(name=whole.queue))
    (finding,) = await doctor.check_queue(whole)
    assert (finding.ok, finding.says) == (False, "it is paused")
    assert (finding.mend or "").startswith("gcloud tasks queues resume ")


async def test_a_queue_that_does_not_answer_is_told(whole: Settings) -> None:
    (finding,) = await doctor.check_queue(whole.model_copy(update={"queue_endpoint": "127.0.0.1:1"}))
    assert finding.says.startswith("Cloud Tasks does not answer: ")
    assert "PROCTOR_QUEUE_ENDPOINT" in (finding.mend or "")


# The artifacts --------------------------------------------------------------------------------------------------------


async def test_a_folder_that_cannot_be_written_is_told(whole: Settings, tmp_path: Path) -> None:
    """Not even root can make files in /proc, or in what is a file."""
    (tmp_path / "file").write_text("")
    for folder in (Path("/proc/proctor"), tmp_path / "file" / "artifacts"):
        (finding,) = await doctor.check_artifacts(whole.model_copy(update={"artifacts": f"file://{folder}"}))
        assert not finding.ok
        assert finding.mend == f"let the service's user write to {folder}"


async def test_nothing_is_left_where_it_was_tried(whole: Settings, tmp_path: Path) -> None:
    (finding,) = await doctor.check_artifacts(whole)
    assert finding.ok
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_artifacts_that_end_with_the_instance_are_told(whole: Settings) -> None:
    (finding,) = await doctor.check_artifacts(whole.model_copy(update={"queue_endpoint": None}))
    assert (finding.ok, finding.mend) == (False, "set PROCTOR_ARTIFACTS to gs://bucket/path")


# Pushes and who they are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"service_url": "http://127.0.0.1:8080"}, "where Cloud Tasks cannot push to"),
        ({"queue_service_account": None}, "pushes carry no token"),
        ({"queue_audience": "proctor"}, "the tokens' audience is proctor"),
    ],
)
async def test_a_push_that_would_be_refused_is_told(change: dict[str, Any], says: str, whole: Settings) -> None:
    right: dict[str, Any] = {
        "queue_endpoint": None,
        "service_url": ADDRESS,
        "queue_service_account": "q@p.iam.gserviceaccount.com",
    }
    right |= {"auth": "iam", "callers": ("@example.com",)}
    assert [f.ok for f in await doctor.check_pushes(whole.model_copy(update=right))] == [True]
    (finding,) = await doctor.check_pushes(whole.model_copy(update=right | change))
    assert (finding.ok, says in finding.says) == (False, True)


@pytest.mark.parametrize(
    ("auth", "callers", "says"),
    [
        ("none", ("@example.com",), "may do everything"),
        ("iam", (), "nobody may use the API"),
        ("iam", ("@a.com",), None),
    ],
)
async def test_a_door_that_is_open_or_walled_up_is_told(
    auth: Literal["iam", "none"], callers: tuple[str, ...], says: str | None, whole: Settings
) -> None:
    told = {"service_url": ADDRESS, "queue_service_account": "q@p.iam.gserviceaccount.com", "auth": auth}
    (finding,) = await doctor.check_pushes(
        whole.model_copy(update={**told, "callers": callers, "queue_endpoint": None})
    )
    assert finding.ok == (says is None)
    assert says is None or says in finding.says


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of proctor-worker, with a key that nobody else knows."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = tmp_path / "credentials.json"
    email = "proctor-worker@my-project.iam.gserviceaccount.com"
    uri = "https://127.0.0.1:1/token"
    account = {"type": "service_account", "client_email": email, "private_key": key.decode(), "token_uri": uri}
    file.write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(file))


@pytest.mark.usefixtures("worker")
async def test_a_database_user_who_is_somebody_else_is_told(whole: Settings) -> None:
    there = "projects/my-project/locations/us-central1/clusters/c/instances/i"
    own = {"database_url": None, "alloydb_instance": there, "alloydb_user": "proctor-worker@my-project.iam"}
    (finding,) = await doctor.check_identity(whole.model_copy(update=own))
    assert (finding.ok, finding.says) == (True, "proctor-worker@my-project.iam.gserviceaccount.com")
    (finding,) = await doctor.check_identity(whole.model_copy(update=own | {"alloydb_user": "ann@example.com"}))
    assert not finding.ok
    assert finding.mend == "set PROCTOR_ALLOYDB_USER to proctor-worker@my-project.iam, or serviceAccountName"


async def test_missing_credentials_are_told(whole: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    (finding,) = await doctor.check_identity(whole.model_copy(update={"queue_endpoint": None}))
    assert not finding.ok
    assert finding.says.startswith("no Google credentials: ")


# The command ----------------------------------------------------------------------------------------------------------


def test_wrong_settings_are_a_finding_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROCTOR_POOL_SIZE", "none")
    monkeypatch.setenv("PROCTOR_DATABASE_URL", "postgresql://u@h/d")
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 1
    (finding,) = json.loads(result.stdout)
    assert (finding["check"], finding["ok"]) == ("settings", False)
    assert "PROCTOR_POOL_SIZE" in finding["says"]


@pytest.fixture
def poor_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where namespaces are refused: the first bubblewrap on the PATH fails. The interpreter is one in another place,
    beside which there is no restic."""
    (tmp_path / "bin").mkdir()
    refuses = tmp_path / "bin" / "bwrap"
    refuses.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    refuses.chmod(0o755)
    python, real = tmp_path / "bin" / "python", Path(sys.executable).resolve()
    python.symlink_to(real)
    (tmp_path / "pyvenv.cfg").write_text(f"home = {real.parent}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(python))


@pytest.fixture
def own_logging() -> Iterator[None]:
    """What the command configures for its process is not for the rest of this one."""
    root, configured = logging.getLogger(), structlog.get_config()
    handlers, level = root.handlers, root.level
    yield
    root.handlers = handlers
    root.setLevel(level)
    structlog.configure(**configured)


@pytest.mark.usefixtures("poor_machine", "own_logging")
async def test_the_command_ends_with_1_and_shows_what_mends(whole: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paused queue, no sandbox and no restic."""
    assert whole.database_url is not None
    monkeypatch.setenv("PROCTOR_DATABASE_URL", whole.database_url.get_secret_value())
    monkeypatch.setenv("PROCTOR_ARTIFACTS", whole.artifacts)
    monkeypatch.setenv("PROCTOR_QUEUE", whole.queue)
    monkeypatch.setenv("PROCTOR_QUEUE_ENDPOINT", str(whole.queue_endpoint))
    await _tell(whole, lambda client: client.pause_queue(name=whole.queue))
    result = await asyncio.to_thread(CliRunner().invoke, app, ["doctor"])
    lines = result.stdout.splitlines()
    wrong = {line.split()[1]: lines[n + 1].strip() for n, line in enumerate(lines) if line.startswith("WRONG")}
    assert (result.exit_code, list(wrong)) == (1, ["queue", "sandbox", "restic"])
    assert wrong["queue"].startswith("→ gcloud tasks queues resume ")
    assert "sandboxLauncher: true" in wrong["sandbox"]
    assert "restic (0.18 or newer" in wrong["restic"]
