"""`proctor setup`: what it makes, with which rights, and that twice is once."""

import json
import re
import subprocess
from importlib import resources
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import asyncpg
import pytest

from app import settings
from app.cloud import budget, gcloud, queues
from app.cloud.gcloud import GcloudFailed
from app.cloud.place import Place, PlaceError, load, save
from app.cloud.plan import database_statements, plan
from app.cloud.service import Service
from app.cloud.steps import Remark, Step, shell, take
from app.database.migrate import migrate_async, newest_revision
from tests.cloud import discovery
from tests.cloud.conftest import Gcloud
from tests.cloud.real_gcloud import refused
from tests.conftest import of_database

ACCOUNTS = "serviceAccount:{}@my-project.iam.gserviceaccount.com"


@pytest.fixture
def steps(place: Place, described: Service) -> list[Step | Remark]:
    return plan(place, described)


def _taken(steps: list[Step | Remark]) -> list[Step]:
    return [step for step in steps if isinstance(step, Step)]


def _commands(steps: list[Step | Remark]) -> list[list[str]]:
    return [list(argv) for step in _taken(steps) for argv in (step.check, step.create, step.update) if argv]


def _remember(gcloud: Gcloud, steps: list[Step | Remark]) -> None:
    """From now on what a step makes is there for its check."""
    for number, step in enumerate(_taken(steps)):
        if step.check is not None:
            gcloud.answer(step.create, makes=f"made-{number}")
            gcloud.answer(step.check, "it\n", needs=f"made-{number}")


def test_gcloud_takes_every_command(steps: list[Step | Remark], tmp_path: Path) -> None:
    assert refused(_commands(steps), tmp_path) == {}


def _expected(steps: list[Step | Remark]) -> tuple[list[list[str]], list[list[str]]]:
    """What is to be said the first time, and what the second."""
    first, second = [], []
    for step in _taken(steps):
        check = [list(step.check)] if step.check else []
        first += [*check, list(step.create)]
        second += [*check, *([list(step.update)] if step.update else [] if check else [list(step.create)])]
    return first, second


def test_applied_twice_it_makes_nothing_again(gcloud: Gcloud, steps: list[Step | Remark]) -> None:
    first, second = _expected(steps)
    made = [step.create for step in _taken(steps) if step.check]
    assert len(made) > 10
    assert [argv for argv in second if argv in made] == []

    _remember(gcloud, steps)
    told: list[str] = []
    for _ in range(2):
        take(steps, told.append)
    assert [call.argv for call in gcloud.calls] == first + second
    assert len([line for line in told if line.startswith("created")]) == len(made)


def test_it_stops_at_what_fails_and_goes_on_from_there(gcloud: Gcloud, steps: list[Step | Remark]) -> None:
    broken = next(step for step in _taken(steps) if step.title == "Queue proctor")
    gcloud.answer(broken.create, code=1, err="PERMISSION_DENIED")
    with pytest.raises(GcloudFailed, match=r"gcloud tasks queues create proctor .*: PERMISSION_DENIED"):
        take(steps, lambda _: None)
    assert gcloud.calls[-1].argv == list(broken.create)


def test_what_is_printed_is_shell_that_does_the_same(gcloud: Gcloud, steps: list[Step | Remark]) -> None:
    first, second = _expected(steps)
    _remember(gcloud, steps)
    for _ in range(2):
        subprocess.run(["bash", "-euc", "\n".join(shell(steps))], check=True)
    assert [call.argv for call in gcloud.calls] == first + second


def _roles(steps: list[Step | Remark], account: str) -> set[tuple[str, str]]:
    """Role and what it is on."""
    member = f"--member={ACCOUNTS.format(account)}"
    bindings = [list(s.create) for s in _taken(steps) if member in s.create]
    found = set()
    for argv in bindings:
        at = argv.index("add-iam-policy-binding")
        role = next(a for a in argv if a.startswith("--role=")).removeprefix("--role=roles/")
        found.add((role, f"{argv[at - 1]} {argv[at + 1]}".replace(".iam.gserviceaccount.com", "")))
    return found


def test_each_account_has_no_more_rights_than_it_needs(steps: list[Step | Remark]) -> None:
    assert _roles(steps, "proctor-queue") == {("run.invoker", "services proctor")}
    assert _roles(steps, "proctor-worker") == {
        ("alloydb.client", "projects my-project"),
        ("alloydb.databaseUser", "projects my-project"),
        ("serviceusage.serviceUsageConsumer", "projects my-project"),
        ("telemetry.metricsWriter", "projects my-project"),
        ("telemetry.tracesWriter", "projects my-project"),
        ("cloudtasks.enqueuer", "queues proctor"),
        ("cloudtasks.viewer", "queues proctor"),
        ("iam.serviceAccountUser", "service-accounts proctor-queue@my-project"),
        ("secretmanager.secretAccessor", "secrets proctor-anthropic-api-key"),
        ("secretmanager.secretAccessor", "secrets proctor-openai-api-key"),
        ("storage.objectUser", "buckets gs://my-project-proctor"),
    }
    assert _roles(steps, "proctor-build") == {
        ("artifactregistry.writer", "repositories proctor"),
        ("iam.serviceAccountOpenIdTokenCreator", "service-accounts proctor-build@my-project"),
        ("iam.serviceAccountUser", "service-accounts proctor-worker@my-project"),
        ("logging.logWriter", "projects my-project"),
        ("run.developer", "projects my-project"),
        ("run.invoker", "services proctor"),
        ("storage.objectViewer", "buckets gs://my-project-proctor-build"),
    }


