"""Reading evaluations, samples and executions: what the API and the command line show."""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Row, Select, and_, func, literal, select, tuple_, union_all
from sqlalchemy.dialects.postgresql import JSONB

from app.database.session import Database
from app.database.tables import evaluations, sample_results, task_executions
from app.errors import InvalidRequest, NotFound
from app.evaluations.explain import Rules
from app.evaluations.history import History
from app.evaluations.spend import Spend, spend
from app.evaluations.views import EvaluationExplanation, EvaluationPage, SampleCounts, SamplePage
from app.evaluations.views import EvaluationView as EvaluationView
from app.evaluations.views import ExecutionView as ExecutionView
from app.evaluations.views import SampleView as SampleView
from app.ledger import EvaluationState
from app.ledger_statements import SAMPLES_PAGE, VERSIONS
from app.spec import INT4
from app.versions import made, mixed

_EXPIRED = evaluations.c.transcripts_expired_at


@dataclass(frozen=True)
class Reader:
    database: Database

    async def evaluation(self, evaluation_id: UUID) -> EvaluationView:
        rows = await self.database.run(select(evaluations).where(evaluations.c.id == evaluation_id))
        if not rows:
            raise NotFound(f"There is no evaluation {evaluation_id}.")
        view = (await self._views(rows))[0]
        return await self._mixed_so_far(view) if view.state == "running" else view

    async def _mixed_so_far(self, view: EvaluationView) -> EvaluationView:
        """Its report will say so in the end."""
        rows = await self.database.run(VERSIONS, {"evaluation": view.id})
        found = mixed(made(row.versions, row.earlier_versions, row.samples) for row in rows)
        return view.model_copy(update={"mixed_versions": found})

    async def by_key(self, caller: str, idempotency_key: str) -> UUID | None:
        """The evaluation that the caller's key stands for, if there is one."""
        e = evaluations.c
        query = select(e.id).where(e.created_by == caller, e.idempotency_key == idempotency_key)
        rows = await self.database.run(query)
        return rows[0].id if rows else None

    async def evaluations(
        self,
        *,
        state: EvaluationState | None = None,
        tags: Sequence[str] = (),
        cursor: str | None = None,
        limit: int = 50,
    ) -> EvaluationPage:
        """Newest first. `tags` are `key=value`; an evaluation must have them all."""
        newest = select(evaluations).order_by(evaluations.c.created_at.desc(), evaluations.c.id.desc()).limit(limit + 1)
        rows = await self.database.run(_filtered(newest, state, tags, cursor))
        page = rows[:limit]
        more = _to_cursor(page[-1].created_at.isoformat(), str(page[-1].id)) if len(rows) > limit else None
        return EvaluationPage(evaluations=await self._views(page), next=more)

    async def samples(self, evaluation_id: UUID, *, cursor: str | None = None, limit: int = 100) -> SamplePage:
        """In the dataset's order, epoch by epoch; those that have not run yet among them."""
        rows = await self.database.run(select(_EXPIRED).where(evaluations.c.id == evaluation_id))
        if not rows:
            raise NotFound(f"There is no evaluation {evaluation_id}.")
        kept = rows[0].transcripts_expired_at is None
        position, place = (0, 0) if cursor is None else _from_cursor(cursor, _place, _place)
        parameters = {"evaluation": evaluation_id, "position": position, "place": place, "most": limit + 1}
        rows = await self.database.run(SAMPLES_PAGE, parameters)
        page = rows[:limit]
        more = _to_cursor(page[-1].position, page[-1].place) if len(rows) > limit else None
        return SamplePage(samples=[_sample(row, kept) for row in page], next=more)

    async def execution(self, execution_id: str, rules: Rules | None = None) -> ExecutionView:
        """`rules`: the service's, for the explanation; by default what they are unless set otherwise."""
        return await History(self.database, rules or Rules()).execution(execution_id)

    async def explanation(self, evaluation_id: UUID, rules: Rules | None = None) -> EvaluationExplanation:
        return await History(self.database, rules or Rules()).explanation(evaluation_id)

    async def _views(self, rows: Sequence[Row[Any]]) -> list[EvaluationView]:
        ids = [row.id for row in rows]
        if not ids:
            return []
        counts, spent = await self._counts(ids), await spend(self.database, ids)
        return [_evaluation(row, counts.get(row.id, SampleCounts()), spent[row.id]) for row in rows]

    async def _counts(self, ids: Sequence[UUID]) -> dict[UUID, SampleCounts]:
        """A sample counts as its execution does; one of many in an execution that has its result before, as its result. One
        statement, so that both are of one moment: between two, an execution can be planned, claimed or retried."""
        e, r = task_executions.c, sample_results.c
        planned = (
            select(
                e.evaluation_id,
                e.state,
                literal(False).label("early"),
                func.sum(func.jsonb_array_length(e.samples)).label("n"),
            )
            .where(e.evaluation_id.in_(ids), e.kind == "run")
            .group_by(e.evaluation_id, e.state)
        )
        early = (
            select(r.evaluation_id, e.state, literal(True).label("early"), func.count().label("n"))
            .join(task_executions, and_(e.id == r.execution_id, e.state != "succeeded"))
            .where(r.evaluation_id.in_(ids), r.error.is_(None))
            .group_by(r.evaluation_id, e.state)
        )
        counts: dict[UUID, dict[str, int]] = {}
        for row in await self.database.run(union_all(planned, early)):
            mine = counts.setdefault(row.evaluation_id, {"total": 0})
            of, n = row.state, int(row.n)
            if row.early:
                mine[of] = mine.get(of, 0) - n
                mine["succeeded"] = mine.get("succeeded", 0) + n
            else:
                mine[of] = mine.get(of, 0) + n
                mine["total"] += n
        return {id: SampleCounts(**n) for id, n in counts.items()}


