"""The database's rows in the model's words: evaluations by name, times as what they stand for."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from uuid import UUID

from app.ledger import SweepTimes
from tests.ledger.model_state import Rows

LEASE = 2_000_000.0
FAN_OUT = 20_000.0
SWEEP = SweepTimes(uncertain=2_000, released=200_000, enqueued=20_000_000)
"""Seconds so far apart that each tells which it is, for as long as a test may take."""

_AFTER = {
    "uncertain": SWEEP.uncertain,
    "fan-out": FAN_OUT,
    "released": SWEEP.released,
    "leased": LEASE + SWEEP.uncertain,
    "enqueued": SWEEP.enqueued,
}

# One look at all tables, for it is made after each step
_EVERYTHING = """
SELECT 'evaluation', version, to_jsonb(r) FROM (
  SELECT concat(tableoid, ctid, xmin) AS version, id, state, remaining, cancel_requested_at IS NOT NULL AS cancel,
         results -> 'mark' AS results FROM evaluations) r
UNION ALL SELECT 'execution', version, to_jsonb(r) FROM (
  SELECT concat(tableoid, ctid, xmin) AS version, id, kind, state, attempt, failures, crashes, enqueues, worker, claim_id,
         samples, progress -> 'tokens' AS tokens, error ->> 'message' AS error,
         extract(epoch FROM lease_expires_at - clock_timestamp()) AS lease,
         extract(epoch FROM sweep_at - clock_timestamp()) AS sweep FROM task_executions) r
UNION ALL SELECT 'attempt', version, to_jsonb(r) FROM (
  SELECT concat(tableoid, ctid, xmin) AS version, execution_id, attempt, worker, claim_id, outcome,
         usage -> 'tokens' AS usage FROM execution_attempts) r
UNION ALL SELECT 'sample', version, to_jsonb(r) FROM (
  SELECT concat(tableoid, ctid, xmin) AS version, evaluation_id, sample_id, execution_id AS execution, attempt,
         error IS NOT NULL AS errored, transcript AS log FROM sample_results) r
"""


async def read(connection: Any, names: Mapping[str, str]) -> tuple[Rows, set[str]]:
    """All rows, and their physical versions: these are equal only if nothing at all was written in between, not even the
    same again. `connection`: asyncpg's. `names`: of the evaluations, by id; one that nobody knows of shows with its id."""
    found = await connection.fetch(_EVERYTHING)
    rows = dict(_named(what, json.loads(named(row, names))) for what, _, row in found)
    return rows, {version for _, version, _ in found}


def named(words: str, names: Mapping[str, str]) -> str:
    for id, name in names.items():
        words = words.replace(id, name)
    return words


def _named(what: str, row: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    del row["version"]
    if row.get("claim_id"):
        row["claim_id"] = UUID(row["claim_id"]).int
    match what:
        case "execution":
            running = row["state"] == "running"
            row["tokens"] = row["tokens"] if running else None
            row["samples"] = tuple(sample["id"] for sample in row["samples"] or ())
            row["sweep"] = _why(row["sweep"])
            row["lease"] = None if row["lease"] is None else "held" if row["lease"] > 0 else "over"
            return ("execution", row.pop("id")), row
        case "attempt":
            return ("attempt", row.pop("execution_id"), row.pop("attempt")), row
        case "sample":
            return ("sample", row.pop("evaluation_id"), row.pop("sample_id")), row
    return ("evaluation", row.pop("id")), row


def _why(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    if seconds <= 0:
        return "due"
    return next((why for why, after in _AFTER.items() if 0.8 * after < seconds <= after), f"in {seconds} s")


def differences(foretold: Rows, found: Rows) -> Iterator[str]:
    """One sentence for each row or column that is not as foretold."""
    for key in sorted({*foretold, *found}, key=str):
        row = " ".join(map(str, key))
        if key not in found:
            yield f"{row} is not there"
        elif key not in foretold:
            yield f"{row} should not be there: {found[key]}"
        else:
            columns = {**foretold[key], **found[key]}
            for name in columns:
                should, is_ = foretold[key].get(name), found[key].get(name)
                if should != is_:
                    yield f"{row}: {name} is {is_!r} and should be {should!r}"


def broken_rules(before: Rows, now: Rows) -> Iterator[str]:
    """What must hold of the rows whatever the model says."""
    for key, old in before.items():
        new = now.get(key)
        if new is None:
            yield f"{key} is gone"
        elif key[0] == "sample" and not old["errored"] and new != old:
            yield f"{key} had a score, which was replaced"
        elif key[0] == "execution" and new["attempt"] < old["attempt"]:
            yield f"{key} went back to an earlier attempt"
        elif key[0] == "attempt" and old["outcome"] and new != old:
            yield f"{key} had ended, and ended again"
    for key, row in now.items():
        if key[0] == "evaluation":
            yield from _broken_of_evaluation(key[1], row, [r for k, r in now.items() if _is_of(k, key[1])])


def _is_of(key: tuple[Any, ...], name: str) -> bool:
    return bool(key[0] == "execution" and key[1].partition(".")[0] == name)


def _broken_of_evaluation(name: str, row: dict[str, Any], executions: Sequence[dict[str, Any]]) -> Iterator[str]:
    left = [e for e in executions if e["state"] in ("pending", "running")]
    counted = sum(e["kind"] != "report" for e in left)
    if row["remaining"] != counted:
        yield f"{name} counts {row['remaining']} executions as left, and there are {counted}"
    if row["state"] != "running" and left:
        yield f"{name} is over, and {len(left)} executions are not"
    if row["state"] == "running" and not any(e["sweep"] for e in left):
        yield f"{name} is stranded: nothing will ever enqueue it again"
