"""What no part of the system could take is refused at the door with a 4xx: sizes, depths, characters, numbers."""

import base64
import json
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from app.local.stack import Stack
from app.spec import MAX_ARGUMENTS, MAX_DEPTH
from tests.system.conftest import ended, submit
from tests.web.test_evaluations import problem

GOOD = {"task": "nobody/knows", "model": "m"}
NAMES = ("task_args", "model_args")


def nested(depth: int) -> Any:
    value: Any = 1
    for n in range(depth):
        value = [value] if n % 2 else {"a": value}
    return value


async def sent(client: httpx.AsyncClient, body: str | bytes, path: str = "/evaluations") -> httpx.Response:
    return await client.post(path, content=body, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("name", NAMES)
async def test_arguments_may_be_as_deep_as_people_write_them(client: httpx.AsyncClient, name: str) -> None:
    body = GOOD | {name: {"a": nested(MAX_DEPTH - 2)}}
    assert (await sent(client, json.dumps(body))).status_code == 202
    deeper = json.dumps(GOOD | {name: {"a": nested(MAX_DEPTH)}})
    assert f"{MAX_DEPTH} deep" in problem(await sent(client, deeper), 422)


@pytest.mark.parametrize("depth", [200, 500, 900, 2_000, 100_000])
@pytest.mark.parametrize("where", ["DEEP", '{"task": "t", "model": "m", "task_args": {"a": DEEP}}', '{"other": DEEP}'])
async def test_no_depth_of_a_body_is_an_error_of_ours(client: httpx.AsyncClient, where: str, depth: int) -> None:
    for path, body in (("/evaluations", where), ("/tasks/execute", f'{{"evaluation": {where}}}')):
        for left, right in (("[", "]"), ('{"a":', "}")):
            answer = await sent(client, body.replace("DEEP", left * depth + "1" + right * depth), path)
            assert answer.status_code in (400, 422), answer.text


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ('"task_args": {"a": "%s"}' % ("x" * MAX_ARGUMENTS), f"{MAX_ARGUMENTS} bytes"),
        ('"model_args": ' + json.dumps({"a": ["x"] * MAX_ARGUMENTS}), f"{MAX_ARGUMENTS} bytes"),
        ('"task_args": ' + json.dumps({str(n): n for n in range(101)}), "at most 100"),
        ('"model_roles": ' + json.dumps({str(n): "m" for n in range(21)}), "at most 20"),
        ('"tags": ' + json.dumps({str(n): "v" for n in range(21)}), "at most 20"),
        ('"tags": {"%s": "v"}' % ("k" * 101), "100 characters"),
        ('"tags": {"k": "a\\u0000b"}', "pattern"),
        ('"tags": {"k\\ud800": "a"}', "body.tags"),
        ('"tags": {"k": "\\udfff"}', "body.tags"),
        ('"task": "%s"' % ("t" * 501), "500 characters"),
        ('"task": "\\ud800"', "body.task"),
        ('"model_roles": {"a\\u0000": "m"}', "pattern"),
        ('"task_args": {"a": "b\\u0000c"}', "NUL"),
        ('"task_args": {"a\\u0000": "b"}', "NUL"),
        ('"model_args": {"a": [{"b": "\\ud800"}]}', "surrogate"),
        ('"task_args": {"a": NaN}', "NaN"),
        ('"task_args": {"a": [-Infinity]}', "Infinity"),
        ('"task_args": {"a": 1e999}', "Infinity"),
        ('"cost_limit": NaN', "body.cost_limit"),
        ('"cost_limit": 1e999', "body.cost_limit"),
        ('"fail_on_error": NaN', "body.fail_on_error"),
        ('"limit": 2147483648', "body.limit"),
        ('"token_limit": 9223372036854775808', "body.token_limit"),
        ('"epochs": 1e300', "body.epochs"),
        ('"\\ud800": 1', "body"),
    ],
)
async def test_what_cannot_be_kept_is_refused_by_its_field(client: httpx.AsyncClient, part: str, says: str) -> None:
    body = '{"task": "t", "model": "m", ' + part + "}"
    assert says in problem(await sent(client, body), 422)
    assert problem(await sent(client, f'{{"evaluation": {body}}}', "/tasks/execute"), 422)


