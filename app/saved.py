"""What an attempt leaves in the artifacts for the next one, should it come to that.

In the attempt's own folder lie its finished logs, and, as long as the execution is not over:

- ``checkpoint/``: its log folder, with the logs named ``….part`` lest they be taken for finished ones. Files go there as
  they land, Inspect's commit points (``ckpt-*.json``) after what they refer to;
- ``checkpoint.json``: written when the first of these is complete, so that half a checkpoint is never resumed from; it says
  by which versions the state was made, for an attempt that is lost may not have told the ledger;
- ``outcome.json``: what the attempt came to. It goes there last, just before the ledger is told. If the ledger never heard
  of it, the next attempt records it without running anything.
"""

import asyncio
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
from pydantic import TypeAdapter, ValidationError

from app.artifacts import Artifacts
from app.ledger import Settlement
from app.outcomes import Heard
from app.runner.messages import ENDED, LOGS, VALUES, Job
from app.store import StoreUnavailable
from app.tracing import about
from app.versions import Versions

OUTCOME, CHECKPOINT, COMMITTED = "outcome.json", "checkpoint", "checkpoint.json"
_PART = ".part"
_SETTLEMENT = TypeAdapter(Settlement)
_MADE_BY = TypeAdapter(list[Versions])
_LEFT_BY = re.compile(rf"^(?:[^/]+/)?(?P<attempt>\d+)/(?P<of>{CHECKPOINT}/.+|{re.escape(COMMITTED)})$")
_MERGED = re.compile(r"^(?P<attempt>\d+)/[^/]+\.eval$")
log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Left:
    """By earlier attempts: an `outcome` that was never recorded, and whose it was; or the newest that can be resumed."""

    outcome: Settlement | None = None
    outcome_of: int | None = None
    resumable: int | None = None


class Saved:
    def __init__(self, artifacts: Artifacts) -> None:
        self._artifacts = artifacts

    async def left_by(self, job: Job, attempts: Sequence[int]) -> Left:
        """`attempts`: those that were interrupted, newest first."""
        if not attempts:
            return Left()
        names = set(await self._artifacts.names(self._artifacts.url(job.evaluation_id, job.execution_id)))
        for attempt in attempts:
            if f"{attempt}/{OUTCOME}" in names and (outcome := await self._outcome(job, attempt)):
                return Left(outcome=outcome, outcome_of=attempt)
        return Left(resumable=next((a for a in attempts if f"{a}/{COMMITTED}" in names), None))

    async def _outcome(self, job: Job, attempt: int) -> Settlement | None:
        """None: another version of Proctor wrote it, and means something else by it."""
        url = self._artifacts.url(job.evaluation_id, job.execution_id, attempt, OUTCOME)
        try:
            outcome = _SETTLEMENT.validate_json(await self._artifacts.read(url))
        except ValidationError as error:
            wrong = [".".join(map(str, e["loc"])) for e in error.errors(include_input=False, include_url=False)]
            log.warning("an earlier attempt's outcome cannot be read", url=url, fields=wrong)
            return None
        # the tokens were spent by the other attempt, whose last progress is in its own row
        return replace(outcome, usage=None, cost=None)

    async def fetch(self, job: Job, attempt: int) -> None:
        """Puts an earlier attempt's logs and checkpoints into the job's log folder."""
        folder = self._artifacts.url(job.evaluation_id, job.execution_id, attempt, CHECKPOINT)
        names = await self._artifacts.names(folder)
        logs = Path(job.directory, LOGS)
        for name in names:
            await self._artifacts.fetch(f"{folder}/{name}", logs / name.removesuffix(_PART))

    async def made_by(self, job: Job, attempt: int) -> list[Versions]:
        """By which versions an earlier attempt's state was made; an empty one among them: what they were is not known."""
        url = self._artifacts.url(job.evaluation_id, job.execution_id, attempt, COMMITTED)
        try:
            return _MADE_BY.validate_json(await self._artifacts.read(url))
        except ValidationError:  # by a Proctor that did not write them down yet
            return [{}]

    async def take_over(self, job: Job, attempt: int, name: str) -> None:
        """Copies an earlier attempt's log to the job's own folder, where those will look who look by attempt."""
        folder = (job.evaluation_id, job.execution_id)
        file = Path(job.directory, name)
        await self._artifacts.fetch(self._artifacts.url(*folder, attempt, name), file)
        await self._artifacts.ship(file, self._artifacts.url(*folder, job.attempt, name))

    async def keep(self, job: Job, outcome: Settlement) -> None:
        """Failing is no reason not to tell the ledger itself."""
        url = self._artifacts.url(job.evaluation_id, job.execution_id, job.attempt, OUTCOME)
        try:
            await self._artifacts.write(url, _SETTLEMENT.dump_json(outcome))
        except OSError as error:
            log.warning("the outcome could not be kept", url=url, reason=str(error))

    async def supersede(self, evaluation_id: str, execution_id: str, *, counted: str, through: int) -> None:
        """Deletes the merged logs of a report's attempts up to and including `through`, but for the one that counts."""
        folder = self._artifacts.url(evaluation_id, execution_id)
        try:
            names = await self._artifacts.names(folder)
            logs = [match for name in names if (match := _MERGED.match(name)) and int(match["attempt"]) <= through]
            urls = {f"{folder}/{match[0]}" for match in logs} - {counted}
            await self._artifacts.delete(urls)
        except OSError as error:
            log.warning("superseded logs could not be deleted", execution=execution_id, reason=str(error))

    async def discard(self, *of: str, through: float = math.inf) -> None:
        """The checkpoints of an execution (evaluation, execution), of its attempts up to and including `through`, or of a
        whole evaluation, once they are of no use."""
        try:
            for urls in await self.left_behind(*of, through=through):
                await self._artifacts.delete(urls)
        except OSError as error:
            log.warning("checkpoints could not be deleted", of=of, reason=str(error))

    async def left_behind(self, *of: str, through: float = math.inf) -> tuple[list[str], list[str]]:
        """URLs of the checkpoints. Of the two lists the first must be gone before the second is touched: it says which
        checkpoints are whole, and none may be resumed from when it is half gone."""
        folder = self._artifacts.url(*of)
        marks, rest = list[str](), list[str]()
        for name in await self._artifacts.names(folder):
            if (match := _LEFT_BY.match(name)) and int(match["attempt"]) <= through:
                (marks if match["of"] == COMMITTED else rest).append(f"{folder}/{match[0]}")
        return marks, rest


