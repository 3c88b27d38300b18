"""The ledger's statements: one per transition, one round trip each, autocommitted at READ COMMITTED.

Each is built the same way:

- ``target`` locks the execution's row and so sees its newest version;
- ``decision`` decides from the locked row alone: any other look at a table shows the statement's old snapshot;
- everything else hangs on ``decision``.

Locks go executions (by id) → attempts, samples → evaluation; statements over many rows order by id or SKIP LOCKED. Times
are ``clock_timestamp()``, read after the lock is held: ``now()`` is when the statement began to wait.
"""

from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    BindParameter,
    Boolean,
    DateTime,
    Double,
    Integer,
    Text,
    TextClause,
    Uuid,
    bindparam,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeEngine

_TYPES: dict[str, TypeEngine[Any]] = {
    "evaluation": Uuid(),
    "claim_id": Uuid(),
    "error": JSONB(none_as_null=True),
    "push": JSONB(none_as_null=True),
    "usage": JSONB(none_as_null=True),
    "results": JSON(none_as_null=True),
    "versions": JSONB(none_as_null=True),
    "earlier_versions": JSONB(none_as_null=True),
    "mixed_versions": JSONB(none_as_null=True),
    "end_usage": JSONB(none_as_null=True),
    "end_error": JSONB(none_as_null=True),
    "samples": JSONB(),
    "runs": JSONB(),
    "spec": JSONB(),
    "mine": JSONB(),
    "tasks": JSONB(),  # not two arrays: the driver would ask the server about their types, once a connection
    "cost": Double(),
    "lease": Double(),
    "runs_due": Double(),
    "sweep": Double(),
    "sweep_released": Double(),
    "sweep_enqueued": Double(),
    "days": Double(),
    "until": DateTime(timezone=True),
    "done": Boolean(),
    "attempt": Integer(),
    "max_failures": Integer(),
    "errored": Integer(),
    "error_limit": Integer(),
    "remaining": Integer(),
    "most": Integer(),
    "position": Integer(),
    "place": BigInteger(),
    "crashed": Boolean(),
    "replace": Boolean(),
    "reports": Boolean(),
    "end_state": Text(),
    "log": Text(),
}


def _statement(name: str, sql: str) -> TextClause:
    """The statement with its name in front, so that the database's own views and logs say which it is."""
    clause = text(f"/* ledger.{name} */ {sql}")
    typed: list[BindParameter[Any]] = [bindparam(p, type_=_TYPES.get(p, Text())) for p in clause._bindparams]
    return clause.bindparams(*typed)


# A scored sample is never replaced; an errored one is, by a later attempt. `source`: the rows that hold the execution;
# `replaced`: what else is. `news`: it is progress; the same error once more is not, or what fails beside it could go round
# for ever.
_RESULTS_OF = """INSERT INTO sample_results AS r (evaluation_id, sample_id, epoch, execution_id, attempt, scores, usage, cost,
                                   "limit", error, duration, transcript, note)
  SELECT s.evaluation_id, n.sample_id, n.epoch, s.id, :attempt, n.scores, n.usage, n.cost, n."limit", n.error, n.duration,
         n.transcript, n.note
  FROM {source} s, jsonb_to_recordset(:samples) AS n(sample_id text, epoch int, scores jsonb, usage jsonb, cost float8,
                                                     "limit" text, error jsonb, duration float8, transcript text,
                                                     note text)
  ON CONFLICT (evaluation_id, sample_id, epoch) DO UPDATE
  SET execution_id = excluded.execution_id, attempt = excluded.attempt, scores = excluded.scores, usage = excluded.usage,
      cost = excluded.cost, "limit" = excluded."limit", error = excluded.error, duration = excluded.duration,
      transcript = excluded.transcript, note = excluded.note, recorded_at = clock_timestamp()
  WHERE r.error IS NOT NULL AND r.attempt < excluded.attempt{replaced}
  RETURNING r.xmax = 0 OR r.error IS NULL AS news"""

