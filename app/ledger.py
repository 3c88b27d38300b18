"""The ledger: what makes every retry harmless.

An execution is one unit of queue work. A push *claims* it and becomes its next attempt, with a lease; only the current
attempt can *record*, *renew* and *settle*, and each of these may be sent again after a lost reply. Whoever is late is told
so (`stale`, `lost`), and changes nothing. Outcomes are values: nothing here raises for a race that was lost.

The statements themselves are in `app.ledger_statements`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import zip_longest
from typing import Any, Literal
from uuid import UUID, uuid4

from opentelemetry.metrics import Meter
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Row
from sqlalchemy.ext.asyncio import AsyncConnection

from app import ledger_statements as sql
from app.database.session import Database
from app.metrics import NO_METER, LedgerFigures
from app.runner.messages import Failure, SampleRef, SampleResult, Transcript
from app.spec import Spec
from app.versions import Made, Versions, made

Kind = Literal["plan", "run", "report"]
State = Literal["pending", "running", "succeeded", "failed", "cancelled"]
Outcome = Literal["succeeded", "failed", "cancelled", "interrupted"]
EvaluationState = Literal["running", "succeeded", "failed", "cancelled"]
RetryFound = EvaluationState | Literal["expired", "tidied"]
Kept = Literal["transcripts", "checkpoints"]
"""What is kept of an evaluation that is over, for as long as settings say."""
_SAMPLES = TypeAdapter(tuple[SampleRef, ...])


@dataclass(frozen=True, slots=True)
class Enqueue:
    """A Cloud Task that is to exist: the execution's `number`-th. `traceparent`: its evaluation's trace. `queue`: the name of
    the queue that its spec asks for; None: the service's own."""

    execution_id: str
    number: int
    traceparent: str | None = field(default=None, compare=False)
    queue: str | None = None


@dataclass(frozen=True, slots=True)
class Submitted:
    evaluation_id: UUID
    created: bool
    same: bool
    """False: the idempotency key stands for another spec."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The answer to a push that asked for an execution.

    `claimed`, `taken over` (its lease had run out) and `yours` (this very push has it already: the reply was lost) grant
    it; `held` means that another attempt's lease lasts for `lease_left` seconds more, `over` that it is terminal.
    `refused`: why this version of Proctor cannot carry it out: what is stored (by another version, or another hand) is not
    what it takes. Then `spec` has what can be told of its task and model only, and `samples` are none.
    """

    execution_id: str
    evaluation_id: UUID
    kind: Kind
    verdict: Literal["claimed", "taken over", "yours", "held", "over"]
    state: State
    attempt: int
    crashes: int
    failures: int
    holder: str | None
    lease_left: float | None
    cancel: bool
    spec: Spec
    samples: tuple[SampleRef, ...]
    error: dict[str, Any] | None
    refused: str | None = None
    digests: tuple[int, ...] = ()
    """Of the samples, as planned; none: the plan was made by a Proctor that kept none."""
    stop_reason: str | None = None
    """Why no further run of the evaluation shall start, if none shall."""

    @property
    def granted(self) -> bool:
        return self.verdict in ("claimed", "taken over", "yours")


@dataclass(frozen=True, slots=True)
class End:
    """How an evaluation ends; its report brings it. A cancellation asked for meanwhile goes before `state`."""

    state: EvaluationState
    results: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    error: Failure | None = None
    log: str | None = None
    mixed_versions: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Settlement:
    """What an attempt came to. `samples`: its results with the URL of their log; `replace`: they stand for all that earlier
    attempts of the execution recorded; `runs`: the samples of each run that a plan fans out to, and `digests` theirs;
    `error_limit`: errored samples at which no further run starts; `runs_due`: seconds until the sweeper may enqueue them;
    `max_failures`: how many failures are allowed; `crashed`: the child was lost, which counts towards the crashes;
    `versions`: by which it was made (`app.versions`), and `earlier_versions` those by which the state was that it went on
    from; `cause`: why the service stopped it, if it did."""

    outcome: Outcome
    error: Failure | None = None
    crashed: bool = False
    cause: str | None = None
    max_failures: int = 1
    samples: Sequence[tuple[SampleResult, str]] = ()
    replace: bool = False
    runs: Sequence[Sequence[SampleRef]] = ()
    digests: Sequence[Sequence[int]] = ()
    error_limit: int | None = None
    runs_due: float = 0
    usage: dict[str, Any] | None = None
    cost: float | None = None
    versions: Versions | None = None
    earlier_versions: list[Versions] | None = None
    end: End | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """`recorded` now, `already` recorded by this attempt, or `stale`: a later attempt holds it and nothing was written.
    `state` is the execution's; `report` is the Cloud Task to make if this settle was the last that the report awaited."""

    verdict: Literal["recorded", "already", "stale"]
    state: State
    runs: int = 0
    report: Enqueue | None = None