class Shipping:
    """Ships an attempt's checkpoints while it runs. A context manager: leaving it ships what is left.

    `heard`: by which versions it is made, once they are known, and how many checkpoints. `saved` is awaited after the first
    shipment that has a checkpoint of its own: the attempt has come further than the one before. A log alone is no such thing,
    nor is what the one before had saved."""

    def __init__(self, artifacts: Artifacts, job: Job, heard: Heard, saved: Callable[[], Awaitable[object]]) -> None:
        self._artifacts = artifacts
        self._job = job
        self._heard = heard
        self._saved = saved
        self._folder = artifacts.url(job.evaluation_id, job.execution_id, job.attempt)
        self._sent: dict[str, tuple[int, int]] = {}
        self._committed = False
        self._further = False
        self._due = asyncio.Event()

    async def __aenter__(self) -> "Shipping":
        self._task = asyncio.create_task(self._work(), name="ship checkpoints")
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Not shielded: whoever is cancelled while this ships has no time left."""
        self._task.cancel()
        await asyncio.wait({self._task})
        if self._due.is_set() and not (kind and issubclass(kind, StoreUnavailable)):
            await self._ship()

    async def came_further(self) -> None:
        """By what the child itself has put into the store."""
        await self._saved()

    def due(self) -> None:
        self._due.set()

    async def _work(self) -> None:
        while True:
            await self._due.wait()
            await self._ship()

    async def _ship(self) -> None:
        """A checkpoint that cannot be shipped goes with the next."""
        self._due.clear()
        checkpoints = self._heard.checkpoints
        try:
            for name, file in _files(Path(self._job.directory)):
                await self._send(name, file)
            if not self._committed and self._sent:
                made_by = [self._heard.versions, *self._heard.earlier_versions]
                await self._artifacts.write(f"{self._folder}/{COMMITTED}", _MADE_BY.dump_json(made_by))
                self._committed = True
            if checkpoints and not self._further:
                await self._saved()
                self._further = True
        except asyncio.CancelledError:
            self._due.set()
            raise
        except Exception as error:
            log.warning("checkpoint not shipped", **about(self._job.execution_id, self._job.attempt), reason=str(error))

    async def _send(self, name: str, file: Path) -> None:
        with suppress(FileNotFoundError):  # a file of the moment
            mark = _mark(file)
            if self._sent.get(name) != mark:
                await self._artifacts.ship(file, f"{self._folder}/{CHECKPOINT}/{name}")
                self._sent[name] = mark


def _files(directory: Path) -> list[tuple[str, Path]]:
    """All that a resumption needs, commit points last. Listed before anything is sent: what a listed commit point refers
    to is listed too. Logs are taken from where they are not being written to."""
    logs = directory / LOGS
    found = [
        (str(name), file)
        for file in logs.rglob("*")
        if not _of_the_moment(name := file.relative_to(logs)) and file.is_file()
    ]
    # a later copy of the same log may have another ending
    copies = sorted((directory / ENDED).glob("*.eval"), key=lambda file: file.stat().st_mtime_ns)
    kept = list({_original(file.name) + _PART: file for file in copies}.items())
    return [*kept, *sorted(_without_logs(found), key=lambda item: (item[1].name.startswith("ckpt-"), item[0]))]


def _original(name: str) -> str:
    """Of the log that this is a copy of."""
    return f"{name.removesuffix(VALUES)}.eval" if name.endswith(VALUES) else name


def _without_logs(found: Iterable[tuple[str, Path]]) -> list[tuple[str, Path]]:
    return [(name, file) for name, file in found if "/" in name or file.suffix != ".eval"]


def _mark(file: Path) -> tuple[int, int]:
    """Changes when the file does."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _of_the_moment(name: Path) -> bool:
    """`name`: relative to the log folder, `<log>.checkpoints/<sample>/…`. Inspect makes a checkpoint from its `context`, and
    a resumption makes that anew; a restic repository's locks are a process's own. A sandbox may have either name."""
    return name.parts[2:3] == ("context",) or (name.parts[-2:-1] == ("locks",) and name.parts[-3:-2] != ("sandboxes",))
