"""The service's settings: one frozen class, the only reader of the environment.

Every field is the variable ``PROCTOR_`` + its name in capitals. Times are seconds unless the name says otherwise.
Numbers whose source is "the story" are those of the fix that took random failures from about 5 % to 0.01 %.
"""

import os
import re
import tempfile
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from pydantic import (
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from app.errors import SettingsError
from app.prices import OwnPrices, own_prices
from app.spec import QUEUE_ID, SandboxLimits

PREFIX = "PROCTOR_"

Seconds = Annotated[float, Field(gt=0)]
Days = Annotated[float, Field(gt=0, le=36_500)]
INSTANCE_NAME = r"^projects/[^/\s]+/locations/[^/\s]+/clusters/[^/\s]+/instances/[^/\s]+$"
ENDPOINT = r"^[^/:\s]+:\d+$"
QUEUE_NAME = r"^projects/[^/]+/locations/[^/]+/queues/[A-Za-z0-9-]{1,100}$"
EMAIL = re.compile(r"[a-z0-9.!#$%&'+/=^_{|}~-]+@[a-z0-9-]+(\.[a-z0-9-]+)+")
DOMAIN = re.compile(r"@[a-z0-9-]+(\.[a-z0-9-]+)+")
ANYBODY = frozenset({"gmail.com", "googlemail.com", "developer.gserviceaccount.com", "appspot.gserviceaccount.com"})
"""Domains in which anybody can have an address, or any project a service account."""


def _listed(value: Any) -> Any:
    """`a, b` as ("a", "b")."""
    if not isinstance(value, str):
        return value
    entries = [entry.strip() for entry in value.split(",")]
    if not all(entries):
        raise ValueError("has an empty entry: give entries with one comma between two")
    return tuple(entries)


Listed = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)]
"""Comma-separated in the environment."""

Launchers = Annotated[tuple[Literal["bubblewrap", "cloud_run"], ...], NoDecode, BeforeValidator(_listed)]


LIBPQ_ONLY = frozenset(
    (
        *("channel_binding", "client_encoding", "fallback_application_name", "gssdelegation", "gssencmode", "hostaddr"),
        *("keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval", "load_balance_hosts"),
        *("max_protocol_version", "min_protocol_version", "replication", "require_auth", "requirepeer", "requiressl"),
        *("scram_client_key", "scram_server_key", "sslcertmode", "sslcompression", "sslkeylogfile", "sslsni"),
        "tcp_user_timeout",
    )
)
"""Parameters of libpq that mean nothing to asyncpg, which would send them to the server as settings. Sources: the Postgres
manual, "Parameter Key Words", less what asyncpg's `connect` reads."""


def _wrong_parameters(url: SplitResult) -> str:
    """What is wrong with the part behind `?`; empty if nothing. Unknown ones are taken for the server's settings, and it
    refuses those that it does not know."""
    try:
        names = parse_qs(url.query, strict_parsing=True, keep_blank_values=True) if url.query else {}
        _ = url.port
    except ValueError as error:
        return f"its port or what follows `?` cannot be read ({error})"
    if "connect_timeout" in names:
        return "connect_timeout is set by PROCTOR_CONNECT_TIMEOUT: take it out of the address"
    if unknown := sorted(LIBPQ_ONLY & names.keys()):
        return f"the driver asyncpg knows nothing of {', '.join(unknown)}: take it out of the address"
    return ""


OURS = ("proctor", "local")
"""Sandboxes that every service has. Others come with packages, whose names for them only Inspect knows."""