@dataclass(frozen=True, slots=True)
class Held:
    """One execution that this worker holds."""

    execution_id: str
    attempt: int
    progress: dict[str, Any] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Renewal:
    execution_id: str
    attempt: int
    lost: bool
    cancel: bool
    stopped: bool = False
    """Its evaluation has more errored samples than its policy allows."""


@dataclass(frozen=True, slots=True)
class Cancelled:
    state: EvaluationState
    executions: int
    report: Enqueue | None


@dataclass(frozen=True, slots=True)
class Stop:
    """An evaluation was stopped, having more errored samples than its policy allows. `executions`: how many ended unrun."""

    reason: str
    executions: int
    report: Enqueue | None


@dataclass(frozen=True, slots=True)
class Expired:
    """An evaluation of which something is no longer kept, and until when it is this caller's to delete that."""

    evaluation_id: UUID
    until: datetime


@dataclass(frozen=True, slots=True)
class Plan:
    state: State
    attempt: int
    error: Failure | None


@dataclass(frozen=True, slots=True)
class ToReport:
    """What a report works on: the samples that have a result, and for each that has none, why."""

    transcripts: tuple[Transcript, ...]
    missing: tuple[Failure, ...]


@dataclass(frozen=True, slots=True)
class SweepTimes:
    """Seconds until the sweeper looks at an execution again. `uncertain`: whether its Cloud Task exists is not known, or
    its lease has ended; `released`: its attempt gave it back, and the queue is to deliver it again; `enqueued`: its Cloud
    Task exists, so only a purge can have taken it."""

    uncertain: float = 120
    released: float = 600
    enqueued: float = 86_400