# After a retry of the evaluation, or a report that a cancellation overtook, the same row reports again.
_REPORT_AGAIN = """ON CONFLICT (id) DO UPDATE
  SET state = 'pending', failures = 0, crashes = 0, error = NULL, finished_at = NULL, enqueues = e.enqueues + 1,
      sweep_at = excluded.sweep_at"""


# Inserting it twice is the same as once: a lost reply, a second caller with the same key. DO UPDATE, not DO NOTHING: a
# concurrent winner's row must come back too. The row locked last is the evaluation's; a new plan has no rivals.
SUBMIT = _statement(
    "submit",
    """
WITH evaluation AS (
  INSERT INTO evaluations (id, created_by, idempotency_key, spec, spec_digest, traceparent)
  VALUES (:evaluation, :created_by, :idempotency_key, :spec, :spec_digest, :traceparent)
  ON CONFLICT (created_by, idempotency_key) DO UPDATE SET idempotency_key = excluded.idempotency_key
  RETURNING id, spec_digest
), plan AS (
  INSERT INTO task_executions (id, evaluation_id, kind, position, enqueues, sweep_at)
  SELECT id || '.plan', id, 'plan', 0, 1, clock_timestamp() + make_interval(secs => :sweep)
  FROM evaluation WHERE id = :evaluation
  ON CONFLICT (id) DO NOTHING
)
SELECT id, id = :evaluation AS created, spec_digest = :spec_digest AS same FROM evaluation
""",
)

CLAIM = _statement(
    "claim",
    """
WITH target AS MATERIALIZED (
  SELECT * FROM task_executions WHERE id = :id FOR NO KEY UPDATE
), decision AS MATERIALIZED (
  SELECT t.*, CASE WHEN t.state = 'pending' THEN 'claimed'
                   WHEN t.state = 'running' AND t.claim_id = :claim_id THEN 'yours'
                   WHEN t.state = 'running' AND t.lease_expires_at <= clock_timestamp() THEN 'taken over'
                   WHEN t.state = 'running' THEN 'held'
                   ELSE 'over' END AS verdict
  FROM target t
), claimed AS (
  UPDATE task_executions e
  SET state = 'running', attempt = d.attempt + 1, claim_id = :claim_id, worker = :worker, progress = NULL,
      finished_at = NULL,  -- it is; but CHECKs meet the snapshot's row first, which a retry may just have replaced
      crashes = d.crashes + (d.verdict = 'taken over')::int,
      lease_expires_at = clock_timestamp() + make_interval(secs => :lease),
      sweep_at = clock_timestamp() + make_interval(secs => :lease + :sweep)
  FROM decision d WHERE e.id = d.id AND d.verdict IN ('claimed', 'taken over')
  RETURNING e.id, e.attempt, e.crashes
), lost AS (  -- the last progress of the attempt that died is all that is known of what it spent
  UPDATE execution_attempts a
  SET outcome = 'interrupted', ended_at = clock_timestamp(), usage = d.progress,
      cost = nullif((d.progress ->> 'cost')::float8, 0),
      error = jsonb_build_object('error_class', 'infrastructure',
                                 'message', 'The lease of ' || d.worker || ' ran out: the worker or its child was lost.')
  FROM decision d
  WHERE d.verdict = 'taken over' AND a.execution_id = d.id AND a.attempt = d.attempt AND a.outcome IS NULL
), opened AS (
  INSERT INTO execution_attempts (execution_id, attempt, claim_id, worker, revision, push)
  SELECT c.id, c.attempt, :claim_id, :worker, :revision, :push FROM claimed c
)
SELECT d.verdict, coalesce(c.attempt, d.attempt) AS attempt, coalesce(c.crashes, d.crashes) AS crashes, d.failures,
       d.kind, d.state, d.samples, to_jsonb(d.digests) AS digests, d.worker AS holder, d.error, d.evaluation_id,
       extract(epoch FROM d.lease_expires_at - clock_timestamp())::float8 AS lease_left,
       v.spec, v.cancel_requested_at IS NOT NULL AS cancel, v.stop_reason
FROM decision d JOIN evaluations v ON v.id = d.evaluation_id LEFT JOIN claimed c ON true
""",
)