def test_no_secrets_value_is_on_a_command_line(steps: list[Step | Remark]) -> None:
    secrets = [argv for argv in _commands(steps) if argv[0] == "secrets"]
    assert {argv[1] for argv in secrets} == {"create", "describe", "add-iam-policy-binding"}
    assert not any("--data-file" in word or "--password" in word for argv in _commands(steps) for word in argv)


async def test_what_the_superuser_is_told_to_say_lets_the_worker_migrate(place: Place, postgres: str) -> None:
    """The worker's own user has a password here, in place of IAM, and the database another name."""
    database, user = f"cloud_{uuid4().hex}", place.database_user
    making, granting, inside = (line.replace("proctor;", f"{database};") for line in database_statements(user))
    granting = granting.replace("DATABASE proctor", f"DATABASE {database}")
    await _say(postgres, f"CREATE USER \"{user}\" PASSWORD 'x'", making, granting)
    await _say(of_database(postgres, database), inside)
    server = postgres.rpartition("@")[2].rpartition("/")[0]
    before, after = await migrate_async(settings.load(database_url=f"postgresql://{quote(user)}:x@{server}/{database}"))
    assert (before, after) == ("", newest_revision())
    await _say(postgres, f"DROP DATABASE {database}", f'DROP USER "{user}"')


async def _say(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def test_the_queue_keeps_delivering(steps: list[Step | Remark], described: Service) -> None:
    (queue,) = (step for step in _taken(steps) if step.title == "Queue proctor")
    flags = [
        "--max-attempts=-1",
        "--max-retry-duration=0s",
        "--min-backoff=5s",
        "--max-backoff=60s",
        "--max-doublings=4",
    ]
    assert queue.update is not None
    for argv in (queue.create, queue.update):
        assert [flag for flag in flags if flag not in argv] == []
        assert f"--max-concurrent-dispatches={budget.concurrent_dispatches(described)}" in argv


def test_several_queues_dispatch_no_more_than_one_would(place: Place, described: Service, tmp_path: Path) -> None:
    names = ("anthropic", "openai", "other")
    argvs = [a for a in _commands(plan(place, described, names)) if a[:3] == ["tasks", "queues", "create"]]
    assert [argv[3] for argv in argvs] == list(names)
    shares = [int(m[1]) for argv in argvs if (m := re.search(r"max-concurrent-dispatches=(\d+)", " ".join(argv)))]
    assert sum(shares) == sum(queues.shares(names, 280).values()) == budget.concurrent_dispatches(described)


def test_the_sweeper_calls_every_minute_as_the_queues_account(steps: list[Step | Remark], place: Place) -> None:
    (sweeper,) = (step for step in _taken(steps) if "every minute" in step.title)
    assert "--schedule=* * * * *" in sweeper.create
    assert f"--uri={place.service_url}/tasks/sweep" in sweeper.create
    assert f"--oidc-service-account-email={place.invoker}" in sweeper.create
    assert f"--oidc-token-audience={place.service_url}" in sweeper.create


@pytest.mark.parametrize("name", ["bucket_lifecycle.json", "sources_lifecycle.json"])
def test_a_buckets_lifecycle_is_one_that_cloud_storage_knows(name: str) -> None:
    rules = json.loads(resources.files("app.cloud").joinpath(name).read_text())
    assert discovery.problems(discovery.strict("storage.v1"), "Bucket", {"lifecycle": rules}) == []
    rules["rule"][0]["condition"]["agee"] = 1
    assert len(discovery.problems(discovery.strict("storage.v1"), "Bucket", {"lifecycle": rules})) == 1


def test_values_are_kept_in_a_file(place: Place, tmp_path: Path) -> None:
    save(place, tmp_path / "deploy.env")
    assert load(tmp_path / "deploy.env") == place


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("REGION=us-central1", "REGION=mars"), "REGION: 'mars' is not one"),
        (("PROJECT=my-project\n", ""), "PROJECT: is missing"),
        (("REGION=", "REGOIN="), "REGION: is missing; REGOIN: there is no such value"),
        (("BUCKET=my-", "BUCKET=My-"), "BUCKET: 'My-project-proctor' is not one"),
    ],
)
def test_a_wrong_value_is_named(change: tuple[str, str], says: str, place: Place, tmp_path: Path) -> None:
    file = tmp_path / "deploy.env"
    save(place, file)
    file.write_text(file.read_text().replace(*change))
    with pytest.raises(PlaceError, match=f"{re.escape(str(file))}: {re.escape(says)}"):
        load(file)


def test_a_machine_without_gcloud_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(gcloud.GcloudMissing, match="install the Google Cloud CLI"):
        gcloud.run(["version"])