class Ledger:
    """The transitions. `lease`: seconds an attempt may act without renewal."""

    def __init__(
        self,
        database: Database,
        *,
        lease: float,
        worker: str,
        revision: str = "",
        sweep: SweepTimes | None = None,
        meters: Meter = NO_METER,
    ) -> None:
        self._database = database
        self._figures = LedgerFigures(meters)
        self._lease = lease
        self._sweep = sweep or SweepTimes()
        self._worker = worker
        self._revision = revision

    async def submit(
        self, spec: Spec, created_by: str, idempotency_key: str | None = None, traceparent: str | None = None
    ) -> Submitted:
        """The evaluation and its plan, one statement. Without a key, its own id is the key, so that a lost reply cannot
        make two of it. `traceparent`: of the trace that all its Cloud Tasks shall belong to."""
        evaluation = uuid4()
        parameters = {
            "evaluation": evaluation,
            "created_by": created_by,
            "idempotency_key": idempotency_key or str(evaluation),
            "spec": spec.model_dump(mode="json", exclude_unset=True),
            "spec_digest": spec.digest(),
            "traceparent": traceparent,
            "sweep": self._sweep.uncertain,
        }
        (row,) = await self._database.run(sql.SUBMIT, parameters)
        return Submitted(row.id, row.created, row.same)

    async def claim(self, execution_id: str, claim_id: UUID, push: dict[str, str] | None = None) -> Claim | None:
        """`claim_id` is made for one push; None: no such execution. A claim never ends an execution: one that comes back
        with `cancel`, or with too many `crashes`, is for the caller to settle."""
        parameters = {
            "id": execution_id,
            "claim_id": claim_id,
            "worker": self._worker,
            "revision": self._revision,
            "lease": self._lease,
            "push": push,
            "sweep": self._sweep.uncertain,
        }
        rows = await self._database.run(sql.CLAIM, parameters)
        if not rows:
            self._figures.claimed("none", "unknown")
            return None
        self._figures.claimed(rows[0].kind, rows[0].verdict)
        claim = _claim(execution_id, rows[0])
        if not (claim.granted and (claim.cancel or claim.stop_reason)):
            return claim
        # It may have waited for a retry, which takes the wish back, and have seen the evaluation as it was before.
        (now,) = await self._database.run(sql.CANCELLED, {"evaluation": claim.evaluation_id})
        return replace(claim, cancel=now.cancel, stop_reason=now.stop_reason)

    async def record(
        self,
        execution_id: str,
        attempt: int,
        samples: Sequence[tuple[SampleResult, str]],
        versions: Versions | None = None,
        earlier_versions: Sequence[Versions] | None = None,
    ) -> bool:
        """Results of samples that ended while the attempt goes on, and by which versions; False: it is not ours any more,
        nothing was written."""
        parameters = {
            "id": execution_id,
            "attempt": attempt,
            "samples": _rows(samples),
            "versions": versions,
            "earlier_versions": earlier_versions,
        }
        (row,) = await self._database.run(sql.RECORD, parameters)
        if not row.held:
            self._figures.stale("record")
        return bool(row.held)

    async def renew(self, held: Iterable[Held], *, patience: float | None = None) -> list[Renewal]:
        """All of a worker's leases in one statement, with their progress."""
        mine = [{"id": h.execution_id, "attempt": h.attempt, "progress": h.progress} for h in held]
        parameters = {"mine": mine, "lease": self._lease, "sweep": self._sweep.uncertain}
        rows = await self._database.run(sql.RENEW, parameters, patience=patience)
        return [Renewal(r.id, r.attempt, r.lost, r.cancel, r.stopped or False) for r in rows]

    async def settle(self, execution_id: str, attempt: int, settlement: Settlement) -> Settled | None:
        """Ends the attempt, once; None: no such execution."""
        sweep = {"sweep": self._sweep.uncertain, "sweep_released": self._sweep.released}
        rows = await self._database.run(sql.SETTLE, _settle_parameters(execution_id, attempt, settlement) | sweep)
        if not rows:
            return None
        (row,) = rows
        if row.verdict == "stale":
            self._figures.stale("settle")
        elif row.state == "pending":
            self._figures.retried(settlement.cause or settlement.outcome)
        return Settled(row.verdict, row.state, row.runs, _report(row))

    async def stop_if_exceeded(
        self, evaluation_id: UUID, execution_id: str, attempt: int, errored: int = 0
    ) -> Stop | None:
        """Ends what is pending of an evaluation that has more errored samples than its policy allows; what runs learns of it
        by renewal. `errored`: this attempt's so far, whose error is final; once the run has failed for good, its row tells.
        To be called after these are recorded. A worker that dies before it leaves the stop to the next error."""
        mine = {"id": execution_id, "attempt": attempt, "errored": errored}
        await self._database.run(sql.MARK_ERRORED, mine)
        rows = await self._database.run(sql.STOP, {"evaluation": evaluation_id, "sweep": self._sweep.uncertain})
        return Stop(rows[0].stop_reason, rows[0].ended, _report(rows[0])) if rows else None

    async def cancel(self, evaluation_id: UUID) -> Cancelled | None:
        """Ends what is pending at once; what runs learns of it by renewal. Harmless on an evaluation that is over."""
        parameters = {"evaluation": evaluation_id, "sweep": self._sweep.uncertain}
        rows = await self._database.run(sql.CANCEL, parameters)
        return Cancelled(rows[0].state, rows[0].cancelled, _report(rows[0])) if rows else None

    async def retry(self, evaluation_id: UUID) -> tuple[RetryFound, int] | None:
        """Opens a terminal evaluation again: its failed and cancelled runs, or else its plan or its report. Returns the
        state it found and how many executions are pending again (0: nothing was to be done, or it is not terminal).
        `expired`: its transcripts are no longer kept, so no report could be made again; `tidied`: a sweep is deleting what
        is left of its checkpoints just now."""
        done: tuple[RetryFound, int] | None = None

        async def work(connection: AsyncConnection) -> tuple[RetryFound, int] | None:
            nonlocal done
            found = (await connection.execute(sql.LOCK_TO_RETRY, {"evaluation": evaluation_id})).one_or_none()
            if found is None:
                return None
            if found.state == "running":
                return done or (found.state, 0)  # the reply to our own COMMIT was lost
            if found.expired or found.tidied:
                return ("expired" if found.expired else "tidied"), 0
            for what in _retry_order(found):
                parameters = {"evaluation": evaluation_id, "what": what}
                n = (await connection.execute(sql.REARM, parameters)).scalar_one()
                if n:
                    remaining = 0 if what == "report" else n
                    await connection.execute(sql.REOPEN, {"evaluation": evaluation_id, "remaining": remaining})
                    done = found.state, n
                    return done
            return found.state, 0

        return await self._database.transaction(work)

    async def take_due(self, most: int) -> list[Enqueue]:
        """Executions whose `sweep_at` has come, each with the number of the Cloud Task to make now. Once taken they are
        due again soon, unless `enqueued` says that the Cloud Task exists."""
        rows = await self._database.run(sql.TAKE_DUE, {"most": most, "sweep": self._sweep.uncertain})
        return [Enqueue(r.id, r.enqueues, r.traceparent, r.queue) for r in rows]

    async def enqueued(self, tasks: Sequence[Enqueue]) -> None:
        parameters = {
            "tasks": [{"id": t.execution_id, "number": t.number} for t in tasks],
            "sweep_enqueued": self._sweep.enqueued,
        }
        await self._database.run(sql.ENQUEUED, parameters)

    async def waiting(self) -> tuple[float, int]:
        """How long (seconds) the oldest of what is pending has been so, and how many are."""
        (row,) = await self._database.run(sql.WAITING)
        return row.oldest, row.pending

    async def all_due(self) -> None:
        """After the queue itself was lost, or purged: whatever is not terminal needs a new Cloud Task."""
        await self._database.run(sql.ALL_DUE)

    async def scored(self, claim: Claim) -> set[tuple[str, int]]:
        """(sample id as text, epoch) of the claimed execution's samples that have their score already."""
        rows = await self._database.run(sql.SCORED, {"id": claim.execution_id})
        return {(r.sample_id, r.epoch) for r in rows}

    async def interrupted(self, claim: Claim) -> list[int]:
        """Attempts since the last that ended by itself, newest first: none of them was the evaluation's own end."""
        if claim.attempt == 1:
            return []
        parameters = {"id": claim.execution_id, "attempt": claim.attempt}
        return [r.attempt for r in await self._database.run(sql.INTERRUPTED, parameters)]

    async def unfinished(self, evaluation_id: UUID) -> list[str]:
        """Ids of the evaluation's executions that are not terminal."""
        return [r.id for r in await self._database.run(sql.UNFINISHED, {"evaluation": evaluation_id})]

    async def plan(self, evaluation_id: UUID) -> Plan:
        (row,) = await self._database.run(sql.PLAN, {"id": f"{evaluation_id}.plan"})
        return Plan(row.state, row.attempt, Failure.model_validate(row.error) if row.error else None)

    async def spent(self, execution_id: str, attempt: int, usage: Mapping[str, Any], cost: float | None) -> None:
        """What an attempt has spent that was taken over meanwhile, and so can settle nothing. `cost`: US dollars."""
        parameters = {"id": execution_id, "attempt": attempt, "usage": usage, "cost": cost}
        await self._database.run(sql.SPENT, parameters)

    async def counted_log(self, evaluation_id: UUID) -> str | None:
        """The merged log, as recorded; None: there is none, or a report is at work on another."""
        rows = await self._database.run(sql.COUNTED_LOG, {"evaluation": evaluation_id})
        return rows[0].log if rows else None

    async def versions(self, evaluation_id: UUID) -> list[Made]:
        """By which versions its samples were made, with how many of them each."""
        rows = await self._database.run(sql.VERSIONS, {"evaluation": evaluation_id})
        return [made(r.versions, r.earlier_versions, r.samples) for r in rows]

    async def expire(self, what: Kept, *, days: float) -> list[Expired]:
        """Evaluations that were over `days` ago and still have that: up to `EXPIRED_AT_ONCE`, each this caller's alone to
        delete it for a lease. Transcripts are lost from now on: their evaluation cannot be retried."""
        statement = sql.EXPIRE_TRANSCRIPTS if what == "transcripts" else sql.EXPIRE_CHECKPOINTS
        rows = await self._database.run(statement, {"days": days, "lease": self._lease})
        return [Expired(r.id, r.retention_lease) for r in rows]

    async def expired(self, what: Kept, expired: Expired, *, done: bool) -> None:
        """Nothing of that is left, if `done`; else the next sweep goes on with it."""
        parameters = {"evaluation": expired.evaluation_id, "until": expired.until, "what": what, "done": done}
        await self._database.run(sql.EXPIRED, parameters)

    async def to_report(self, evaluation_id: UUID) -> ToReport:
        rows = await self._database.run(sql.TO_REPORT, {"evaluation": evaluation_id})
        transcripts = [
            Transcript(sample=SampleRef.model_validate(r.sample), log=r.transcript, digest=r.digest)
            for r in rows
            if r.transcript
        ]
        missing = [_reason(r.state, r.error) for r in rows if not r.transcript]
        return ToReport(tuple(transcripts), tuple(missing))