async def test_an_integer_of_any_length_is_no_error_of_ours(client: httpx.AsyncClient) -> None:
    for digits, statuses in ((400, {202}), (5_000, {400}), (100_000, {400})):
        body = '{"task": "nobody/knows", "model": "m", "task_args": {"a": %s}}' % ("9" * digits)
        assert (await sent(client, body)).status_code in statuses


async def test_bytes_that_are_no_text_are_refused(client: httpx.AsyncClient) -> None:
    for body in (b"\xff\xfe", b'{"task": "\xed\xa0\x80", "model": "m"}', b'{"task": "\xc3\x28", "model": "m"}'):
        assert (await sent(client, body)).status_code in (400, 422)


async def test_a_long_complaint_is_cut(client: httpx.AsyncClient) -> None:
    wrong = {f"{n}{'x' * 1000}": 1 for n in range(500)}
    answer = await sent(client, json.dumps(GOOD | wrong))
    problem(answer, 422)
    assert len(answer.content) < 10_000
    assert len(answer.json()["errors"]) == 20


NUL, LONG = quote("a\0b"), "x" * 201


@pytest.mark.parametrize(
    "path",
    [
        f"/executions/{NUL}",
        f"/executions/{LONG}",
        f"/executions/{quote(chr(0xFEFF) * 201)}",
        "/executions/%ED%A0%80%00",
        f"/evaluations?tag={NUL}",
        f"/evaluations?tag=a={NUL}",
        f"/evaluations?tag=a={'x' * 300}",
        "/evaluations?" + "&".join("tag=a=b" for _ in range(21)),
        f"/evaluations?cursor={NUL}",
        f"/evaluations?cursor={'A' * 501}",
        "/evaluations?limit=99999999999999999999",
        "/evaluations?limit=NaN",
        "/evaluations?limit=1e3",
    ],
)
async def test_addresses_are_bounded_too(client: httpx.AsyncClient, path: str) -> None:
    problem(await client.get(path), 422)


@pytest.fixture(scope="module")
async def evaluation(stack: Stack) -> str:
    async with httpx.AsyncClient(base_url=stack.url, timeout=60) as client:
        return str(
            (await ended(client, await submit(client, GOOD)))["id"]
        )  # what it logs is not for a later test to hear


@pytest.mark.parametrize(
    "parts",
    [
        ["0001-01-01T00:00:00+14:00", "00000000-0000-4000-8000-000000000000"],
        ["9999-12-31T23:59:59-14:00", "00000000-0000-4000-8000-000000000000"],
        ["2026-01-01T00:00:00", "00000000-0000-4000-8000-000000000000"],
        ["2026-01-01T00:00:00+00:00", "\0"],
        ["2026-01-01T00:00:00+00:00", 5],
        [1, 2],
        [10**30, 0],
        [-1, 0],
        [1e999, 0],
        [None, None],
        {"a": 1},
        nested(300),
    ],
)
async def test_a_cursor_that_is_not_ours_is_refused(client: httpx.AsyncClient, evaluation: str, parts: Any) -> None:
    cursor = base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")[:500]
    assert "cursor" in problem(await client.get("/evaluations", params={"cursor": cursor}), 422)
    if parts != [1, 2]:
        path = f"/evaluations/{evaluation}/samples"
        assert "cursor" in problem(await client.get(path, params={"cursor": cursor}), 422)


@pytest.mark.parametrize("key", ["", "x" * 201, "a\tb", "a\xa0b", "a\x85b"])
async def test_an_idempotency_key_that_cannot_be_kept_is_refused(client: httpx.AsyncClient, key: str) -> None:
    headers = {b"Idempotency-Key": key.encode("latin-1")}
    for path, body in (("/evaluations", GOOD), ("/tasks/execute", {"evaluation": GOOD})):
        assert "dempotency-" in problem(await client.post(path, json=body, headers=headers), 422).replace("_", "-")
