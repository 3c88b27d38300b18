"""What evaluations have spent, and how much of that retries have wasted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from sqlalchemy import ARRAY, Uuid, bindparam, text

from app.database.session import Database
from app.evaluations.views import Tokens


@dataclass(frozen=True)
class Spend:
    """`cost`: US dollars behind the results that stand, where Inspect knows the prices."""

    tokens: Tokens = field(default_factory=Tokens)
    cost: float | None = None


# An attempt's usage is its own last progress; rows from before that have tokens by model, as results still do.
#
# Execution by execution, because what an open one has spent is not wasted as long as the next attempt may go on with it:
# there, only attempts that ended by themselves are given up, and only scores stand. A lost attempt's last progress may be
# older than its last result: what is useful was spent, too.
#
# The ids of an evaluation's executions begin with its own and '.', and sort by bytes, so their attempts lie side by side in
# the index; '/' comes after '.'.
SPEND = text("""/* evaluations.spend */
SELECT v.id, s.spent, s.useful, s.wasted, s.cost
FROM unnest(:ids) AS v(id)
CROSS JOIN LATERAL (
  SELECT sum(greatest(x.spent, x.useful))::bigint AS spent, sum(x.useful)::bigint AS useful,
         sum(greatest(CASE WHEN x.open THEN x.given_up ELSE x.spent END - x.useful, 0))::bigint AS wasted, sum(x.cost) AS cost
  FROM (
    SELECT o.open, coalesce(t.given_up, 0) AS given_up, r.cost,
           coalesce(t.spent, 0) + CASE e.state WHEN 'running' THEN coalesce((e.progress ->> 'tokens')::numeric, 0) ELSE 0 END
             AS spent,
           coalesce(CASE WHEN o.open THEN r.scored ELSE r.recorded END, 0) AS useful
    FROM task_executions e
    CROSS JOIN LATERAL (SELECT e.state IN ('pending', 'running') AS open) o
    LEFT JOIN (
      SELECT a.execution_id, sum(u.tokens) AS spent, sum(u.tokens) FILTER (WHERE a.outcome <> 'interrupted') AS given_up
      FROM execution_attempts a
      CROSS JOIN LATERAL (
        SELECT CASE WHEN jsonb_typeof(a.usage -> 'tokens') = 'number' THEN (a.usage ->> 'tokens')::numeric
                    ELSE (SELECT sum((m.value ->> 'total_tokens')::numeric) FROM jsonb_each(a.usage) m) END AS tokens OFFSET 0
      ) u
      WHERE a.execution_id > v.id || '.' AND a.execution_id < v.id || '/' GROUP BY a.execution_id
    ) t ON t.execution_id = e.id
    LEFT JOIN (
      SELECT r.execution_id, sum(r.cost) AS cost, sum(u.tokens) AS recorded,
             sum(u.tokens) FILTER (WHERE r.error IS NULL) AS scored
      FROM sample_results r
      CROSS JOIN LATERAL (SELECT sum((m.value ->> 'total_tokens')::numeric) AS tokens FROM jsonb_each(r.usage) m) u
      WHERE r.evaluation_id = v.id GROUP BY r.execution_id
    ) r ON r.execution_id = e.id
    WHERE e.evaluation_id = v.id
  ) x
) s
""").bindparams(bindparam("ids", type_=ARRAY(Uuid())))


async def spend(database: Database, evaluations: Sequence[UUID]) -> dict[UUID, Spend]:
    rows = await database.run(SPEND, {"ids": list(evaluations)})
    return {
        row.id: Spend(Tokens(spent=row.spent or 0, useful=row.useful or 0, wasted=row.wasted or 0), row.cost)
        for row in rows
    }


def tokens_of(usage: Mapping[str, Any] | None) -> int | None:
    """Of one attempt's usage, in either of the forms that rows have."""
    if usage is None:
        return None
    if isinstance(usage.get("tokens"), int):
        return int(usage["tokens"])
    models = [model for model in usage.values() if isinstance(model, Mapping)]
    return sum(int(model.get("total_tokens") or 0) for model in models)