def _claim(execution_id: str, row: Row[Any]) -> Claim:
    """Never raises: the claim has been granted already, and whoever raised now would leave it to its lease, each time."""
    spec, samples, refused = _work(row)
    return Claim(
        execution_id=execution_id,
        evaluation_id=row.evaluation_id,
        kind=row.kind,
        verdict=row.verdict,
        state=row.state,
        attempt=row.attempt,
        crashes=row.crashes,
        failures=row.failures,
        holder=row.holder,
        lease_left=row.lease_left,
        cancel=row.cancel,
        spec=spec,
        samples=samples,
        error=row.error,
        refused=refused,
        digests=tuple(row.digests or ()),
        stop_reason=row.stop_reason,
    )


def _work(row: Row[Any]) -> tuple[Spec, tuple[SampleRef, ...], str | None]:
    """What is stored, or why this version does not take it."""
    try:
        return Spec.model_validate(row.spec), _SAMPLES.validate_python(row.samples or ()), None
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)
        why = "; ".join(f"{'.'.join(map(str, one['loc'])) or error.title}: {one['msg']}" for one in wrong)
        stored = row.spec if isinstance(row.spec, dict) else {}
        spec = Spec.model_construct(task=str(stored.get("task", "")), model=str(stored.get("model", "")))
        return spec, (), f"This version of Proctor does not take the stored spec: {why}."