# What a claim says of it is as old as its snapshot, which is older than the row that it waited for.
CANCELLED = _statement(
    "cancelled",
    "SELECT cancel_requested_at IS NOT NULL AS cancel, stop_reason FROM evaluations WHERE id = :evaluation",
)

# Finish, failure with tries left, and release are one statement. The attempt is mine and running: recorded; mine and not
# running: only I can have settled it, so my reply was lost; else a later attempt holds it, and I am stale.
# The count(*) over `results` and `dropped` makes the samples go in before the evaluation's row is locked.
SETTLE = _statement(
    "settle",
    f"""
WITH target AS MATERIALIZED (
  SELECT * FROM task_executions WHERE id = :id FOR NO KEY UPDATE
), decision AS MATERIALIZED (
  SELECT t.*,
         CASE WHEN t.attempt = :attempt AND t.state = 'running' THEN 'recorded'
              WHEN t.attempt = :attempt THEN 'already' ELSE 'stale' END AS verdict,
         CASE WHEN :outcome = 'interrupted' OR (:outcome = 'failed' AND t.failures + 1 < :max_failures) THEN 'pending'
              ELSE :outcome END AS next
  FROM target t
), results AS (
  {_RESULTS_OF.format(source="(SELECT * FROM decision WHERE verdict = 'recorded')", replaced=" OR :replace")}
), settled AS (
  UPDATE task_executions e
  SET state = d.next, failures = d.failures + (:outcome = 'failed')::int, error = :error,
      crashes = CASE WHEN (SELECT bool_or(news) FROM results) THEN 0 ELSE d.crashes END + (:crashed)::int,
      claim_id = NULL, worker = NULL, lease_expires_at = NULL,
      sweep_at = CASE d.next WHEN 'pending' THEN clock_timestamp() + make_interval(secs => :sweep_released) END,
      finished_at = CASE d.next WHEN 'pending' THEN NULL ELSE clock_timestamp() END
  FROM decision d WHERE e.id = d.id AND d.verdict = 'recorded'
  RETURNING e.id, e.evaluation_id, e.kind, e.state
), closed AS (
  UPDATE execution_attempts a
  SET outcome = :outcome, ended_at = clock_timestamp(), error = :error, usage = :usage, cost = :cost,
      versions = coalesce(:versions, a.versions), earlier_versions = coalesce(:earlier_versions, a.earlier_versions)
  FROM settled s WHERE a.execution_id = s.id AND a.attempt = :attempt
), dropped AS (  -- by a run that did not come to these samples, where one run's results stand together
  DELETE FROM sample_results r USING settled s
  WHERE :replace AND r.evaluation_id = s.evaluation_id AND r.execution_id = s.id
    AND NOT EXISTS (SELECT FROM jsonb_to_recordset(:samples) AS n(sample_id text, epoch int)
                    WHERE n.sample_id = r.sample_id AND n.epoch = r.epoch)
  RETURNING 1
), counted AS (
  UPDATE evaluations v
  SET remaining = v.remaining - (s.kind <> 'report')::int
                  + CASE WHEN v.cancel_requested_at IS NULL THEN jsonb_array_length(:runs) ELSE 0 END,
      versions = coalesce(v.versions, '{{}}') || coalesce(:versions, '{{}}'),
      error_limit = CASE s.kind WHEN 'plan' THEN :error_limit ELSE v.error_limit END,
      state = CASE WHEN s.kind <> 'report' THEN v.state WHEN v.cancel_requested_at IS NULL THEN :end_state
                   ELSE 'cancelled' END,
      results = CASE WHEN s.kind = 'report' AND :reports THEN :results ELSE v.results END,
      usage = CASE WHEN s.kind = 'report' AND :reports THEN :end_usage ELSE v.usage END,
      error = CASE s.kind WHEN 'report' THEN :end_error ELSE v.error END,
      log = CASE WHEN s.kind = 'report' AND :reports THEN :log ELSE v.log END,
      mixed_versions = CASE WHEN s.kind = 'report' AND :reports THEN :mixed_versions ELSE v.mixed_versions END,
      finished_at = CASE s.kind WHEN 'report' THEN clock_timestamp() END
  FROM settled s, (SELECT count(*) FROM results) AS written, (SELECT count(*) FROM dropped) AS no_more
  WHERE v.id = s.evaluation_id AND s.state <> 'pending'
  RETURNING v.id, v.remaining, v.state, s.kind, v.cancel_requested_at IS NULL AS fan_out, v.traceparent,
    v.spec ->> 'queue' AS queue
), runs AS (
  INSERT INTO task_executions (id, evaluation_id, kind, position, samples, digests, sweep_at)
  SELECT c.id || '.' || r.n, c.id, 'run', r.n, r.samples, r.digests,
         clock_timestamp() + make_interval(secs => :runs_due)
  FROM counted c, jsonb_to_recordset(:runs) AS r(n int, samples jsonb, digests bigint[]) WHERE c.fan_out
  RETURNING 1
), report AS (
  INSERT INTO task_executions AS e (id, evaluation_id, kind, position, enqueues, sweep_at)
  SELECT c.id || '.report', c.id, 'report', 2147483647, 1, clock_timestamp() + make_interval(secs => :sweep)
  FROM counted c WHERE c.kind <> 'report' AND c.remaining = 0
  {_REPORT_AGAIN}
  RETURNING e.id, e.enqueues
)
SELECT d.verdict, CASE d.verdict WHEN 'recorded' THEN d.next ELSE d.state END AS state, d.attempt AS current_attempt,
       c.remaining, (SELECT count(*) FROM runs) AS runs, report.id AS report, report.enqueues AS report_enqueues,
       c.traceparent, c.queue
FROM decision d LEFT JOIN counted c ON true LEFT JOIN report ON true
""",
)

