"""Whether a deployment is whole, seen from inside: as a Cloud Run job, or anywhere with the service's environment.

Each check says what is wrong and the command that mends it. They look for real: a statement is run, a file is written, a
command is executed in the sandbox.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlsplit
from uuid import uuid4

from google.auth.exceptions import GoogleAuthError
from sqlalchemy import text

from app.addresses import address, filesystem
from app.cloud import queues
from app.cloud.child import find_restic
from app.cloud.identity import account
from app.cloud.queue_settings import QueueState, Unseen, look_at
from app.containment import bounded, in_words
from app.database import preflight
from app.database.engine import open_engine
from app.database.session import Database
from app.errors import DatabaseUnavailable, SettingsError
from app.runner.launchers import choose
from app.runner.messages import Containment
from app.scratch import make_private
from app.settings import Settings

CLOCK = 5
"""Seconds that our clock and the database's may differ, beyond the time of asking. Ours: tokens are valid from their
issue, and whoever checks one allows for some seconds."""

PATIENCE = 60
"""Seconds for one check. Ours."""

_NOW = text("/* doctor.now */ SELECT clock_timestamp() AS now")


@dataclass(frozen=True)
class Finding:
    """`mend`: what to do, mostly a command; None if all is well."""

    check: str
    ok: bool
    says: str
    mend: str | None = None


Clock = Callable[[], float]


async def examine(settings: Settings, clock: Clock = time.time) -> list[Finding]:
    """All checks, side by side. `clock`: seconds since 1970, as this machine has it."""
    checks: dict[str, Awaitable[list[Finding]]] = {
        "database": check_database(settings, clock),
        "queue": check_queue(settings),
        "artifacts": check_artifacts(settings),
        "sandbox": check_sandbox(settings),
        "restic": check_restic(),
        "pushes": check_pushes(settings),
        "identity": check_identity(settings),
    }
    found = await asyncio.gather(*(_bounded(name, check) for name, check in checks.items()))
    return [finding for findings in found for finding in findings]


async def _bounded(name: str, check: Awaitable[list[Finding]]) -> list[Finding]:
    try:
        async with asyncio.timeout(PATIENCE):
            return await check
    except TimeoutError:
        return [Finding(name, False, f"no answer in {PATIENCE} s", "look whether the network lets it through")]
    except Exception as error:  # one that nobody expects must not hide what the other checks found
        says = f"{type(error).__name__}: {error}".splitlines()[0]
        return [Finding(name, False, f"the check itself failed: {says}", "report it, with `proctor doctor --json`")]


# The database ---------------------------------------------------------------------------------------------------------


async def check_database(settings: Settings, clock: Clock = time.time) -> list[Finding]:
    """Reachable, its clock, its schema, its connections: later ones only if it answers."""
    try:
        async with open_engine(settings) as engine:
            return await _ask_database(settings, Database(engine, settings), clock)
    except DatabaseUnavailable as error:
        return [Finding("database", False, str(error), _mend_database(settings))]


async def _ask_database(settings: Settings, database: Database, clock: Clock) -> list[Finding]:
    before = clock()
    ((now,),) = await database.run(_NOW, patience=0)
    findings = [Finding("database", True, settings.database), _clock(now, before, clock())]
    try:
        seen = await preflight.look(database)
    except DatabaseUnavailable as error:
        migrate = "gcloud run jobs execute proctor-migrate --wait; elsewhere: proctor migrate"
        return [*findings, Finding("schema", False, str(error), migrate)]
    return [*findings, Finding("schema", True, f"revision {seen.revision}"), _connections(settings, seen.connections)]


def _clock(now: datetime, before: float, after: float) -> Finding:
    """The database's clock was read between `before` and `after`."""
    off = max(before - now.timestamp(), now.timestamp() - after, 0)
    if off <= CLOCK:
        return Finding("clock", True, f"the database's and ours agree within {CLOCK} s")
    says = f"the database's clock and ours differ by {off:.0f} s"
    return Finding("clock", False, says, "let this machine follow a time server: chronyc makestep")


def _connections(settings: Settings, granted: int) -> Finding:
    needed = settings.max_instances * settings.connections
    says = f"{settings.max_instances} instances × {settings.connections} = {needed}; the database grants {granted}"
    if needed <= granted:
        return Finding("connections", True, says)
    mend = f"lower maxScale and PROCTOR_MAX_INSTANCES to {granted // settings.connections}, or raise max_connections"
    return Finding("connections", False, says, mend)