def _settle_parameters(execution_id: str, attempt: int, s: Settlement) -> dict[str, Any]:
    end = s.end or End("failed")
    return {
        "id": execution_id,
        "attempt": attempt,
        "outcome": s.outcome,
        "crashed": s.crashed,
        "max_failures": s.max_failures,
        "error": _dump(s.error),
        "samples": _rows(s.samples),
        "replace": s.replace,
        "runs": [
            {"n": n, "samples": [r.model_dump() for r in run], "digests": digests}
            for n, (run, digests) in enumerate(zip_longest(s.runs, s.digests), 1)
        ],
        "runs_due": float(s.runs_due),
        "error_limit": s.error_limit,
        "usage": s.usage,
        "cost": s.cost,
        "versions": s.versions,
        "earlier_versions": s.earlier_versions,
        "end_state": end.state,
        "results": end.results,
        # came to nothing: what an earlier report had come to stands
        "reports": any(part is not None for part in (end.results, end.log, end.mixed_versions)),
        "end_usage": end.usage,
        "end_error": _dump(end.error),
        "log": end.log,
        "mixed_versions": end.mixed_versions,
    }


def _rows(samples: Sequence[tuple[SampleResult, str]]) -> list[dict[str, Any]]:
    """Rows for one upsert, which may not meet the same sample twice: the last result of each counts."""
    rows = {}
    for result, transcript in samples:
        row = result.model_dump(mode="json", exclude={"sample", "log"})
        key = (str(result.sample.id), result.sample.epoch)
        rows[key] = row | {"sample_id": key[0], "epoch": key[1], "transcript": transcript}
    return list(rows.values())


def _dump(failure: Failure | None) -> dict[str, Any] | None:
    return failure.model_dump(exclude_none=True) if failure else None


def _retry_order(found: Row[Any]) -> tuple[str, ...]:
    """What to arm again, in order. Without any run the plan never got to fan out, whatever its state says."""
    if found.runs == 0:
        return ("plan",)
    return ("runs",) if found.state == "succeeded" else ("runs", "report")


def _reason(state: str, error: dict[str, Any] | None) -> Failure:
    """Why a sample has no result."""
    if error:
        return Failure.model_validate(error)
    return Failure(
        error_class="cancelled" if state == "cancelled" else "infrastructure", message=f"Its run was {state}."
    )


def _report(row: Row[Any]) -> Enqueue | None:
    return Enqueue(row.report, row.report_enqueues, row.traceparent, row.queue) if row.report else None
