"""The command as a process: what it loads, how it fails, what it leaves on stdout."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version
from pathlib import Path

import pytest

from app.client import Client, Refused
from tests.cli.conftest import Proctor

HERE = "http://127.0.0.1:8080"


@asynccontextmanager
async def answering(*answers: str) -> AsyncIterator[tuple[str, list[str]]]:
    """A server that gives these answers (status, body) in turn, the last for ever; its address and what it was sent."""
    left, received = list(answers), list[str]()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError):  # it speaks TLS
            received.append((await reader.readuntil(b"\r\n\r\n")).decode())
        status, _, body = (left.pop(0) if len(left) > 1 else left[0]).partition("\n")
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", received


NOBODY = '200 OK\n{"evaluations": [], "next": null}'
DOWN = '503 Service Unavailable\n{"title": "Database unavailable", "detail": "The database does not answer."}'


async def test_a_service_that_is_not_there_is_said_in_one_line(refused: str, at: Callable[[str], Proctor]) -> None:
    commands = (["list"], ["show", "0" * 32], ["submit", "t", "--model", "m"], ["watch", "0" * 32, "--json"])
    for ran in await asyncio.gather(*(at(refused)(*command) for command in commands)):
        assert (ran.code, ran.out, ran.err.count("\n")) == (3, "", 1)
        assert ran.err.startswith(f"proctor: No answer from {refused}")
        assert "PROCTOR_URL" in ran.err


async def test_the_option_goes_before_the_environment(refused: str, at: Callable[[str], Proctor]) -> None:
    async with answering(NOBODY) as (url, _):
        assert (await at(refused)("list", "--url", url)).code == 0


async def test_a_service_that_cannot_answer_is_asked_again(at: Callable[[str], Proctor]) -> None:
    async with answering(DOWN, "502 Bad Gateway\n<html>", "429 Too Many Requests\n", NOBODY) as (url, received):
        ran = await at(url)("list", "--json")
    assert (ran.code, json.loads(ran.out)["evaluations"], len(received)) == (0, [], 4)


async def test_a_service_that_stays_down_is_said_in_one_line_with_its_own_words(at: Callable[[str], Proctor]) -> None:
    async with answering(DOWN) as (url, received):
        ran = await at(url)("list")
    assert (ran.code, ran.out, len(received)) == (3, "", 4)
    assert ran.err == (
        f"proctor: The service at {url} cannot answer now: The database does not answer. Try again in a while.\n"
    )


async def test_every_try_of_a_submit_carries_the_same_key(at: Callable[[str], Proctor]) -> None:
    async with answering(DOWN) as (url, received):
        await at(url)("submit", "t", "--model", "m")
    keys = [
        line for request in received for line in request.lower().split("\r\n") if line.startswith("idempotency-key")
    ]
    assert len(keys) == 4
    assert len(set(keys)) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("404 Not Found\n<html>", "is not Proctor (404 Not Found)"),
        ("200 OK\n<html>", "is not Proctor (200 OK)"),
        ("302 Found\n", "is not Proctor (302 Found)"),
        ('404 Not Found\n{"detail": "Not Found"}', "is not Proctor (404 Not Found)"),
        ('405 Method Not Allowed\n{"detail": "Method Not Allowed"}', "is not Proctor (405"),
        ('422 Unprocessable\n{"detail": [{"loc": ["body"]}]}', "is not Proctor (422"),
        ("400 Bad Request\n[1, 2]", "is not Proctor (400 Bad Request)"),
        ("403 Forbidden\n<html>", "does not let you in: 403 Forbidden"),
    ],
)
async def test_an_answer_that_is_not_the_apis_is_said_in_one_line(
    at: Callable[[str], Proctor], answer: str, words: str
) -> None:
    async with answering(answer) as (url, received):
        ran = await at(url)("list")
    assert (ran.code, ran.out, ran.err.count("\n"), len(received)) == (2, "", 1, 1)
    assert words in ran.err


OTHERS = (
    "<!doctype html><title>Something else</title>",
    "",
    "null",
    "[]",
    '"text"',
    "{}",
    '{"detail": "fine"}',
    '{"evaluations": {}}',
    '{"evaluations": [{"id": 1}], "next": null, "id": 1, "state": "running", "executions": "none"}',
    '{"id": "x", "state": 1, "evaluation_id": "x", "samples": [], "next": 1, "evaluations": [null]}',
)


@pytest.mark.parametrize("body", OTHERS)
async def test_another_server_that_says_yes_is_told_from_proctor_by_every_request(body: str) -> None:
    id = "0" * 32
    async with answering(f"200 OK\n{body}") as (url, _):
        with Client(url) as client:
            for request in (
                lambda: client.submit({}),
                lambda: client.evaluation(id),
                lambda: client.evaluations(),
                lambda: client.samples(id),
                lambda: client.execution(id),
                lambda: client.explanation(id),
                lambda: client.cancel(id),
                lambda: client.retry(id),
                lambda: client.find("0" * 8),
            ):
                with pytest.raises(
                    Refused, match=rf"What answers at {url} is not Proctor.* is --url \(PROCTOR_URL\) right"
                ):
                    await asyncio.to_thread(request)


async def test_another_server_is_said_in_one_line(at: Callable[[str], Proctor]) -> None:
    async with answering('200 OK\n{"status": "up"}') as (url, _):
        for command in (["list"], ["submit", "t", "--model", "m", "--wait"], ["explain", "0" * 32]):
            ran = await at(url)(*command)
            assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
            assert f"What answers at {url} is not Proctor" in ran.err


async def test_a_server_that_speaks_no_http_or_another_tls_is_said_in_one_line(at: Callable[[str], Proctor]) -> None:
    async with answering("200 OK\n{}") as (url, _):
        tls = await at(url.replace("http:", "https:"))("list")
    assert (tls.code, tls.out, tls.err.count("\n")) == (3, "", 1), tls.err
    assert "is --url (PROCTOR_URL) right?" in tls.err


async def test_a_problem_in_many_lines_becomes_one(at: Callable[[str], Proctor]) -> None:
    async with answering('409 Conflict\n{"detail": "one\\ntwo \\u001b[31m"}') as (url, _):
        ran = await at(url)("cancel", "0" * 32)
    assert (ran.code, ran.err) == (2, "proctor: one two \N{REPLACEMENT CHARACTER}[31m\n")


@pytest.mark.parametrize("url", ["here", "ftp://h", "http://", "http://h:99999", "http://[::1"])
async def test_an_address_that_is_none_is_refused_before_anything_is_sent(
    at: Callable[[str], Proctor], url: str
) -> None:
    ran = await at(HERE)("list", "--url", url)
    assert (ran.code, ran.out) == (2, "")
    assert "is not an address" in ran.err


async def test_the_command_alone_shows_its_help_and_knows_its_version(at: Callable[[str], Proctor]) -> None:
    alone = await at(HERE)()
    assert "submit" in alone.out + alone.err
    ran = await at(HERE)("--version")
    assert (ran.code, ran.out) == (0, f"{version('proctor')}\n")


async def test_wrong_use_exits_2(at: Callable[[str], Proctor]) -> None:
    wrong = (["nosuch"], ["submit", "t"], ["show"], ["list", "--state", "odd"], ["--nosuch[bold]"])
    for ran in await asyncio.gather(*(at(HERE)(*command) for command in wrong)):
        assert (ran.code, ran.out) == (2, ""), ran.err
        assert "Traceback" not in ran.err


async def test_the_service_and_its_migration_name_a_missing_setting_in_one_line(at: Callable[[str], Proctor]) -> None:
    for ran in await asyncio.gather(*(at(HERE)(command) for command in ("serve", "migrate"))):
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
        assert ran.err.startswith("proctor: PROCTOR_ALLOYDB_INSTANCE: is required, or else PROCTOR_DATABASE_URL")


async def test_migrate_says_from_where_to_where(postgres: str, database_url: str, at: Callable[[str], Proctor]) -> None:
    ran = await at(HERE)("migrate", PROCTOR_DATABASE_URL=database_url)
    before, arrow, after = ran.out.split()
    assert (ran.code, arrow, before) == (0, "→", after)


async def test_a_database_that_cannot_be_migrated_is_said_in_one_line(
    postgres: str, refused: str, at: Callable[[str], Proctor]
) -> None:
    nobody = refused.removeprefix("http://")
    reasons = {
        f"{postgres}_none": (2, "The database refused: The database does not exist"),
        f"postgresql://u:p@{nobody}/d": (3, f"There is no database d at {nobody} as u: ConnectionRefusedError"),
        postgres.replace("proctor:", "nobody:"): (2, "The database refused: The password is wrong"),
    }
    all = await asyncio.gather(*(at(HERE)("migrate", PROCTOR_DATABASE_URL=url) for url in reasons))
    for ran, (code, reason) in zip(all, reasons.values(), strict=True):
        assert (ran.code, ran.out, ran.err.count("\n")) == (code, "", 1), ran.err
        assert ran.err.startswith(f"proctor: {reason}")


async def test_without_its_extra_a_command_says_what_to_install(at: Callable[[str], Proctor], tmp_path: Path) -> None:
    (tmp_path / "jwt.py").write_text("raise ModuleNotFoundError('No module named jwt', name='jwt')")
    ran = await at(HERE)("emulator")
    assert (ran.code, ran.out, ran.err) == (2, "", "proctor: jwt is missing here: pip install 'proctor[local]'\n")


async def test_the_emulator_runs_until_ctrl_c(at: Callable[[str], Proctor]) -> None:
    process = await at(HERE).start("emulator", "--port", "0", "--oidc-port", "0")
    assert process.stderr is not None
    assert (await process.stderr.readline()).startswith(b"Cloud Tasks is at 127.0.0.1:")
    process.send_signal(signal.SIGINT)
    ran = await at(HERE).end(process)
    assert (ran.code, ran.out, ran.err) == (130, "", "")


@pytest.mark.parametrize("command", ["submit --help", "list"])
async def test_a_clients_command_loads_nothing_of_the_service(at: Callable[[str], Proctor], command: str) -> None:
    async with answering(NOBODY) as (url, _):
        ran = await at(url)(*command.split(), PYTHONPROFILEIMPORTTIME="1")
    assert ran.code == 0
    loaded = {line.rpartition("|")[2].strip() for line in ran.err.splitlines()}
    assert "typer" in loaded
    assert not loaded & {"app.main", "app.settings", "fastapi", "sqlalchemy", "grpc", "inspect_ai", "asyncpg"}
