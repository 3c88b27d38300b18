"""The plan of `proctor setup`: everything around the service, each with no more rights than it needs.

proctor-worker   the service runs as this: its database, its queues, its bucket, its secrets, tokens of proctor-queue
proctor-queue    pushes and sweeps carry its token: it may call the service, and nothing else
proctor-build    builds, migrates, deploys and calls the service once, for the smoke test
"""

from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path

from app.cloud import budget, queues
from app.cloud.gcloud import Argv
from app.cloud.place import REPOSITORY, SERVICE, SWEEPER, Place
from app.cloud.service import Service
from app.cloud.steps import Remark, Step

APIS = (
    "alloydb",
    "artifactregistry",
    "cloudbuild",
    "cloudscheduler",
    "cloudtasks",
    "compute",
    "iam",
    "iamcredentials",
    "logging",
    "monitoring",
    "run",
    "secretmanager",
    "servicenetworking",
    "storage",
    "telemetry",
)

WORKER_ROLES = (
    "roles/alloydb.client",
    "roles/alloydb.databaseUser",
    "roles/serviceusage.serviceUsageConsumer",
    "roles/telemetry.metricsWriter",
    "roles/telemetry.tracesWriter",
)
"""On the project, for these cannot be given on less. The first three are what AlloyDB's connector and its IAM login ask
for, the others what PROCTOR_TELEMETRY=google does."""

BUILDER_ROLES = ("roles/logging.logWriter", "roles/run.developer")
"""On the project: a job or a service that does not exist yet has no policy of its own."""

PLACEHOLDER = "us-docker.pkg.dev/cloudrun/container/hello"
"""Google's own sample: it stands where the first release will, so that rights can be given on this service alone."""


def plan(place: Place, service: Service, queue_names: tuple[str, ...] = queues.ONE) -> list[Step | Remark]:
    return [
        Step("APIs", ["services", "enable", *(f"{name}.googleapis.com" for name in APIS), _project(place)]),
        *_accounts(place),
        *_images(place),
        *_buckets(place),
        *_secrets(place, service),
        *_database(place),
        *_queues(place, service, queue_names),
        *_service(place),
        *_sweeper(place),
    ]


def _accounts(place: Place) -> Iterator[Step]:
    for email, purpose in (
        (place.worker, "Proctor: the service"),
        (place.invoker, "Proctor: pushes and sweeps"),
        (place.builder, "Proctor: builds and releases"),
    ):
        accounts = ("iam", "service-accounts")
        yield Step(
            f"Service account {email}",
            create=[*accounts, "create", email.partition("@")[0], f"--display-name={purpose}", _project(place)],
            check=[*accounts, "describe", email, "--format=value(email)", _project(place)],
        )
    for email, roles in ((place.worker, WORKER_ROLES), (place.builder, BUILDER_ROLES)):
        for role in roles:
            yield _binding(f"the project {place.project}", ["projects"], place.project, email, role)
    yield _acts_as(
        place, place.worker, on=place.invoker
    )  # Cloud Tasks gives a push the token of none but whom one acts as
    yield _acts_as(place, place.builder, on=place.worker)  # a deployment runs as the worker
    own = "roles/iam.serviceAccountOpenIdTokenCreator"  # the smoke test's token
    yield _binding(place.builder, ["iam", "service-accounts"], place.builder, place.builder, own, _project(place))


def _images(place: Place) -> Iterator[Step]:
    repositories, where = ("artifacts", "repositories"), [f"--location={place.region}", _project(place)]
    yield Step(
        f"Image repository {REPOSITORY}",
        create=[*repositories, "create", REPOSITORY, "--repository-format=docker", *where],
        check=[*repositories, "describe", REPOSITORY, "--format=value(name)", *where],
    )
    writer = "roles/artifactregistry.writer"
    yield _binding(f"repository {REPOSITORY}", repositories, REPOSITORY, place.builder, writer, *where)


def _buckets(place: Place) -> Iterator[Step]:
    yield from _bucket(place, place.bucket, "bucket_lifecycle.json", place.worker, "roles/storage.objectUser")
    yield from _bucket(place, place.sources, "sources_lifecycle.json", place.builder, "roles/storage.objectViewer")


def _bucket(place: Place, name: str, lifecycle: str, account: str, role: str) -> Iterator[Step]:
    buckets, url = ("storage", "buckets"), f"gs://{name}"
    closed = ["--uniform-bucket-level-access", "--public-access-prevention"]
    rules = f"--lifecycle-file={_file(lifecycle)}"
    yield Step(
        f"Bucket {url}",
        create=[*buckets, "create", url, f"--location={place.region}", *closed, _project(place)],
        check=[*buckets, "describe", url, "--format=value(name)", _project(place)],
    )
    yield Step(f"Lifecycle and access of {url}", create=[*buckets, "update", url, *closed, rules, _project(place)])
    yield _binding(url, buckets, url, account, role, _project(place))


def _secrets(place: Place, service: Service) -> Iterator[Step | Remark]:
    """Their names only: a value is never on a command line, where other processes can read it."""
    for variable, (name, _) in service.secrets.items():
        yield Step(
            f"Secret {name}",
            create=["secrets", "create", name, "--replication-policy=automatic", _project(place)],
            check=["secrets", "describe", name, "--format=value(name)", _project(place)],
        )
        accessor = "roles/secretmanager.secretAccessor"
        yield _binding(f"secret {name}", ["secrets"], name, place.worker, accessor, _project(place))
        add = f"gcloud secrets versions add {name} --data-file=- {_project(place)}"
        yield Remark(f"The value of {name}, if it has none yet", (f'printf %s "${variable}" | {add}',))