def _no_sandbox(pattern: str) -> str:
    """Why no task's sandbox that could run here is called so; empty if one may be."""
    if pattern.lower() == "docker":
        return "docker cannot run here. A task that declares it runs with `sandbox: proctor` in its spec."
    if not re.fullmatch(r"[\w.*?\[\]!-]+", pattern, re.ASCII):
        return "a sandbox is named by letters, digits, `_`, `-` and `.`; entries are parted by commas."
    if pattern not in OURS and (meant := get_close_matches(pattern.lower(), OURS, n=1, cutoff=0.8)):
        return f"did you mean {meant[0]!r}?"
    return ""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True, populate_by_name=True
    )

    # The database -----------------------------------------------------------------------------------------------------
    database_url: SecretStr | None = Field(
        default=None,
        description="Any Postgres 15 or later: `postgresql://user:password@host:port/name`. Either this or"
        " alloydb_instance is required.",
    )
    alloydb_instance: str | None = Field(
        default=None,
        validate_default=True,
        pattern=INSTANCE_NAME,
        description="AlloyDB, through Google's connector: `projects/…/locations/…/clusters/…/instances/…`.",
    )
    alloydb_user: str | None = Field(
        default=None,
        validate_default=True,
        description="Database user. With IAM: the service account's e-mail without `.gserviceaccount.com`.",
    )
    alloydb_password: SecretStr | None = Field(
        default=None, description="The user's password. Unset: IAM, with the worker's own Google credentials."
    )
    alloydb_database: str = Field(default="proctor", description="Name of the database in the instance.")
    alloydb_ip_type: Literal["PRIVATE", "PUBLIC", "PSC"] = Field(
        default="PRIVATE", description="Which of the instance's addresses: PRIVATE, PUBLIC or PSC."
    )
    alloydb_endpoint: str | None = Field(
        default=None,
        pattern=ENDPOINT,
        description="host:port of another AlloyDB Admin API: a private endpoint, or a stand-in. Unset: Google's.",
    )
    database_pooler: Literal["none", "transaction"] = Field(
        default="none",
        description="What is between the service and database_url: none, or a pooler in transaction mode (PgBouncer,"
        " AlloyDB's managed pooling), through which nothing lasts longer than a transaction: see docs/database.md.",
    )
    pool_recycle: Seconds = Field(
        default=180,
        description="A pooled connection is replaced past this age (seconds). Idle ones are dropped silently after about 600"
        " by Cloud Run's network and VPC connection tracking; 900, as before the fix, comes too late. Source: the story.",
    )
    pool_pre_ping: bool = Field(
        default=True,
        description="Ask a pooled connection for a sign of life before use: one round trip, and no dead connection reaches"
        " a caller. Source: the story.",
    )
    pool_size: int = Field(
        default=5,
        ge=1,
        description="Connections kept for the next caller. Sessions last milliseconds, so five serve fifteen pushes."
        " Source: the story.",
    )
    max_overflow: int = Field(
        default=10,
        ge=0,
        description="Connections beyond pool_size, closed after use; with it 15, as many as one instance's pushes, so that"
        " none ever waits for another. Source: the story.",
    )
    pool_timeout: Seconds = Field(
        default=30,
        description="Wait for a free connection (seconds): longer than any statement may hold one (statement_timeout)."
        " Source: the story.",
    )
    connect_timeout: Seconds = Field(
        default=10,
        description="Opening a connection (seconds): the Admin API, TLS and login together. Ours: ten times a slow one.",
    )
    ping_timeout: Seconds = Field(
        default=2,
        description="A connection that does not answer its ping for so long (seconds) is replaced. Ours: a hundred times a"
        " slow round trip, and a delay that no caller minds.",
    )
    socket_timeout: Seconds = Field(
        default=10,
        description="Data that the server's TCP does not acknowledge for so long (seconds) breaks the connection"
        " (TCP_USER_TIMEOUT; the kernel's own limit is about 900). Ours: below statement_timeout, so that a statement sent"
        " into a black hole is sent again sooner.",
    )
    statement_timeout: Seconds = Field(
        default=30,
        description="One statement or one transaction, seen from the client (seconds); the server stops at 9/10 of it."
        " Shorter than the lease, or a take-over could wait past it. Ours.",
    )
    database_patience: Seconds = Field(
        default=90,
        description="How long idempotent work is tried again (seconds): a failover of 60 s is ridden out. Ours.",
    )
    max_instances: int = Field(
        default=1,
        ge=1,
        description="Workers that may run at once, as service.yaml's maxScale: at start-up it is multiplied by 15"
        " connections (pool_size + max_overflow) and held against the database's max_connections.",
    )

    # The queue --------------------------------------------------------------------------------------------------------
    queue: str = Field(
        default="projects/local/locations/local/queues/proctor",
        pattern=QUEUE_NAME,
        description="Cloud Tasks queue, `projects/…/locations/…/queues/…`.",
    )
    allowed_queues: Listed = Field(
        default=(),
        description="Queues that a spec may name beside that one, comma-separated names: of the same project and location,"
        " pushing with the same service account.",
    )
    queue_endpoint: str | None = Field(
        default=None,
        pattern=ENDPOINT,
        description="host:port of a Cloud Tasks emulator, spoken to without TLS. Unset: the real service.",
    )
    queue_service_account: str | None = Field(
        default=None, description="E-mail of the service account whose OIDC token each push carries. Unset: no token."
    )
    queue_audience: str | None = Field(default=None, description="Audience of that token. Default: service_url.")
    queue_concurrency: int = Field(
        default=32, ge=1, description="Cloud Tasks created at the same time by one worker. Ours: some hundred a second."
    )
    queue_patience: Seconds = Field(
        default=20,
        description="How long creating a Cloud Task is tried (seconds); then the sweeper makes up for it. Ours.",
    )
    service_url: str = Field(
        default="http://127.0.0.1:8080",
        description="Where the queue reaches this service; pushes go to /tasks/execute.",
    )
    dispatch_deadline: float = Field(
        default=1800,
        ge=15,
        le=1800,
        description="How long one push may last (seconds). Source: Cloud Tasks, whose maximum is 1,800.",
    )

    # The ledger -------------------------------------------------------------------------------------------------------
    lease: Seconds = Field(default=120, description="How long an attempt may act without renewal (seconds). Ours.")
    renew_interval: Seconds = Field(
        default=15, description="Between two renewals of a worker's leases (seconds): an eighth of the lease. Ours."
    )
    renew_patience: Seconds = Field(
        default=300,
        description="Work is stopped after so long without a renewal (seconds). Ours: longer than a failover.",
    )
    deadline_margin: Seconds = Field(
        default=60, description="An attempt stops itself so long before the dispatch deadline (seconds). Ours."
    )
    max_crashes: int = Field(
        default=3, ge=1, description="An execution whose attempts were lost so often without progress fails. Ours."
    )

    sweep_after: Seconds = Field(
        default=120,
        description="The sweeper looks after so long (seconds) at an execution whose Cloud Task may not exist, or whose"
        " lease has ended: longer than making a Cloud Task may take. Ours.",
    )
    sweep_after_release: Seconds = Field(
        default=600,
        description="And after so long (seconds) at one that an attempt gave back, for the queue to deliver again. Ours: ten"
        " times the queue's longest back-off.",
    )
    sweep_after_enqueue: Seconds = Field(
        default=86_400,
        description="And after so long (seconds) at one whose Cloud Task exists: only a purge of the queue can have taken it."
        " Ours: a day, so that a backlog is not enqueued again and again.",
    )

    # The runner -------------------------------------------------------------------------------------------------------
    artifacts: str = Field(
        default="file://.proctor/artifacts", description="Where logs go: `gs://bucket/path` or `file://path`."
    )
    artifacts_patience: Seconds = Field(
        default=60,
        description="How long one file or listing is tried again (seconds); then the attempt is given back, for a later one."
        " Ours: as long as a failover of the database.",
    )
    scratch: Path = Field(
        default_factory=lambda: Path(tempfile.gettempdir(), f"proctor-{os.getuid()}"),
        description="Local folder for attempts at work, this user's alone (0700). On Cloud Run it is memory. Default:"
        " in the system's temporary folder.",
    )
    max_samples: int = Field(default=100_000, ge=1, description="Samples × epochs of one evaluation, at most. Ours.")
    max_samples_inline: int = Field(
        default=20,
        ge=1,
        description="Samples × epochs that `POST /tasks/execute` with a spec runs in the request itself, at most. Ours.",
    )

    # The sandbox ------------------------------------------------------------------------------------------------------
    sandbox_launchers: Launchers = Field(
        default=("bubblewrap", "cloud_run"),
        description="What may start agents' code, comma-separated; the first that passes its probe is taken. `cloud_run`:"
        " the platform's own `sandbox do`.",
    )
    allowed_sandboxes: Listed = Field(
        default=("proctor",),
        description="Sandboxes that tasks may use, comma-separated patterns: `proctor`; others such as `k8s`, `modal`,"
        " `daytona`, `e2b` run elsewhere; `local` isolates nothing and gives agents' code whatever the service may do.",
    )
    sandbox_memory: int = Field(
        default=2**31,
        ge=2**26,
        description="Memory (bytes) of each process of one sample's code, and of all together. Ours: numpy alone maps 1 GiB.",
    )
    sandbox_processes: int = Field(
        default=256,
        ge=16,
        description="Processes and threads of one sample's code. Ours: a parallel build fits, a fork bomb does not.",
    )
    sandbox_workspace: int = Field(
        default=2**29, ge=2**20, description="Files in a sample's `/workspace` (bytes). They lie in memory. Ours."
    )
    sandbox_tmp: int = Field(
        default=2**28,
        ge=2**20,
        description="Files in a sample's `/tmp`, `/var/tmp` and `/dev/shm` together (bytes). In memory too. Ours.",
    )
    sandbox_cpu: int = Field(
        default=300,
        ge=1,
        description="CPU of one process of a sample's code (seconds). Ours: ends a busy loop in a call without a time-out.",
    )
    sandbox_output: int = Field(
        default=10 * 2**20,
        ge=1024,
        le=10 * 2**20,
        description="Kept of each output stream of a command (bytes): its end. Source: Inspect, whose maximum is 10 MiB.",
    )
    child_memory: int = Field(
        default=2**33,
        ge=2**30,
        description="Address space of one child, which runs the task's own code (bytes). Ours: about ten times what Inspect"
        " and the providers' packages map, and less than a leak needs to take the worker along.",
    )

    # The web ----------------------------------------------------------------------------------------------------------
    host: str = Field(default="127.0.0.1", description="Address to listen at; 0.0.0.0 in the container.")
    port: int = Field(
        default=8080,
        ge=0,
        le=65535,
        validation_alias=AliasChoices("PROCTOR_PORT", "PORT"),
        description="Port to listen at. Default: Cloud Run's PORT, else 8080.",
    )
    max_body: int = Field(
        default=2**20, ge=1024, description="Size of a request's body (bytes). As Cloud Tasks: 1 MiB."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severity logged."
    )
    log_format: Literal["json", "console"] | None = Field(
        default=None, description="Default: console on a terminal, else json (Cloud Logging's fields)."
    )

    # Who may call, and for what ---------------------------------------------------------------------------------------
    auth: Literal["iam", "oidc", "none"] = Field(
        default="none",
        description="How callers are known. iam: by the token that Cloud Run's IAM has checked; oidc: by an ID token that"
        " the service verifies itself; none: not at all, and only at a loopback address.",
    )
    callers: Listed = Field(
        default=(),
        description="Who may use the API: e-mails, or domains as `@example.com`, comma-separated. Default: nobody.",
    )
    push_callers: Listed = Field(
        default=(),
        description="Who may call /tasks/* besides queue_service_account: e-mails, comma-separated; Cloud Scheduler's"
        " service account, a person debugging.",
    )
    audiences: Listed = Field(
        default=(),
        description="Audiences of the tokens that `oidc` accepts, comma-separated. Default, and with queue_service_account"
        " always among them: queue_audience, else service_url.",
    )
    oidc_certs_url: str = Field(
        default="https://www.googleapis.com/oauth2/v1/certs",
        description="Where `oidc` gets the certificates that tokens are signed with, as {key id: X.509 PEM}. Default:"
        " Google's.",
    )
    allowed_tasks: Listed = Field(
        default=("*",),
        min_length=1,
        description="Tasks that may be evaluated: patterns with `*` and `?`, comma-separated; `file.py@name` is held to them"
        " on both sides of the `@`. Default: all.",
    )
    allowed_models: Listed = Field(
        default=("*",),
        min_length=1,
        description="Models that a spec may name, its roles' among them: patterns as for allowed_tasks. Default: all.",
    )

    model_prices: Annotated[OwnPrices, NoDecode, BeforeValidator(own_prices)] = Field(
        default_factory=dict,
        description="What models cost, before the prices of the package genai-prices: JSON, or a file with it, like"
        ' `{"openai/gpt-5": {"input": 1.25, "output": 10}}`: US dollars per million tokens by model or pattern; also'
        " `cache_read`, `cache_write`, `reasoning`, and `tiers` of those, each `over` so many input tokens.",
    )

    # Traces and metrics -----------------------------------------------------------------------------------------------
    telemetry: Literal["off", "otlp", "google"] = Field(
        default="off",
        description="Where traces and metrics go. otlp: by OTLP over HTTP to where OpenTelemetry's own `OTEL_EXPORTER_OTLP_…`"
        " variables say. google: to Google Cloud's OTLP endpoint, with the worker's credentials; needs the extra `google`.",
    )

    # What the platform says of itself ---------------------------------------------------------------------------------
    worker: str = Field(
        default_factory=lambda: f"{os.uname().nodename}:{os.getpid()}",
        description="This worker's name in the ledger. Default: host and process id.",
    )
    revision: str = Field(
        default="",
        validation_alias=AliasChoices("PROCTOR_REVISION", "K_REVISION"),
        description="The deployed revision. Default: Cloud Run's K_REVISION.",
    )
    cloud_run_service: str = Field(
        default="",
        validation_alias=AliasChoices("K_SERVICE", "PROCTOR_CLOUD_RUN_SERVICE"),
        description="The service's name on Cloud Run, whose K_SERVICE comes first. Empty: it runs elsewhere.",
    )
    image: str = Field(
        default="",
        max_length=500,
        description="The container's image, by its digest: a deploy says it, for Cloud Run does not. Recorded for each"
        " attempt. Default: not known.",
    )

    # What is kept, and for how long -----------------------------------------------------------------------------------
    keep_transcripts: Days | None = Field(
        default=90,
        description="An evaluation's logs, with the samples' transcripts, are deleted so long (days) after its end; its"
        " results stay, and it cannot be retried any more. `never`: they are kept. Ours: a quarter of a year.",
    )
    keep_checkpoints: Days | None = Field(
        default=7,
        description="Checkpoints are deleted as soon as they are of no use; what a lost worker left behind, so long (days)"
        " after the evaluation's end. `never`: that stays. Ours.",
    )

    @field_validator("database_url")
    @classmethod
    def _postgres(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        url = urlsplit(value.get_secret_value())
        if url.scheme not in ("postgres", "postgresql", "postgresql+asyncpg") or not url.hostname:
            raise ValueError("must be postgresql://user:password@host:port/name")
        if wrong := _wrong_parameters(url):
            raise ValueError(wrong)
        return value

    @field_validator("alloydb_instance")
    @classmethod
    def _one_database(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("database_url", "wrong") is None:
            raise ValueError("is required, or else PROCTOR_DATABASE_URL")
        if value is not None and info.data.get("database_url") is not None:
            raise ValueError("must not be set together with PROCTOR_DATABASE_URL: which of the two is meant?")
        return value

    @field_validator("alloydb_user")
    @classmethod
    def _some_user(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None and info.data.get("alloydb_instance") is not None:
            raise ValueError("is required with PROCTOR_ALLOYDB_INSTANCE")
        return value

    @field_validator("database_pooler")
    @classmethod
    def _on_the_way(cls, value: str, info: ValidationInfo) -> str:
        if value != "none" and info.data.get("alloydb_instance") is not None:
            raise ValueError("is for PROCTOR_DATABASE_URL: the AlloyDB connector goes past poolers")
        return value

    @field_validator("callers", "push_callers")
    @classmethod
    def _known_people(cls, entries: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """In small letters, as they are compared."""
        return tuple(_caller(entry.lower(), domains=info.field_name == "callers") for entry in entries)

    @field_validator("allowed_queues")
    @classmethod
    def _queue_names(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [entry for entry in entries if not re.fullmatch(QUEUE_ID, entry)]:
            raise ValueError(f"{wrong[0]!r} is not a queue's own name: letters, digits and hyphens, at most 100")
        return entries

    @field_validator("allowed_sandboxes")
    @classmethod
    def _can_match(cls, entries: tuple[str, ...]) -> tuple[str, ...]:
        """A pattern that nothing can match would read as a permission and be none."""
        for entry in entries:
            if wrong := _no_sandbox(entry):
                raise ValueError(f"{entry!r} can never match: {wrong}")
        return entries

    @field_validator("service_url", "oidc_certs_url")
    @classmethod
    def _http(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("must be an http or https address")
        return value.rstrip("/")

    @field_validator("keep_transcripts", "keep_checkpoints", mode="before")
    @classmethod
    def _or_never(cls, value: Any) -> Any:
        return None if value == "never" else value

    @field_validator("artifacts")
    @classmethod
    def _url(cls, value: str) -> str:
        scheme, separator, path = value.partition("://")
        if not separator or scheme not in ("file", "gs", "memory") or not path:
            raise ValueError("must be gs://bucket/path or file://path")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError("its name must be UTF-8: addresses below it go into the database")
        return f"file://{Path(path).absolute()}" if scheme == "file" else value.rstrip("/")

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.statement_timeout >= self.lease:
            raise ValueError("PROCTOR_STATEMENT_TIMEOUT must be shorter than PROCTOR_LEASE")
        if self.renew_interval * 2 > self.lease:
            raise ValueError("PROCTOR_RENEW_INTERVAL must be at most half of PROCTOR_LEASE")
        if self.deadline_margin >= self.dispatch_deadline:
            raise ValueError("PROCTOR_DEADLINE_MARGIN must be shorter than PROCTOR_DISPATCH_DEADLINE")
        return self

    @property
    def sandbox_limits(self) -> SandboxLimits:
        return SandboxLimits(
            memory=self.sandbox_memory,
            processes=self.sandbox_processes,
            workspace=self.sandbox_workspace,
            tmp=self.sandbox_tmp,
            cpu=self.sandbox_cpu,
            output=self.sandbox_output,
        )

    @property
    def accepted_audiences(self) -> tuple[str, ...]:
        """That of the queue's tokens is always among them."""
        own = (self.queue_audience or self.service_url,)
        return (*self.audiences, *own) if self.queue_service_account or not self.audiences else self.audiences

    @property
    def pushers(self) -> frozenset[str]:
        """E-mails, in small letters."""
        return frozenset(self.push_callers) | (
            {self.queue_service_account.lower()} if self.queue_service_account else set()
        )

    @property
    def pooled(self) -> bool:
        """A database session lasts for a transaction only."""
        return self.database_pooler == "transaction"

    @property
    def connections(self) -> int:
        """At most so many to the database, from one worker."""
        return self.pool_size + self.max_overflow

    def queue_called(self, name: str | None) -> str:
        """The resource name of a queue of these; None: the service's own."""
        return f"{self.queue.rpartition('/')[0]}/{name}" if name else self.queue

    @property
    def queues(self) -> tuple[str, ...]:
        """The names of all that push here, the service's own first."""
        return tuple(dict.fromkeys((self.queue.rpartition("/")[2], *self.allowed_queues)))

    @property
    def project(self) -> str:
        """Google Cloud project; the queue's."""
        return self.queue.split("/")[1]

    @property
    def location(self) -> str:
        """Google Cloud region; the queue's."""
        return self.queue.split("/")[3]

    @property
    def database(self) -> str:
        """Which database, in words for people: without its password."""
        if self.alloydb_instance:
            return f"database {self.alloydb_database} of {self.alloydb_instance} as {self.alloydb_user}"
        assert self.database_url is not None
        url = urlsplit(self.database_url.get_secret_value())
        return f"database {url.path.lstrip('/')} at {url.hostname}:{url.port or 5432} as {url.username}"


def load(**given: Any) -> Settings:
    """The settings that the environment says, `given` before it. Raises `SettingsError` naming every wrong variable.

    A ``PROCTOR_`` variable that no setting has is refused too: a misspelt limit must not be silently the default.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields} | NOT_OURS
    problems = [f"{k}: there is no such setting" for k in os.environ if k.startswith(PREFIX) and k not in known]
    try:
        settings = Settings(**given)
    except ValidationError as error:
        problems += [_sentence(e) for e in error.errors(include_url=False, include_context=False)]
    if problems:
        raise SettingsError("; ".join(problems))
    return settings


def children_environment() -> dict[str, str]:
    """The process's environment less every setting: what evaluations may see, model providers' keys among it. Nor are
    OpenTelemetry's variables theirs: they name where the service's telemetry goes, and may hold a key to it."""
    return {name: value for name, value in os.environ.items() if not name.startswith((PREFIX, "OTEL_"))}


def secrets(settings: Settings) -> set[str]:
    """What must not be told: the settings' passwords, the values of variables that are named like a secret, and the
    passwords in addresses."""
    named = {part for name, value in os.environ.items() if _SECRET.search(name) for part in (value, *value.split(","))}
    password = settings.alloydb_password.get_secret_value() if settings.alloydb_password else ""
    addresses = [value for value in os.environ.values() if "://" in value]
    if settings.database_url:
        addresses.append(settings.database_url.get_secret_value())
    raw = [_password(address) for address in addresses]
    return {value for value in (*named, password, *raw, *map(unquote, raw)) if value}


_SECRET = re.compile(
    r"((^|_)(API_?KEY|KEY|TOKEN|SECRET|PAT|PASSPHRASE|PASS|PASSWD)S?|PASSWORD|APIKEY|OTLP(_\w+)?_HEADERS)$",
    re.IGNORECASE,
)


def _password(address: str) -> str:
    try:
        return urlsplit(address).password or ""
    except ValueError:
        return ""


def _caller(entry: str, *, domains: bool) -> str:
    if EMAIL.fullmatch(entry):
        return entry
    if not domains or not DOMAIN.fullmatch(entry):
        raise ValueError(f"{entry!r} is not an e-mail" + (", nor a domain as @example.com" if domains else ""))
    if entry[1:] in ANYBODY:
        raise ValueError(f"{entry!r} would admit anybody: name the e-mails that are meant")
    return entry


SECRETS = frozenset({"database_url", "alloydb_password"})
NOT_OURS = frozenset({"PROCTOR_URL", "PROCTOR_TOKEN"})
"""Variables of the command line client, which is not the service."""


def _sentence(error: Any) -> str:
    """One complaint, naming the variable and never the value of a secret."""
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return str(message)
    name = PREFIX + str(error["loc"][0]).upper().removeprefix(PREFIX)
    if error["type"] == "missing":
        return f"{name}: is required"
    secret = SECRETS.intersection(error["loc"])
    shown = "" if secret or error["input"] is None else f" (it is {error['input']!r})"
    return f"{name}: {message[0].lower()}{message[1:]}{shown}"
