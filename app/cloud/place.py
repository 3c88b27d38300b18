"""Where a deployment is: the project, the region and the names that the placeholders of service.yaml stand for.

They are kept in `deploy.env`, one ``NAME=value`` a line: `proctor setup` writes it, `proctor deploy` and `proctor release`
read it. It holds no secret and belongs into the repository, for Cloud Build reads it too.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from app.errors import ProctorError

FILE = Path("deploy.env")

SERVICE = "proctor"
QUEUE = "proctor"
REPOSITORY = "proctor"
SWEEPER = "proctor-sweep"

_PROJECT = r"[a-z][a-z0-9-]{4,28}[a-z0-9]"
_NAME = r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?"
_BUCKET = r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]"
_FORM = {
    "project": _PROJECT,
    "project_number": r"[0-9]{6,20}",
    "region": r"[a-z]+-[a-z]+[0-9]+",
    "alloydb_cluster": _NAME,
    "alloydb_instance": _NAME,
    "network": _NAME,
    "subnet": _NAME,
    "bucket": _BUCKET,
    "callers": r"[^\s;]+",
    "queues": r"[A-Za-z0-9-]{1,100}(,[A-Za-z0-9-]{1,100})*",
}
"""What each value may be. Sources: the documentation of each resource's name."""


class PlaceError(ProctorError):
    """The message names each value that is missing or wrong."""

    title = "Wrong deployment values"


@dataclass(frozen=True)
class Place:
    """`callers`: who may use the API, as PROCTOR_CALLERS has it. `queues`: comma-separated names, the service's own among
    them."""

    project: str
    project_number: str
    region: str
    alloydb_cluster: str
    alloydb_instance: str
    bucket: str
    callers: str
    network: str = "default"
    subnet: str = "default"
    queues: str = QUEUE

    def __post_init__(self) -> None:
        wrong = [
            f"{name.upper()}: {value!r} is not one"
            for name, value in vars(self).items()
            if not re.fullmatch(_FORM[name], value)
        ]
        if wrong:
            raise PlaceError("; ".join(wrong))

    @property
    def worker(self) -> str:
        """The service account that the service runs as."""
        return self._account("proctor-worker")

    @property
    def invoker(self) -> str:
        """The one whose token pushes and sweeps carry."""
        return self._account("proctor-queue")

    @property
    def builder(self) -> str:
        """The one that builds, migrates and deploys."""
        return self._account("proctor-build")

    @property
    def database_user(self) -> str:
        """Of the database, for the service's account: an IAM user is named without `.gserviceaccount.com`."""
        return self.worker.removesuffix(".gserviceaccount.com")

    @property
    def service_url(self) -> str:
        """Known before the service exists. Source: Cloud Run's deterministic URL."""
        return f"https://{SERVICE}-{self.project_number}.{self.region}.run.app"

    @property
    def image(self) -> str:
        """Without tag or digest."""
        return f"{self.region}-docker.pkg.dev/{self.project}/{REPOSITORY}/{SERVICE}"

    @property
    def sources(self) -> str:
        """The bucket of Cloud Build's sources: apart, so that building needs no right on the artifacts."""
        return f"{self.bucket}-build"

    def substitutions(self, image: str) -> dict[str, str]:
        """What each placeholder of service.yaml stands for."""
        own = {name.upper(): value for name, value in vars(self).items()}
        derived = {"WORKER": self.worker, "INVOKER": self.invoker, "BUILDER": self.builder, "IMAGE": image}
        return own | derived | {"DATABASE_USER": self.database_user, "SERVICE_URL": self.service_url}

    def _account(self, name: str) -> str:
        return f"{name}@{self.project}.iam.gserviceaccount.com"


def save(place: Place, file: Path) -> None:
    file.write_text("".join(f"{name.upper()}={value}\n" for name, value in vars(place).items()))


def load(file: Path) -> Place:
    """Raises `PlaceError`."""
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except OSError as error:
        raise PlaceError(f"There is no {file} here ({error.strerror}): `proctor setup` writes it.") from error
    values = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    known = {f.name.upper(): f.name for f in fields(Place)}
    required = {"PROJECT", "PROJECT_NUMBER", "REGION", "ALLOYDB_CLUSTER", "ALLOYDB_INSTANCE", "BUCKET", "CALLERS"}
    problems = [f"{name}: is missing" for name in sorted(required - values.keys())]
    problems += [f"{name}: there is no such value" for name in sorted(values.keys() - known.keys())]
    if problems:
        raise PlaceError(f"{file}: {'; '.join(problems)}")
    try:
        return Place(**{known[name]: value for name, value in values.items()})
    except PlaceError as error:
        raise PlaceError(f"{file}: {error}") from error