# The same fence and the same upsert, while the attempt goes on. A result is progress, and so is a checkpoint (no samples):
# the neighbours of an out-of-memory are not punished for ever.
RECORD = _statement(
    "record",
    f"""
WITH target AS MATERIALIZED (
  SELECT id, evaluation_id, crashes FROM task_executions
  WHERE id = :id AND attempt = :attempt AND state = 'running' FOR NO KEY UPDATE
), results AS (
  {_RESULTS_OF.format(source="target", replaced="")}
), progressed AS (
  UPDATE task_executions e SET crashes = 0 FROM target t
  WHERE e.id = t.id AND t.crashes > 0 AND (jsonb_array_length(:samples) = 0 OR (SELECT bool_or(news) FROM results))
), made AS (  -- with the first sample, for an attempt that is lost settles nothing
  UPDATE execution_attempts a SET versions = :versions, earlier_versions = :earlier_versions
  FROM target t WHERE a.execution_id = t.id AND a.attempt = :attempt AND :versions IS NOT NULL AND a.versions IS NULL
)
SELECT count(*) = 1 AS held FROM target
""",
)

# Expiry is not asked: an expired lease that nobody took is still ours.
RENEW = _statement(
    "renew",
    """
WITH mine AS MATERIALIZED (
  SELECT * FROM jsonb_to_recordset(:mine) AS m(id text, attempt int, progress jsonb)
), held AS MATERIALIZED (
  SELECT e.id, e.attempt, e.evaluation_id, m.progress
  FROM task_executions e JOIN mine m ON e.id = m.id COLLATE "C" AND e.attempt = m.attempt WHERE e.state = 'running'
  ORDER BY e.id FOR NO KEY UPDATE OF e
), renewed AS (
  UPDATE task_executions e
  SET lease_expires_at = clock_timestamp() + make_interval(secs => :lease),
      sweep_at = clock_timestamp() + make_interval(secs => :lease + :sweep),
      progress = coalesce(h.progress, e.progress)
  FROM held h WHERE e.id = h.id
)
SELECT m.id, m.attempt, h.id IS NULL AS lost, v.cancel_requested_at IS NOT NULL AS cancel,
       v.stopped_at IS NOT NULL AS stopped
FROM mine m LEFT JOIN held h ON h.id = m.id COLLATE "C" AND h.attempt = m.attempt
LEFT JOIN evaluations v ON v.id = h.evaluation_id
""",
)