def _filtered(
    query: Select[Any], state: EvaluationState | None, tags: Sequence[str], cursor: str | None
) -> Select[Any]:
    if state is not None:
        query = query.where(evaluations.c.state == state)
    if tags:
        pairs = dict(_tag(tag) for tag in tags)
        query = query.where(evaluations.c.spec["tags"].cast(JSONB).contains(pairs))
    if cursor is not None:
        created_at, id = _from_cursor(cursor, _moment, UUID)
        query = query.where(tuple_(evaluations.c.created_at, evaluations.c.id) < tuple_(created_at, id))
    return query


def _tag(tag: str) -> tuple[str, str]:
    key, separator, value = tag.partition("=")
    if not separator or not key:
        raise InvalidRequest(f"tag: must be key=value, as in tag=suite=nightly (it is {tag!r}).")
    return key, value


def _to_cursor(*parts: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


def _from_cursor(cursor: str, *types: Any) -> tuple[Any, ...]:
    try:
        parts = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return tuple(t(part) for t, part in zip(types, parts, strict=True))
    except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
        raise InvalidRequest("cursor: not one of ours. Take it from `next` of the page before.") from error


def _place(part: Any) -> int:
    if not isinstance(part, int) or not 0 <= part <= INT4:
        raise ValueError
    return part


def _moment(part: Any) -> datetime:
    """With its time zone, and in years that every time zone can express."""
    moment = datetime.fromisoformat(part)
    if moment.tzinfo is None or not 1970 <= moment.year < 9999:
        raise ValueError
    return moment


def _evaluation(row: Row[Any], counts: SampleCounts, spent: Spend) -> EvaluationView:
    own = row._mapping
    key = row.idempotency_key if row.idempotency_key != str(row.id) else None
    return EvaluationView.model_validate(
        {
            **own,
            "idempotency_key": key,
            "samples": counts,
            "tokens": spent.tokens,
            "cost": spent.cost,
            "cancel_requested": row.cancel_requested_at is not None,
            "mixed_versions": row.mixed_versions or [],
            "log": None if row.transcripts_expired_at else row.log,
            "transcripts_deleted_at": row.transcripts_expired_at,  # no link holds from the moment that it begins
        }
    )


def _sample(row: Row[Any], kept: bool) -> SampleView:
    """`kept`: its transcript still is."""
    return SampleView(
        id=row.sample["id"],
        epoch=row.sample["epoch"],
        state=_sample_state(row),
        scores=row.scores or {},
        usage=row.usage or {},
        cost=row.cost,
        limit=row.limit,
        error=row.error or row.execution_error,
        duration=row.duration,
        transcript=row.transcript if kept else None,
        note=row.note,
        execution=row.execution,
        attempt=row.attempt,
    )


def _sample_state(row: Row[Any]) -> Literal["pending", "running", "succeeded", "failed", "cancelled"]:
    scored = row.transcript is not None and row.error is None
    state: Literal["pending", "running", "succeeded", "failed", "cancelled"] = row.state
    return "succeeded" if scored else state