def _mend_database(settings: Settings) -> str:
    if settings.alloydb_instance is None:
        return "look whether it runs, and at PROCTOR_DATABASE_URL"
    _, project, _, region, _, cluster, _, instance = settings.alloydb_instance.split("/")
    return f"gcloud alloydb instances describe {instance} --cluster={cluster} --region={region} --project={project}"


# The queue ------------------------------------------------------------------------------------------------------------


async def check_queue(settings: Settings) -> list[Finding]:
    """All of them: there, running, and as DESIGN wants them."""
    found = [await _check_one(settings.model_copy(update={"queue": settings.queue_called(q)})) for q in settings.queues]
    return [finding for findings in found for finding in findings]


async def _check_one(settings: Settings) -> list[Finding]:
    _, project, _, location, _, name = settings.queue.split("/")
    where = f"{name} --location={location} --project={project}"
    pushes = settings.max_instances * settings.connections
    fits = max(1, settings.max_instances * (settings.connections - 1))
    wanted = " ".join(queues.settings_of(fits))
    seen = await look_at(settings)
    if isinstance(seen, Unseen):
        return [Finding("queue", False, seen.says, _mend_queue(settings, seen, where, wanted))]
    findings = []
    if seen.state != "RUNNING":
        findings.append(Finding("queue", False, f"it is {seen.state.lower()}", f"gcloud tasks queues resume {where}"))
    if wrong := list(_wrong(seen, pushes)):
        findings.append(Finding("queue", False, "; ".join(wrong), f"gcloud tasks queues update {where} {wanted}"))
    return findings or [Finding("queue", True, f"{name} runs, {seen.concurrent_dispatches} pushes at once")]


def _mend_queue(settings: Settings, seen: Unseen, where: str, wanted: str) -> str:
    match seen.why:
        case "missing":
            return f"gcloud tasks queues create {where} {wanted}"
        case "forbidden":
            viewer = f"--member=serviceAccount:{_worker(settings)} --role=roles/cloudtasks.viewer"
            return f"gcloud tasks queues add-iam-policy-binding {where} {viewer}"
        case "no answer":
            return "look at the credentials, the network and PROCTOR_QUEUE_ENDPOINT"


def _worker(settings: Settings) -> str:
    """The service's account, as the database knows it."""
    return f"{settings.alloydb_user or 'proctor-worker@PROJECT.iam'}.gserviceaccount.com"


def _wrong(seen: QueueState, pushes: int) -> list[str]:
    wanted = {
        "max_attempts": (seen.max_attempts, queues.MAX_ATTEMPTS),
        "max_retry_duration": (seen.max_retry_duration, queues.MAX_RETRY_DURATION),
        "min_backoff": (seen.min_backoff, queues.MIN_BACKOFF),
        "max_backoff": (seen.max_backoff, queues.MAX_BACKOFF),
        "max_doublings": (seen.max_doublings, queues.MAX_DOUBLINGS),
    }
    wrong = [f"{name} is {is_:g}, not {should:g}" for name, (is_, should) in wanted.items() if is_ != should]
    if seen.concurrent_dispatches > pushes:
        wrong.append(f"max_concurrent_dispatches is {seen.concurrent_dispatches}, all instances take {pushes}")
    return wrong


# The artifacts --------------------------------------------------------------------------------------------------------


async def check_artifacts(settings: Settings) -> list[Finding]:
    """Written, read, deleted. Not through `app.artifacts`, which tries again for a minute."""
    url = address(settings.artifacts, "doctor", uuid4().hex)
    try:
        await asyncio.to_thread(_write_read_delete, url)
    except Exception as error:  # each file system has its own
        says = f"{settings.artifacts}: {type(error).__name__}: {error}".splitlines()[0]
        return [Finding("artifacts", False, says, _mend_artifacts(settings))]
    if settings.artifacts.startswith("file://") and settings.queue_endpoint is None:
        says = f"{settings.artifacts} is this instance's own, and ends with it"
        return [Finding("artifacts", False, says, "set PROCTOR_ARTIFACTS to gs://bucket/path")]
    return [Finding("artifacts", True, f"{settings.artifacts} can be written, read and deleted")]


def _write_read_delete(url: str) -> None:
    store = filesystem(url)
    store.pipe_file(url, b"doctor")
    if store.cat_file(url) != b"doctor":
        raise OSError("what was read is not what was written")
    store.rm_file(url)