# Never waits for an execution: what it skips learns of it by claim, by renewal or by the plan's settle.
CANCEL = _statement(
    "cancel",
    f"""
WITH pending AS MATERIALIZED (
  SELECT id FROM task_executions
  WHERE evaluation_id = :evaluation AND state = 'pending' AND kind <> 'report' FOR NO KEY UPDATE SKIP LOCKED
), cancelled AS (
  UPDATE task_executions e SET state = 'cancelled', finished_at = clock_timestamp(), sweep_at = NULL
  FROM pending p WHERE e.id = p.id RETURNING e.id
), flagged AS (
  UPDATE evaluations v
  SET cancel_requested_at = coalesce(v.cancel_requested_at, clock_timestamp()), remaining = v.remaining - n.n
  FROM (SELECT count(*) AS n FROM cancelled) n WHERE v.id = :evaluation AND v.state = 'running'
  RETURNING v.id, v.remaining, n.n
), report AS (
  INSERT INTO task_executions AS e (id, evaluation_id, kind, position, enqueues, sweep_at)
  SELECT f.id || '.report', f.id, 'report', 2147483647, 1, clock_timestamp() + make_interval(secs => :sweep)
  FROM flagged f WHERE f.remaining = 0 AND f.n > 0
  {_REPORT_AGAIN}
  RETURNING e.id, e.enqueues
)
SELECT v.state, coalesce(f.n, 0) AS cancelled, report.id AS report, report.enqueues AS report_enqueues, v.traceparent,
       v.spec ->> 'queue' AS queue
FROM evaluations v LEFT JOIN flagged f ON true LEFT JOIN report ON true WHERE v.id = :evaluation
""",
)

# How many of a run's samples have an error that is final: those that its attempt knows of, or, once the run has failed for
# good, all that have no score; but not those that have no result because their workers were lost, which is not the
# evaluation's fault. Written before the stop is decided, in a statement of its own: of two runs that fail at the
# same time, whichever looks second sees both.
MARK_ERRORED = _statement(
    "errored",
    """
UPDATE task_executions e
SET errored = CASE WHEN e.state = 'failed' THEN (
      SELECT count(*) FROM jsonb_to_recordset(e.samples) AS x(id text, epoch int)
      LEFT JOIN LATERAL (
        SELECT * FROM sample_results WHERE evaluation_id = e.evaluation_id AND sample_id = x.id AND epoch = x.epoch OFFSET 0
      ) r ON true
      WHERE r.error IS NOT NULL
         OR r.sample_id IS NULL AND coalesce(e.error ->> 'error_class', '') <> 'infrastructure')
    ELSE :errored END
WHERE e.id = :id AND e.attempt = :attempt AND e.kind = 'run'
""",
)

# A cancellation of what is pending, by the evaluation's own policy. What runs learns of it by renewal; what it skips, by
# claim. The later of two that find the policy exceeded adds what the first one skipped.
STOP = _statement(
    "stop",
    f"""
WITH exceeded AS MATERIALIZED (
  SELECT v.id, n.errored, v.error_limit,
         'It was stopped: ' || n.errored || CASE n.errored WHEN 1 THEN ' sample' ELSE ' samples' END
         || ' errored, and fail_on_error allows ' || CASE v.error_limit WHEN 1 THEN 'none' ELSE (v.error_limit - 1)::text END
         || '.' AS reason
  FROM evaluations v CROSS JOIN LATERAL (
    SELECT coalesce(sum(e.errored), 0) AS errored FROM task_executions e WHERE e.evaluation_id = v.id AND e.kind = 'run'
  ) n
  WHERE v.id = :evaluation AND v.state = 'running' AND n.errored >= v.error_limit
), pending AS MATERIALIZED (
  SELECT e.id FROM task_executions e JOIN exceeded x ON e.evaluation_id = x.id
  WHERE e.state = 'pending' AND e.kind = 'run' FOR NO KEY UPDATE OF e SKIP LOCKED
), ended AS (
  UPDATE task_executions e
  SET state = 'cancelled', finished_at = clock_timestamp(), sweep_at = NULL,
      error = jsonb_build_object('error_class', 'evaluation', 'message', x.reason)
  FROM pending p, exceeded x WHERE e.id = p.id RETURNING e.id
), flagged AS (
  UPDATE evaluations v
  SET stopped_at = coalesce(v.stopped_at, clock_timestamp()), stop_reason = coalesce(v.stop_reason, x.reason),
      remaining = v.remaining - n.n
  FROM exceeded x, (SELECT count(*) AS n FROM ended) n WHERE v.id = x.id AND v.state = 'running'
  RETURNING v.id, v.remaining, v.stop_reason, v.traceparent, v.spec ->> 'queue' AS queue, n.n
), report AS (
  INSERT INTO task_executions AS e (id, evaluation_id, kind, position, enqueues, sweep_at)
  SELECT f.id || '.report', f.id, 'report', 2147483647, 1, clock_timestamp() + make_interval(secs => :sweep)
  FROM flagged f WHERE f.remaining = 0 AND f.n > 0
  {_REPORT_AGAIN}
  RETURNING e.id, e.enqueues
)
SELECT f.stop_reason, f.n AS ended, report.id AS report, report.enqueues AS report_enqueues, f.traceparent, f.queue
FROM flagged f LEFT JOIN report ON true
""",
)

