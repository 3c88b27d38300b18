"""The emulator's ID tokens, verified by google-auth as a service would in production."""

import time
from collections.abc import Callable
from typing import Any

import anyio.to_thread
import google.auth.exceptions
import httpx
import jwt
import pytest
from google.auth.transport.requests import Request
from google.oauth2 import id_token

from app.local.cloud_tasks import CloudTasksEmulator
from app.local.oidc import CERTS_PATH, ISSUER, JWKS_PATH, Issuer
from tests.local.conftest import Bench

EMAIL = "pusher@proctor.iam.gserviceaccount.com"
SERVICE = "https://proctor.example"

Verify = Callable[[str, str | None, str], dict[str, Any]]


@pytest.fixture
def verify() -> Verify:
    def verify(token: str, audience: str | None, certs_url: str) -> dict[str, Any]:
        request = Request()
        try:
            return dict(id_token.verify_token(token, request, audience=audience, certs_url=certs_url))
        finally:
            request.session.close()

    return verify


async def pushed_token(bench: Bench, **oidc: str) -> str:
    await bench.queue()
    authorization = {"Authorization": "Basic eA==", "authorization": "Basic eQ=="}
    await bench.task(http_request={"oidc_token": oidc, "headers": authorization})
    await bench.idle()
    headers = [value for name, value in bench.target.received[0].headers.items() if name.lower() == "authorization"]
    assert len(headers) == 1
    kind, _, token = headers[0].partition(" ")
    assert kind == "Bearer"
    return token


async def test_google_auth_verifies_a_pushed_token(bench: Bench, verify: Verify) -> None:
    before = int(time.time())
    token = await pushed_token(bench, service_account_email=EMAIL, audience=SERVICE)
    claims = await anyio.to_thread.run_sync(verify, token, SERVICE, bench.emulator.certs_url)
    assert (claims["iss"], claims["aud"], claims["email"], claims["email_verified"]) == (ISSUER, SERVICE, EMAIL, True)
    assert claims["sub"] == claims["azp"]
    assert claims["sub"].isdigit()
    assert before <= claims["iat"] <= time.time()
    assert claims["exp"] == claims["iat"] + 3600


async def test_the_key_is_published_as_a_jwk_set_too(bench: Bench, verify: Verify) -> None:
    token = await pushed_token(bench, service_account_email=EMAIL, audience=SERVICE)
    jwks_url = bench.emulator.certs_url.replace(CERTS_PATH, JWKS_PATH)
    claims = await anyio.to_thread.run_sync(verify, token, SERVICE, jwks_url)
    assert claims["email"] == EMAIL


async def test_without_an_audience_the_token_is_for_the_url(bench: Bench, verify: Verify) -> None:
    token = await pushed_token(bench, service_account_email=EMAIL)
    claims = await anyio.to_thread.run_sync(verify, token, bench.target.url, bench.emulator.certs_url)
    assert claims["aud"] == bench.target.url


async def test_a_token_for_another_audience_is_refused(bench: Bench, verify: Verify) -> None:
    token = await pushed_token(bench, service_account_email=EMAIL, audience=SERVICE)
    with pytest.raises(google.auth.exceptions.InvalidValue, match="audience"):
        await anyio.to_thread.run_sync(verify, token, "https://other.example", bench.emulator.certs_url)


async def test_another_emulators_token_is_refused(bench: Bench, verify: Verify) -> None:
    token = await pushed_token(bench, service_account_email=EMAIL, audience=SERVICE)
    async with CloudTasksEmulator(issuer=Issuer()) as other:
        with pytest.raises(google.auth.exceptions.MalformedError):
            await anyio.to_thread.run_sync(verify, token, SERVICE, other.certs_url)


def test_an_account_keeps_its_id_and_shares_it_with_nobody(issuer: Issuer, verify: Verify) -> None:
    def subject(email: str) -> str:
        return str(jwt.decode(issuer.id_token(email, SERVICE), options={"verify_signature": False})["sub"])

    assert subject(EMAIL) == subject(EMAIL) != subject(f"other-{EMAIL}")
    assert len(subject(EMAIL)) == 21


async def test_the_certificate_address_serves_nothing_else(bench: Bench) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        for path in ("/", "/oauth2/v1/certs/x", "/oauth2/v1"):
            assert (await client.get(bench.emulator.certs_url.replace(CERTS_PATH, path))).status_code == 404
        assert list((await client.get(f"{bench.emulator.certs_url}?alt=json")).json()) == [
            jwt_key_id(await pushed_token(bench, service_account_email=EMAIL))
        ]


def jwt_key_id(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])