def _mend_artifacts(settings: Settings) -> str:
    scheme, _, path = settings.artifacts.partition("://")
    if scheme != "gs":
        return f"let the service's user write to {path}"
    user = f"--member=serviceAccount:{_worker(settings)} --role=roles/storage.objectUser"
    return f"gcloud storage buckets add-iam-policy-binding gs://{path.partition('/')[0]} {user}"


# What a worker needs on its machine -----------------------------------------------------------------------------------


async def check_sandbox(settings: Settings) -> list[Finding]:
    """By the probe that a worker makes. In a Cloud Run job there is no launcher of the platform's: only bubblewrap counts."""
    try:
        await asyncio.to_thread(make_private, settings.scratch)
    except SettingsError as error:
        return [Finding("sandbox", False, str(error), "set PROCTOR_SCRATCH to a folder that is for this service alone")]
    wanted = Containment(limits=settings.sandbox_limits, hidden=(str(settings.scratch),))
    found = await choose(settings.sandbox_launchers, wanted, within=settings.scratch)
    if found.launcher is not None:
        mode = in_words(await asyncio.to_thread(bounded, found, settings))
        return [Finding("sandbox", True, f"{found.launcher} has passed its probe; {mode}")]
    mend = "deploy service.yaml (`sandboxLauncher: true`), or give the container bubblewrap and user namespaces"
    return [Finding("sandbox", False, found.refusal, mend)]


async def check_restic() -> list[Finding]:
    try:
        found = await asyncio.to_thread(find_restic)
    except RuntimeError as error:
        return [Finding("restic", False, str(error), "deploy an image whose evaluations can run: `make test`")]
    if found is not None:
        return [Finding("restic", True, found)]
    says = "there is none that checkpoints can use: interrupted samples begin again"
    return [Finding("restic", False, says, "apt-get install restic (0.18 or newer: Debian 13 has it)")]


# Pushes and their tokens ----------------------------------------------------------------------------------------------


async def check_pushes(settings: Settings) -> list[Finding]:
    """What Cloud Run's IAM would refuse, or never see: only with the real queue."""
    if settings.queue_endpoint is not None:
        return [Finding("pushes", True, "the queue is an emulator: nobody asks for tokens")]
    findings = []
    url = urlsplit(settings.service_url)
    if url.scheme != "https" or url.hostname in ("127.0.0.1", "localhost", "::1"):
        says = f"PROCTOR_SERVICE_URL is {settings.service_url}, where Cloud Tasks cannot push to"
        findings.append(Finding("pushes", False, says, "set it to the service's https address"))
    if settings.queue_service_account is None:
        says = "pushes carry no token: Cloud Run refuses them"
        findings.append(Finding("pushes", False, says, "set PROCTOR_QUEUE_SERVICE_ACCOUNT to proctor-queue's e-mail"))
    audience = settings.queue_audience or settings.service_url
    if audience != settings.service_url:
        says = f"the tokens' audience is {audience}, the service's address {settings.service_url}"
        mend = f"gcloud run services update proctor --add-custom-audiences={audience}, or unset PROCTOR_QUEUE_AUDIENCE"
        findings.append(Finding("pushes", False, says, mend))
    findings += _callers(settings)
    return findings or [Finding("pushes", True, f"as {settings.queue_service_account}, for {audience}")]


def _callers(settings: Settings) -> list[Finding]:
    if settings.auth == "none":
        says = "PROCTOR_AUTH is none: whoever reaches the service may do everything"
        return [Finding("pushes", False, says, "set PROCTOR_AUTH to iam")]
    if not settings.callers:
        return [Finding("pushes", False, "PROCTOR_CALLERS is empty: nobody may use the API", "name them in deploy.env")]
    return []


async def check_identity(settings: Settings) -> list[Finding]:
    """Whose credentials these are, and whether the database's user is theirs."""
    if settings.queue_endpoint is not None and settings.alloydb_instance is None:
        return [Finding("identity", True, "nothing here asks Google")]
    try:
        email = await asyncio.to_thread(account)
    except GoogleAuthError as error:
        mend = "gcloud auth application-default login; on Cloud Run: set serviceAccountName"
        return [Finding("identity", False, f"no Google credentials: {error}".splitlines()[0], mend)]
    if settings.alloydb_instance and settings.alloydb_password is None and email is not None:
        user = email.removesuffix(".gserviceaccount.com")
        if settings.alloydb_user != user:
            says = f"the credentials are {email}'s, but PROCTOR_ALLOYDB_USER is {settings.alloydb_user}"
            return [Finding("identity", False, says, f"set PROCTOR_ALLOYDB_USER to {user}, or serviceAccountName")]
    return [Finding("identity", True, email or "a person's credentials")]