# The three statements of a retry, one transaction. The evaluation's row comes first here, against the order above: once it
# is terminal, all its executions are, and no other statement locks an execution of it and then waits for this row.
LOCK_TO_RETRY = _statement(
    "retry.lock",
    """
SELECT v.state, (SELECT count(*) FROM task_executions e WHERE e.evaluation_id = v.id AND e.kind = 'run') AS runs,
       (SELECT e.state FROM task_executions e WHERE e.id = v.id || '.plan') AS plan,
       v.transcripts_expired_at IS NOT NULL AS expired, coalesce(v.retention_lease > clock_timestamp(), false) AS tidied
FROM evaluations v WHERE v.id = :evaluation FOR NO KEY UPDATE OF v
""",
)

REARM = _statement(
    "retry.rearm",
    """
WITH target AS MATERIALIZED (
  SELECT id FROM task_executions
  WHERE evaluation_id = :evaluation
    AND CASE :what WHEN 'runs' THEN kind = 'run' AND state IN ('failed', 'cancelled') ELSE kind = :what END
  ORDER BY id FOR NO KEY UPDATE
), rearmed AS (
  UPDATE task_executions e
  SET state = 'pending', failures = 0, crashes = 0, errored = 0, error = NULL, finished_at = NULL,
      sweep_at = clock_timestamp()
  FROM target t WHERE e.id = t.id RETURNING e.id
)
SELECT count(*) AS n FROM rearmed
""",
)

# What its last report came to stays until the next one replaces it, for the next may come to nothing.
REOPEN = _statement(
    "retry.reopen",
    """
UPDATE evaluations
SET state = 'running', remaining = :remaining, cancel_requested_at = NULL, stopped_at = NULL, stop_reason = NULL,
    finished_at = NULL, error = NULL, checkpoints_deleted_at = NULL
WHERE id = :evaluation
""",
)

# A crash between commit and enqueue, a lease that ran out, a Cloud Task that was purged: all are due. ``now()`` here, as
# ``clock_timestamp()`` cannot be looked up in an index; nothing is waited for, so it is not late.
TAKE_DUE = _statement(
    "take_due",
    """
WITH due AS MATERIALIZED (
  SELECT id FROM task_executions WHERE state IN ('pending', 'running') AND sweep_at <= now()
  ORDER BY sweep_at LIMIT :most FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE task_executions e SET enqueues = e.enqueues + 1, sweep_at = clock_timestamp() + make_interval(secs => :sweep)
FROM due WHERE e.id = due.id
RETURNING e.id, e.enqueues, (SELECT v.traceparent FROM evaluations v WHERE v.id = e.evaluation_id) AS traceparent,
          (SELECT v.spec ->> 'queue' FROM evaluations v WHERE v.id = e.evaluation_id) AS queue
""",
)

