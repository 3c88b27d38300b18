"""Certificates are fetched when there is need, and never as often as strangers ask."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from app.errors import IdentityUnavailable
from app.local.oidc import CERTS_PATH, Issuer
from app.web.certificates import FAILED_EVERY, GRACE, LEAST_AGE, MOST_AGE, UNKNOWN_KEY_EVERY, USUAL_AGE, Certificates
from tests.web.tokens import ALICE, API, SERVICE, app_with, bearer, calling


class Publisher:
    """Serves `issuers`' certificates, counting; with `status` it says that instead. `hold`: answers wait for it."""

    def __init__(self, *issuers: Issuer) -> None:
        self.issuers = list(issuers)
        self.fetches = 0
        self.headers = ""
        self.body: str | None = None
        self.status = "200 OK"
        self.hold = asyncio.Event()
        self.hold.set()
        self.asked = asyncio.Event()
        self.url = ""

    def _document(self) -> str:
        if self.body is not None:
            return self.body
        return json.dumps({k: v for one in self.issuers for k, v in json.loads(one.documents()[CERTS_PATH]).items()})

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.fetches += 1
        self.asked.set()
        await self.hold.wait()
        body = self._document()
        head = f"HTTP/1.1 {self.status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{self.headers}\r\n"
        writer.write((head + body).encode())
        await writer.drain()
        writer.close()


@asynccontextmanager
async def published(*issuers: Issuer) -> AsyncIterator[Publisher]:
    publisher = Publisher(*issuers)
    server = await asyncio.start_server(publisher.answer, "127.0.0.1", 0)
    publisher.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/certs"
    try:
        yield publisher
    finally:
        server.close()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


async def test_many_requests_cost_one_fetch(issuer: Issuer) -> None:
    async with published(issuer) as publisher:
        app = app_with(auth="oidc", oidc_certs_url=publisher.url)
        async with calling(app) as client:
            headers = bearer(issuer.id_token(ALICE, SERVICE))
            answers = await asyncio.gather(*(client.get(API, headers=headers) for _ in range(20)))
            assert {answer.status_code for answer in answers} == {200}
            strangers = [bearer(Issuer().id_token(ALICE, SERVICE)) for _ in range(2)] * 10
            answers = await asyncio.gather(*(client.get(API, headers=headers) for headers in strangers))
            assert {answer.status_code for answer in answers} == {401}
        assert publisher.fetches == 1


async def test_a_new_key_is_fetched_once_a_minute_at_most(issuer: Issuer) -> None:
    new, clock = Issuer(), Clock()
    async with published(issuer) as publisher:
        certificates = Certificates(publisher.url, clock)
        assert await certificates.of(issuer.key_id)
        publisher.issuers.append(new)
        assert await certificates.of(new.key_id) is None
        clock.now += UNKNOWN_KEY_EVERY
        assert await certificates.of(new.key_id)
        assert await certificates.of("nobody's") is None
        assert publisher.fetches == 2


@pytest.mark.parametrize(
    ("headers", "age"),
    [
        ("", USUAL_AGE),
        ("Cache-Control: public, max-age=7200, must-revalidate\r\n", 7200),
        ("Cache-Control: max-age=7200\r\nAge: 7000\r\n", 200),
        ("Cache-Control: max-age=0\r\n", LEAST_AGE),
        ("Cache-Control: max-age=999999999\r\n", MOST_AGE),
        ("Cache-Control: max-age=99999999999999999999\r\n", MOST_AGE),
    ],
)
async def test_they_are_kept_as_long_as_their_publisher_says_within_bounds(
    issuer: Issuer, headers: str, age: float
) -> None:
    clock = Clock()
    async with published(issuer) as publisher:
        publisher.headers = headers
        certificates = Certificates(publisher.url, clock)
        await certificates.of(issuer.key_id)
        clock.now += age - 1
        await certificates.of(issuer.key_id)
        assert publisher.fetches == 1
        clock.now += 2
        publisher.issuers = [Issuer()]
        assert await certificates.of(issuer.key_id) is None, "a key that was withdrawn is none"
        assert publisher.fetches == 2


async def test_what_is_known_serves_for_a_while_when_new_ones_cannot_be_had(issuer: Issuer) -> None:
    clock = Clock()
    async with published(issuer) as publisher:
        certificates = Certificates(publisher.url, clock)
        await certificates.of(issuer.key_id)
        publisher.status = "500 Internal Server Error"
        clock.now += USUAL_AGE + GRACE - 1
        assert await certificates.of(issuer.key_id)
        clock.now += 1
        with pytest.raises(IdentityUnavailable):
            await certificates.of(issuer.key_id)


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"keys": []}', '{"k": "no certificate"}'])
async def test_a_fetch_that_failed_is_not_repeated_for_each_request(issuer: Issuer, body: str) -> None:
    clock = Clock()
    async with published(issuer) as publisher:
        publisher.body = body
        certificates = Certificates(publisher.url, clock)
        for _ in range(5):
            with pytest.raises(IdentityUnavailable):
                await certificates.of(issuer.key_id)
        assert publisher.fetches == 1
        publisher.body = None
        clock.now += FAILED_EVERY
        assert await certificates.of(issuer.key_id)


async def test_nobody_whose_key_is_known_waits_for_a_stranger_s_fetch(issuer: Issuer) -> None:
    clock = Clock()
    async with published(issuer) as publisher:
        certificates = Certificates(publisher.url, clock)
        await certificates.of(issuer.key_id)
        clock.now += UNKNOWN_KEY_EVERY
        publisher.hold.clear()
        publisher.asked.clear()
        stranger = asyncio.create_task(certificates.of("nobody's"))
        await publisher.asked.wait()
        assert await certificates.of(issuer.key_id)
        assert not stranger.done()
        publisher.hold.set()
        assert await stranger is None
