"""The API's own rules, on evaluations that are put into their states through the ledger."""

from collections.abc import AsyncIterator
from uuid import uuid4

import httpx
import pytest

from tests.system.conftest import ended, spec, submit

UNKNOWN = "00000000-0000-4000-8000-000000000000"


def problem(response: httpx.Response, status: int) -> str:
    """Its detail, if it is a problem of that status."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["title"]
    return str(body["detail"])


async def test_submitting_is_accepted_and_says_where(client: httpx.AsyncClient) -> None:
    response = await client.post("/evaluations", json=spec("nobody/knows", tags={"a": "b"}))
    assert response.status_code == 202
    view = response.json()
    assert response.headers["location"] == f"/evaluations/{view['id']}"
    assert (view["state"], view["spec"]["tags"], view["idempotency_key"]) == ("running", {"a": "b"}, None)


async def test_the_same_key_and_spec_give_the_same_evaluation_and_another_spec_is_a_conflict(
    client: httpx.AsyncClient,
) -> None:
    headers = {"Idempotency-Key": f"key {uuid4()}"}
    first = await client.post("/evaluations", json=spec("nobody/knows"), headers=headers)
    again = await client.post("/evaluations", json=spec("nobody/knows"), headers=headers)
    assert first.json()["id"] == again.json()["id"]
    assert first.json()["idempotency_key"] == headers["Idempotency-Key"]

    other = await client.post("/evaluations", json=spec("nobody/knows", limit=1), headers=headers)
    detail = problem(other, 409)
    assert headers["Idempotency-Key"] in detail
    assert first.json()["id"] in detail


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (b"{not json", 400, "not JSON"),
        (b"", 422, "body"),
        (b"[1]", 422, "body"),
        (b'{"task": "t"}', 422, "body.model"),
        (b'{"task": "t", "model": "m", "epoch": 2}', 422, "body.epoch: there is no such field"),
        (b'{"task": "t", "model": "m", "limit": 0}', 422, "body.limit"),
        (b'{"task": "t\\u0000", "model": "m"}', 422, "body.task"),
        (b'{"task": "t", "model": "m", "tags": {"a": 1}}', 422, "body.tags.a"),
        (b'{"task": "' + b"t" * 2**20 + b'", "model": "m"}', 413, "1048576 bytes"),
    ],
)
async def test_a_wrong_body_is_refused_with_what_is_wrong(
    client: httpx.AsyncClient, content: bytes, status: int, says: str
) -> None:
    for path in ("/evaluations", "/tasks/execute"):
        sent = content if path == "/evaluations" or not content.startswith(b'{"task') else b""
        if sent or path == "/evaluations":
            headers = {"Content-Type": "application/json"}
            assert says in problem(await client.post(path, content=sent, headers=headers), status)


async def test_a_body_that_never_says_its_length_is_cut_off_too(client: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"x" * 65536

    response = await client.post("/evaluations", content=endless(), headers={"Content-Type": "application/json"})
    assert "1048576 bytes" in problem(response, 413)


async def test_a_body_without_its_content_type_is_told_so(client: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d sends by itself
    response = await client.post("/evaluations", content=b'{"task": "t", "model": "m"}', headers=headers)
    assert "Content-Type: application/json" in problem(response, 400)


@pytest.mark.parametrize(
    ("method", "path", "status", "says"),
    [
        ("GET", f"/evaluations/{UNKNOWN}", 404, UNKNOWN),
        ("GET", f"/evaluations/{UNKNOWN}/samples", 404, UNKNOWN),
        ("GET", f"/evaluations/{UNKNOWN}/explanation", 404, UNKNOWN),
        ("POST", f"/evaluations/{UNKNOWN}/cancel", 404, UNKNOWN),
        ("POST", f"/evaluations/{UNKNOWN}/retry", 404, UNKNOWN),
        ("GET", "/evaluations/nonsense", 422, "evaluation_id"),
        ("GET", "/executions/nonsense", 404, "nonsense"),
        ("GET", "/evaluations?state=done", 422, "query.state"),
        ("GET", "/evaluations?tag=untagged", 422, "key=value"),
        ("GET", "/evaluations?cursor=nonsense", 422, "cursor"),
        ("GET", "/evaluations?limit=0", 422, "query.limit"),
        ("GET", "/nowhere", 404, "/nowhere"),
        ("DELETE", "/evaluations", 405, "DELETE"),
    ],
)
async def test_what_is_not_there_or_not_allowed_is_a_problem_that_names_it(
    client: httpx.AsyncClient, method: str, path: str, status: int, says: str
) -> None:
    assert says in problem(await client.request(method, path), status)


async def test_the_queue_forgets_an_unknown_execution_and_anybody_else_gets_404(client: httpx.AsyncClient) -> None:
    body = {"execution_id": "nobody.1"}
    problem(await client.post("/tasks/execute", json=body), 404)
    pushed = await client.post("/tasks/execute", json=body, headers={"X-CloudTasks-TaskName": "t"})
    assert (pushed.status_code, pushed.json()["state"]) == (200, None)


async def test_execute_wants_an_execution_or_a_spec_and_not_both(client: httpx.AsyncClient) -> None:
    for body in ({}, {"execution_id": "e.1", "evaluation": spec()}):
        response = await client.post("/tasks/execute", json=body)
        assert "either execution_id or evaluation" in problem(response, 422)


async def test_the_list_is_newest_first_filtered_and_paged(client: httpx.AsyncClient) -> None:
    suite = uuid4().hex
    ids = [await submit(client, spec("nobody/knows", tags={"suite": suite, "n": str(n % 2)})) for n in range(5)]
    for id in ids:
        await ended(client, id)

    found: list[str] = []
    cursor: str | None = None
    for size in (2, 2, 1):
        parameters = {"tag": f"suite={suite}", "limit": "2"} | ({"cursor": cursor} if cursor else {})
        page = (await client.get("/evaluations", params=parameters)).json()
        assert len(page["evaluations"]) == size
        found += [view["id"] for view in page["evaluations"]]
        cursor = page["next"]
    assert cursor is None
    assert found == ids[::-1]

    both = (await client.get(f"/evaluations?tag=suite={suite}&tag=n=1&state=failed")).json()["evaluations"]
    assert [view["id"] for view in both] == [ids[3], ids[1]]
    assert (await client.get(f"/evaluations?tag=suite={suite}&state=succeeded")).json()["evaluations"] == []


async def test_health(client: httpx.AsyncClient) -> None:
    for path in ("/health/live", "/health/ready"):
        response = await client.get(path)
        assert (response.status_code, response.json()["status"]) == (200, "ok")


async def test_a_sweep_says_what_it_did(client: httpx.AsyncClient) -> None:
    swept = (await client.post("/tasks/sweep")).json()
    assert swept.keys() == {"enqueued", "transcripts_deleted", "checkpoints_deleted"}


async def test_the_api_describes_itself(client: httpx.AsyncClient) -> None:
    description = (await client.get("/openapi.json")).json()
    assert set(description["paths"]) == {
        "/evaluations",
        "/evaluations/{evaluation_id}",
        "/evaluations/{evaluation_id}/samples",
        "/evaluations/{evaluation_id}/explanation",
        "/evaluations/{evaluation_id}/cancel",
        "/evaluations/{evaluation_id}/retry",
        "/executions/{execution_id}",
        "/tasks/execute",
        "/tasks/sweep",
        "/health/live",
        "/health/ready",
    }
    assert "Problem" in description["components"]["schemas"]
    assert (await client.get("/docs")).status_code == 200