# The Cloud Task exists, so the queue will deliver: the sweeper need not look for a day. A row that was claimed or taken as
# due again meanwhile has its own time.
ENQUEUED = _statement(
    "enqueued",
    """
WITH target AS MATERIALIZED (
  SELECT e.id FROM task_executions e JOIN jsonb_to_recordset(:tasks) AS n(id text, number int)
    ON e.id = n.id COLLATE "C" AND e.enqueues = n.number
  WHERE e.state = 'pending' ORDER BY e.id FOR NO KEY UPDATE OF e
)
UPDATE task_executions e SET sweep_at = clock_timestamp() + make_interval(secs => :sweep_enqueued)
FROM target t WHERE e.id = t.id
""",
)

# How long what waits has been waiting: since it was made, or since the attempt that gave it back ended. It reads all that
# is pending, so it is for the sweep alone: once a minute, and only where somebody looks at the figure.
WAITING = _statement(
    "waiting",
    """
SELECT count(*) AS pending,
       coalesce(extract(epoch FROM clock_timestamp() - min(
         CASE e.attempt WHEN 0 THEN e.created_at
                        ELSE (SELECT coalesce(a.ended_at, e.created_at) FROM execution_attempts a
                              WHERE a.execution_id = e.id AND a.attempt = e.attempt) END)), 0)::float8 AS oldest
FROM task_executions e WHERE e.state = 'pending'
""",
)

ALL_DUE = _statement(
    "all_due",
    """
WITH target AS MATERIALIZED (
  SELECT id FROM task_executions WHERE state IN ('pending', 'running') ORDER BY id FOR NO KEY UPDATE
)
UPDATE task_executions e SET sweep_at = clock_timestamp() FROM target t WHERE e.id = t.id
""",
)

# Not part of a claim: what an earlier attempt recorded while the claim waited for the row is not in the claim's snapshot.
# OFFSET 0 makes it look up these samples one by one, and not read all of a large evaluation's.
SCORED = _statement(
    "scored",
    """
SELECT r.sample_id, r.epoch
FROM task_executions e CROSS JOIN LATERAL jsonb_to_recordset(e.samples) AS x(id text, epoch int)
CROSS JOIN LATERAL (
  SELECT * FROM sample_results
  WHERE evaluation_id = e.evaluation_id AND sample_id = x.id AND epoch = x.epoch AND error IS NULL OFFSET 0
) r
WHERE e.id = :id
""",
)

# What a report works on: each planned sample, with the log that has it whole or with the reason why there is none.
TO_REPORT = _statement(
    "to_report",
    """
SELECT x.sample, e.digests[x.place] AS digest, r.transcript, e.state, e.error
FROM task_executions e CROSS JOIN LATERAL jsonb_array_elements(e.samples) WITH ORDINALITY AS x(sample, place)
LEFT JOIN sample_results r ON r.evaluation_id = e.evaluation_id AND r.sample_id = x.sample ->> 'id'
                     AND r.epoch = (x.sample ->> 'epoch')::int
WHERE e.evaluation_id = :evaluation AND e.kind = 'run' ORDER BY e.position, x.place
""",
)

# The attempts since the last that ended by itself: what these left behind may be gone on with.
INTERRUPTED = _statement(
    "interrupted",
    """
SELECT a.attempt FROM execution_attempts a
WHERE a.execution_id = :id AND a.attempt < :attempt AND a.attempt > (
  SELECT coalesce(max(b.attempt), 0) FROM execution_attempts b
  WHERE b.execution_id = :id AND b.attempt < :attempt AND b.outcome IN ('succeeded', 'failed', 'cancelled')
)
ORDER BY a.attempt DESC
""",
)

UNFINISHED = _statement(
    "unfinished",
    """
SELECT id FROM task_executions WHERE evaluation_id = :evaluation AND state IN ('pending', 'running') ORDER BY position
""",
)

COUNTED_LOG = _statement(
    "counted_log",
    """
SELECT v.log FROM evaluations v JOIN task_executions e ON e.id = v.id || '.report'
WHERE v.id = :evaluation AND e.state NOT IN ('pending', 'running')
""",
)