def _database(place: Place) -> Iterator[Step | Remark]:
    where = [f"--cluster={place.alloydb_cluster}", f"--region={place.region}", _project(place)]
    users = ("alloydb", "users")
    yield Step(
        f"Database user {place.database_user}",
        create=[*users, "create", place.database_user, "--type=IAM_BASED", *where],
        check=[*users, "list", f"--filter=name~/{place.database_user}$", "--format=value(name)", *where],
    )
    yield Remark(
        "Once, as the database's superuser (AlloyDB Studio, or psql)", database_statements(place.database_user)
    )
    yield Remark(
        "Once, on the instance, beside the flags that it has",
        (f"gcloud alloydb instances update {place.alloydb_instance} --database-flags=alloydb.iam_authentication=on …",),
    )


def database_statements(user: str) -> tuple[str, str, str]:
    """SQL; the last one in the new database. The user makes the tables and so owns them: more it does not need."""
    return (
        "CREATE DATABASE proctor;",
        f'GRANT CONNECT, CREATE, TEMPORARY ON DATABASE proctor TO "{user}";',
        f'GRANT USAGE, CREATE ON SCHEMA public TO "{user}";  -- in the database proctor',
    )


def _queues(place: Place, service: Service, names: tuple[str, ...]) -> Iterator[Step]:
    command, where = ("tasks", "queues"), [f"--location={place.region}", _project(place)]
    for name, dispatches in queues.shares(names, budget.concurrent_dispatches(service)).items():
        settings = queues.settings_of(dispatches)
        yield Step(
            f"Queue {name}",
            create=[*command, "create", name, *settings, *where],
            check=[*command, "describe", name, "--format=value(name)", *where],
            update=[*command, "update", name, *settings, *where],
        )
        for role in ("roles/cloudtasks.enqueuer", "roles/cloudtasks.viewer"):  # viewer: `proctor doctor` looks at it
            yield _binding(f"queue {name}", command, name, place.worker, role, *where)


def _service(place: Place) -> Iterator[Step]:
    where = [f"--region={place.region}", _project(place)]
    yield Step(
        f"Service {SERVICE}, until the first release a sample",
        create=[
            *("run", "deploy", SERVICE, f"--image={PLACEHOLDER}", f"--service-account={place.worker}"),
            *("--no-allow-unauthenticated", *where),
        ],
        check=["run", "services", "list", f"--filter=metadata.name={SERVICE}", "--format=value(metadata.name)", *where],
    )
    invokers = [
        f"serviceAccount:{place.invoker}",
        f"serviceAccount:{place.builder}",
        *map(_member, place.callers.split(",")),
    ]
    for member in invokers:
        bind = ["run", "services", "add-iam-policy-binding", SERVICE, f"--member={member}", "--role=roles/run.invoker"]
        yield Step(f"{member.partition(':')[2]}: roles/run.invoker on service {SERVICE}", [*bind, *where])


def _sweeper(place: Place) -> Iterator[Step]:
    jobs, where = ("scheduler", "jobs"), [f"--location={place.region}", _project(place)]
    settings = [
        *("--schedule=* * * * *", f"--uri={place.service_url}/tasks/sweep", "--http-method=post"),
        *(f"--oidc-service-account-email={place.invoker}", f"--oidc-token-audience={place.service_url}"),
        "--attempt-deadline=60s",
    ]
    yield Step(
        f"Sweeper {SWEEPER}, every minute",
        create=[*jobs, "create", "http", SWEEPER, *settings, *where],
        check=[*jobs, "describe", SWEEPER, "--format=value(name)", *where],
        update=[*jobs, "update", "http", SWEEPER, *settings, *where],
    )


def _member(caller: str) -> str:
    """An entry of PROCTOR_CALLERS, as IAM names it."""
    if caller.startswith("@"):
        return f"domain:{caller[1:]}"
    return f"serviceAccount:{caller}" if caller.endswith(".gserviceaccount.com") else f"user:{caller}"


def _acts_as(place: Place, account: str, *, on: str) -> Step:
    return _binding(on, ["iam", "service-accounts"], on, account, "roles/iam.serviceAccountUser", _project(place))


def _binding(what: str, command: Iterable[str], name: str, account: str, role: str, *where: str) -> Step:
    """Said again, it changes nothing."""
    argv: Argv = [*command, "add-iam-policy-binding", name, f"--member=serviceAccount:{account}", f"--role={role}"]
    return Step(f"{account.partition('@')[0]}: {role} on {what}", [*argv, *_condition(command), *where])


def _condition(command: Iterable[str]) -> tuple[str, ...]:
    """A project's policy may have conditions, and gcloud asks which is meant."""
    return ("--condition=None",) if list(command) == ["projects"] else ()


def _project(place: Place) -> str:
    return f"--project={place.project}"


def _file(name: str) -> str:
    """Relative to here where it is, so that what is printed can be pasted on another machine."""
    path = Path(str(resources.files("app.cloud").joinpath(name)))
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
