"""What an evaluation leaves in the log, in its trace and in the metrics: all of the way, and nothing that it must not."""

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import httpx
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode

from app.local.stack import Stack
from app.tracing import HEADER
from tests.logged import logged
from tests.recorded import Recorded, id_of, trace_of
from tests.system.conftest import TASKS, ended, run, samples, spec, submit, until

OURS = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
THEIRS = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
CLAIMS, RETRIES = "proctor.ledger.claims", "proctor.ledger.retries"


def told(span: ReadableSpan, name: str) -> Any:
    return (span.attributes or {}).get(f"proctor.{name}")


def names(spans: list[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


# The trace ------------------------------------------------------------------------------------------------------------


async def test_an_evaluation_is_one_trace_from_its_submission_to_its_report(
    client: httpx.AsyncClient, recorded: Recorded
) -> None:
    """Its context went through the Cloud Tasks' headers: nothing else connects a push with the submission."""
    evaluation = (await run(client, spec(task_args={"n": 2})))["id"]
    pushes = await recorded.until(4, "push", evaluation=evaluation, outcome="succeeded")
    (submitted,) = recorded.spans("submit", evaluation=evaluation)
    assert submitted.parent is None
    assert {told(push, "execution").partition(".")[2] for push in pushes} == {"plan", "1", "2", "report"}
    for push in pushes:
        assert push.kind == SpanKind.SERVER
        assert push.parent
        assert (push.parent.span_id, push.parent.is_remote) == (id_of(submitted), True)
        assert (told(push, "attempt"), told(push, "answer"), told(push, "retry_count")) == (1, "terminal", 0)
        steps = names(recorded.below(push))
        assert [step for step in steps if step in ("claim", "prepare", "run", "settle")] == [
            *("claim", "prepare", "run", "settle")
        ]
        assert all(trace_of(span) == trace_of(submitted) for span in recorded.below(push))
    enqueued = [told(push, "kind") for push in pushes if "enqueue" in names(recorded.below(push))]
    assert sorted(enqueued) == ["plan", "run"], "the fan-out, and the report by whoever was last"
    assert "enqueue" in names(recorded.below(submitted))


async def test_the_span_of_a_child_tells_its_life_and_each_statement_has_its_name(
    client: httpx.AsyncClient, recorded: Recorded
) -> None:
    evaluation = (await run(client, spec(task_args={"n": 2}, samples_per_execution=2)))["id"]
    (push,) = await recorded.until(1, "push", execution=f"{evaluation}.1", outcome="succeeded")
    (running,) = [span for span in recorded.below(push) if span.name == "run"]
    assert names(list(running.events)) == ["started", "first sample", "sample ended", "sample ended"]  # type: ignore[arg-type]
    assert told(running, "memory_peak_bytes") > 2**20
    assert "ledger.record" in names(recorded.below(running))
    (claim,) = [span for span in recorded.below(push) if span.name == "claim"]
    assert (names(recorded.below(claim)), told(claim, "verdict")) == (["ledger.claim"], "claimed")


async def test_an_evaluation_in_one_request_is_one_trace_too(client: httpx.AsyncClient, recorded: Recorded) -> None:
    headers = {"Idempotency-Key": str(uuid4())}
    answer = await client.post("/tasks/execute", json={"evaluation": spec(task_args={"n": 1})}, headers=headers)
    evaluation = answer.json()["evaluation"]["id"]
    (submitted,) = recorded.spans("submit", evaluation=evaluation)
    pushes = recorded.spans("push", evaluation=evaluation)
    assert [told(push, "kind") for push in pushes] == ["plan", "run", "report"]
    assert {push.parent.span_id for push in pushes if push.parent} == {id_of(submitted)}


async def test_what_a_proxy_makes_of_the_trace_does_not_break_it(client: httpx.AsyncClient, recorded: Recorded) -> None:
    """Cloud Run's front end writes a `traceparent` of its own, with another parent and its own mind about sampling."""
    execution = f"{uuid4()}.1"
    headers = {"traceparent": THEIRS, HEADER: OURS}
    await client.post("/tasks/execute", json={"execution_id": execution}, headers=headers)
    (push,) = await recorded.until(1, "push", execution=execution)
    assert push.parent
    assert f"{push.parent.trace_id:032x}-{push.parent.span_id:016x}" == OURS[3:-3]
    (link,) = push.links
    assert f"{link.context.trace_id:032x}-{link.context.span_id:016x}" == THEIRS[3:-3]


async def test_a_header_that_is_no_trace_begins_a_new_one(client: httpx.AsyncClient, recorded: Recorded) -> None:
    execution = f"{uuid4()}.1"
    headers = {HEADER: "00-nonsense", "traceparent": "x"}
    answer = await client.post("/tasks/execute", json={"execution_id": execution}, headers=headers)
    (push,) = await recorded.until(1, "push", execution=execution)
    assert (answer.status_code, push.parent, push.links) == (404, None, ())


# The metrics ----------------------------------------------------------------------------------------------------------


async def test_a_run_is_seen_in_the_metrics(client: httpx.AsyncClient, stack: Stack, recorded: Recorded) -> None:
    counted = {
        "proctor.ledger.claims": {"kind": "run", "verdict": "claimed"},
        "proctor.runner.start": {"kind": "run", "until": "started"},
        "proctor.runner.memory_peak": {"kind": "run"},
        "proctor.runner.tokens": {"provider": "mockllm"},
        "proctor.pool.hold": {},
        "proctor.pool.wait": {},
    }
    before = {name: recorded.value(name, **attributes) for name, attributes in counted.items()}
    samples_run = recorded.value("proctor.runner.start", kind="run", until="first sample")
    await run(client, spec(task_args={"n": 2}))
    grown = {name: recorded.value(name, **attributes) - before[name] for name, attributes in counted.items()}
    assert (grown[CLAIMS], grown["proctor.runner.start"], grown["proctor.runner.memory_peak"]) == (2, 2, 2)
    assert recorded.value("proctor.runner.start", kind="run", until="first sample") == samples_run + 2
    assert grown["proctor.runner.tokens"] == 2 * 15, "as the model said"
    assert min(grown["proctor.pool.hold"], grown["proctor.pool.wait"]) > 5
    assert recorded.value("proctor.runner.children") >= 0
    assert recorded.points("proctor.pool.in_use")
    await client.post("/tasks/sweep")
    assert recorded.points("proctor.queue.oldest_pending_age")
    units = {name: metric.unit for name, metric in recorded.metrics().items()}
    assert (units["proctor.runner.start"], units["proctor.runner.memory_peak"]) == ("s", "By")
    assert (units["proctor.queue.oldest_pending_age"], units["proctor.runner.tokens"]) == ("s", "{token}")


async def test_duplicates_and_take_overs_are_seen_in_the_metrics_and_in_the_trace(
    client: httpx.AsyncClient, stack: Stack, recorded: Recorded, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    evaluation = await submit(client, spec(task_args={"n": 1, "how": f"until:{flag}"}))
    execution = f"{evaluation}.1"
    await until(client, f"/executions/{execution}", lambda view: view.get("progress"))
    held, taken, lost = (
        recorded.value(CLAIMS, kind="run", verdict="held"),
        recorded.value(CLAIMS, kind="run", verdict="taken over"),
        recorded.value(RETRIES, cause="lease lost"),
    )
    assert (await client.post("/tasks/execute", json={"execution_id": execution})).status_code == 409
    assert recorded.value(CLAIMS, kind="run", verdict="held") > held
    with logged(stack.settings) as logs:
        taking = asyncio.create_task(take_over(client, stack, execution))
        (first,) = await recorded.until(1, "push", execution=execution, attempt=1, kind="run")
        assert told(first, "answer") == "again", "of the attempt that was superseded nothing is recorded"
        flag.touch()
        assert (await taking).status_code == 200
    lines = [line for line in logs.saying("attempt ended") if line["execution"] == execution]
    assert [(line["attempt"], line["outcome"], line["cause"]) for line in lines] == [
        (1, "interrupted", "lease lost"),
        (2, "succeeded", None),
    ]
    assert (await ended(client, evaluation))["state"] == "succeeded"
    assert recorded.value(CLAIMS, kind="run", verdict="taken over") == taken + 1
    assert recorded.value(RETRIES, cause="lease lost") == lost + 1
    assert trace_of(first) == trace_of(recorded.spans("submit", evaluation=evaluation)[0])


async def take_over(client: httpx.AsyncClient, stack: Stack, execution: str) -> httpx.Response:
    """The answer of the push that does."""
    while True:
        await expire(stack, execution)
        answer = await client.post("/tasks/execute", json={"execution_id": execution})
        if answer.status_code != 409:  # else a renewal came in between
            return answer


async def expire(stack: Stack, execution: str) -> None:
    """Its lease ends, until it is renewed: whoever claims it meanwhile takes over."""
    url = stack.settings.database_url
    assert url
    connection = await asyncpg.connect(url.get_secret_value())
    await connection.execute("UPDATE task_executions SET lease_expires_at = clock_timestamp() WHERE id = $1", execution)
    await connection.close()


# The log --------------------------------------------------------------------------------------------------------------


async def told_of_all(recorded: Recorded, evaluation: str) -> None:
    """The report's end is seen in the ledger before the service has heard of it, and before the line that tells of it."""
    await recorded.until(1, "push", evaluation=evaluation, kind="report", outcome="succeeded")


async def test_each_attempt_ends_with_one_line_that_has_its_figures(
    client: httpx.AsyncClient, stack: Stack, recorded: Recorded
) -> None:
    with logged(stack.settings, log_level="info") as logs:
        evaluation = (await run(client, spec(task_args={"n": 1})))["id"]
        await told_of_all(recorded, evaluation)
    lines = [line for line in logs.saying("attempt ended") if line["evaluation"] == evaluation]
    assert sorted(line["kind"] for line in lines) == ["plan", "report", "run"]
    (ran,) = [line for line in lines if line["kind"] == "run"]
    assert (ran["execution"], ran["attempt"], ran["severity"]) == (f"{evaluation}.1", 1, "INFO")
    assert (ran["outcome"], ran["state"], ran["samples"], ran["retry"]) == ("succeeded", "succeeded", 1, 0)
    assert (ran["tokens"], ran["model_calls"], ran["error"]) == (15, 1, None)
    assert -1 < ran["queue_seconds"] < 60
    assert 0 < ran["start_seconds"] < ran["seconds"]
    assert ran["memory_peak_bytes"] > 2**20
    labels = ran["logging.googleapis.com/labels"]
    assert (labels["execution"], labels["attempt"]) == (ran["execution"], "1")
    assert ran["logging.googleapis.com/trace"].startswith("projects/local/traces/")
    (submitted,) = [line for line in logs.saying("evaluation submitted") if line["evaluation"] == evaluation]
    assert submitted["logging.googleapis.com/trace"] == ran["logging.googleapis.com/trace"]


async def test_no_prompt_is_logged_or_traced_and_every_line_says_what_it_is_about(
    client: httpx.AsyncClient, stack: Stack, recorded: Recorded
) -> None:
    """Not by what a sample says, raises or prints, nor by a crash; at whatever severity."""
    marker = f"a prompt with {uuid4()}"
    with logged(stack.settings) as logs:
        evaluation = (await run(client, spec(f"{TASKS}@marked", task_args={"marker": marker}, fail_on_error=False)))[
            "id"
        ]
        await told_of_all(recorded, evaluation)
    text = logs.text
    assert marker not in text
    mine = [line for line in logs.lines if evaluation in str(line)]
    assert {(line["message"], line.get("outcome")) for line in mine} >= {
        ("attempt ended", "succeeded"),
        ("attempt ended", "failed"),
        ("attempt ended", "interrupted"),
    }
    assert [line for line in mine if line.get("evaluation") != evaluation] == []
    assert [line for line in mine if "execution" not in line and line["message"] != "evaluation submitted"] == []
    (crashed, *_) = [line for line in mine if line.get("outcome") == "interrupted"]
    assert crashed["error"] == "it was killed by SIGKILL, perhaps for want of memory"
    assert {line["error_class"] for line in mine if line.get("outcome") == "failed"} >= {"evaluation", "infrastructure"}
    found = await samples(client, evaluation)
    assert any(marker in str(sample) for sample in found), "it was there to be told"
    assert not any(marker in str((s.attributes, s.events, s.status.description)) for s in recorded.spans())
    failed = recorded.spans("push", evaluation=evaluation, outcome="failed")
    assert {(s.status.status_code, (s.attributes or {})["error.type"]) for s in failed} >= {
        (StatusCode.ERROR, "evaluation")
    }