# The attempt was taken over, and its row got the last progress that the ledger knew of: what it has spent since is spent,
# too. Its fence is its own row, where no other attempt writes.
SPENT = _statement(
    "spent",
    """
UPDATE execution_attempts SET usage = :usage, cost = coalesce(:cost, cost)
WHERE execution_id = :id AND attempt = :attempt AND outcome = 'interrupted'
""",
)

PLAN = _statement("plan", "SELECT state, attempt, error FROM task_executions WHERE id = :id")

# By which versions the samples that stand were made. Of an attempt that nothing is recorded of, its samples still count.
# Which of them a resumed attempt had found begun is not known: all of them count as such.
VERSIONS = _statement(
    "versions",
    """
SELECT a.versions, a.earlier_versions, count(*) AS samples
FROM sample_results r LEFT JOIN execution_attempts a ON a.execution_id = r.execution_id AND a.attempt = r.attempt
WHERE r.evaluation_id = :evaluation GROUP BY a.versions, a.earlier_versions
""",
)

# What settings no longer keep, of evaluations that are over: the longest over first. Whoever takes one has it to itself
# until its lease ends, and that moment is its fence; a sweep that died is made up for by the next one after that. An
# evaluation whose transcripts have expired stays so: no retry can need them, whatever becomes of the sweep. How many are
# taken is in the statement's text, lest a plan for any number reads the whole table.
EXPIRED_AT_ONCE = 20
_EXPIRE = """
WITH due AS MATERIALIZED (
  SELECT id FROM evaluations
  WHERE {kept} IS NULL AND finished_at <= now() - make_interval(secs => :days * 86400)
    AND (retention_lease IS NULL OR retention_lease <= now())
  ORDER BY finished_at LIMIT {most} FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE evaluations v SET retention_lease = clock_timestamp() + make_interval(secs => :lease){expired}
FROM due WHERE v.id = due.id
RETURNING v.id, v.retention_lease
"""
_EXPIRED = ", transcripts_expired_at = coalesce(v.transcripts_expired_at, clock_timestamp())"
EXPIRE_TRANSCRIPTS = _statement(
    "expire.transcripts",
    _EXPIRE.format(kept="transcripts_deleted_at", expired=_EXPIRED, most=EXPIRED_AT_ONCE),
)
EXPIRE_CHECKPOINTS = _statement(
    "expire.checkpoints", _EXPIRE.format(kept="checkpoints_deleted_at", expired="", most=EXPIRED_AT_ONCE)
)

# With its transcripts all that it had is gone. Not done: the next sweep goes on.
EXPIRED = _statement(
    "expired",
    """
UPDATE evaluations
SET retention_lease = NULL,
    checkpoints_deleted_at = CASE WHEN :done THEN clock_timestamp() ELSE checkpoints_deleted_at END,
    transcripts_deleted_at = CASE WHEN :done AND :what = 'transcripts' THEN clock_timestamp()
                                  ELSE transcripts_deleted_at END
WHERE id = :evaluation AND retention_lease = :until
""",
)

# A page of an evaluation's samples in the plan's order, whatever became of them. Keyset: (position, place) of the last.
SAMPLES_PAGE = _statement(
    "samples_page",
    """
SELECT e.position, x.place, x.sample, e.id AS execution, e.state, r.attempt, r.scores, r.usage, r.cost, r."limit", r.error,
       r.duration, r.transcript, r.note,
       CASE WHEN r.transcript IS NULL AND e.state = 'failed' THEN e.error END AS execution_error
FROM task_executions e CROSS JOIN LATERAL jsonb_array_elements(e.samples) WITH ORDINALITY AS x(sample, place)
LEFT JOIN LATERAL (
  SELECT * FROM sample_results
  WHERE evaluation_id = e.evaluation_id AND sample_id = x.sample ->> 'id' AND epoch = (x.sample ->> 'epoch')::int OFFSET 0
) r ON true
WHERE e.evaluation_id = :evaluation AND e.kind = 'run' AND e.position >= :position
  AND (e.position, x.place) > (:position, :place)
ORDER BY e.position, x.place LIMIT :most
""",
)
