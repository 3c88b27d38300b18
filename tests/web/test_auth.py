"""Strangers are kept out, however they dress up, and are told why without their token being repeated."""

import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from app.errors import SettingsError
from app.local.oidc import CERTS_PATH, Issuer, publish
from app.settings import load
from app.web.auth import tell_admitted
from tests.web.test_evaluations import problem
from tests.web.tokens import (
    ALICE,
    API,
    PUSH,
    QUEUE,
    REMOVED,
    app_with,
    bearer,
    calling,
    checked,
    claims,
    put_together,
    signed_by_another,
    signed_with_the_certificate,
)

NOW = int(time.time())


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture(scope="module")
async def verifying(issuer: Issuer) -> AsyncIterator[httpx.AsyncClient]:
    """The service that verifies tokens itself."""
    async with publish(issuer.documents(), "127.0.0.1", 0) as url:
        app = app_with(auth="oidc", oidc_certs_url=url + CERTS_PATH, host="0.0.0.0", push_callers=(ALICE,))
        async with calling(app) as client:
            yield client


@pytest.fixture(scope="module")
async def behind_iam() -> AsyncIterator[httpx.AsyncClient]:
    async with calling(app_with(auth="iam", cloud_run_service="proctor", host="0.0.0.0")) as client:
        yield client


def token(issuer: Issuer, email: str = ALICE, /, **others: Any) -> str:
    return issuer.id_token(email, str(others.pop("aud", "https://proctor.example")), **others)


async def test_a_token_of_google_s_for_this_service_admits_whom_it_names(
    verifying: httpx.AsyncClient, issuer: Issuer
) -> None:
    for issued_by in ("https://accounts.google.com", "accounts.google.com"):
        answer = await verifying.get(API, headers=bearer(token(issuer, iss=issued_by)))
        assert answer.status_code == 200
    assert (await verifying.get(API, headers={"Authorization": f"bearer {token(issuer)}"})).status_code == 200
    assert (await verifying.post(PUSH, headers=bearer(token(issuer, QUEUE)))).status_code == 404


async def test_clocks_may_differ_by_ten_seconds_and_no_more(verifying: httpx.AsyncClient, issuer: Issuer) -> None:
    now = int(time.time())
    for status, times in (
        (200, {"exp": now - 5}),
        (401, {"exp": now - 60}),
        (200, {"iat": now + 5}),
        (401, {"iat": now + 60}),
        (401, {"nbf": now + 60}),
    ):
        assert (await verifying.get(API, headers=bearer(token(issuer, **times)))).status_code == status, times


FORGED: dict[str, Callable[[Issuer], str]] = {
    "another audience": lambda issuer: token(issuer, aud="https://other.example"),
    "our address with more behind it": lambda issuer: token(issuer, aud="https://proctor.example.evil.example"),
    "no audience": lambda issuer: token(issuer, aud=""),
    "another issuer": lambda issuer: token(issuer, iss="https://accounts.google.com.evil.example"),
    "another key of the same name": signed_by_another,
    "a key nobody knows": lambda issuer: Issuer().id_token(ALICE, "https://proctor.example"),
    "no signature": lambda issuer: token(issuer).rpartition(".")[0] + ".",
    "one letter changed": lambda issuer: token(issuer)[:-10] + ("A" if token(issuer)[-10] != "A" else "B") * 10,
    "two parts": lambda issuer: token(issuer).rpartition(".")[0],
    "alg none": lambda issuer: put_together({"alg": "none", "kid": issuer.key_id}, claims(), ""),
    "alg none, signed": lambda issuer: put_together(
        {"alg": "none", "kid": issuer.key_id}, claims(), token(issuer).rpartition(".")[2]
    ),
    "the certificate as a secret": signed_with_the_certificate,
    "no key's id": lambda issuer: put_together({"alg": "RS256"}, claims(), token(issuer).rpartition(".")[2]),
    "a key's id that is no text": lambda issuer: put_together({"alg": "RS256", "kid": [1]}, claims(), "AAAA"),
    "the platform's form": lambda issuer: checked(),
    "the platform's form of a good one": lambda issuer: f"{token(issuer).rpartition('.')[0]}.{REMOVED}",
    "e-mail not verified": lambda issuer: token(issuer, email_verified=False),
    "e-mail verified in words": lambda issuer: token(issuer, email_verified="true"),
    "nobody says that it is verified": lambda issuer: token(issuer, email_verified=None),
    "no e-mail": lambda issuer: token(issuer, email=None),
    "two e-mails": lambda issuer: token(issuer, email=f"evil@evil.example,{ALICE}"),
    "an e-mail in other letters": lambda issuer: token(issuer, email="alice@\u212alinik.example"),
    "garbage": lambda issuer: "garbage",
    "garbage in three parts": lambda issuer: "a.b.c",
    "deep garbage": lambda issuer: put_together({"alg": "RS256", "kid": "k"}, {}, "").replace("e30", "W" * 4000),
    "very long": lambda issuer: "a" * 20_000,
    "empty": lambda issuer: "",
}


@pytest.mark.parametrize("forged", FORGED)
async def test_no_other_token_is_taken_and_none_is_repeated(
    verifying: httpx.AsyncClient, issuer: Issuer, forged: str
) -> None:
    wrong = FORGED[forged](issuer)
    for path in (API, PUSH, "/evaluations", "/docs", "/nowhere"):
        refused = await verifying.get(path, headers=bearer(wrong))
        problem(refused, 401)
        assert refused.headers["www-authenticate"] == "Bearer"
        assert not [part for part in wrong.split(".") if len(part) > 8 and part != REMOVED and part in refused.text]


async def test_what_is_not_one_bearer_token_is_none(verifying: httpx.AsyncClient, issuer: Issuer) -> None:
    good = token(issuer)
    for headers in (
        {},
        {"Authorization": good},
        {"Authorization": f"Basic {good}"},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {good}, Bearer {good}"},
        {"X-Serverless-Authorization": f"Bearer {good}"},
        {"Cookie": f"token={good}"},
    ):
        problem(await verifying.get(API, headers=headers), 401)
    twice = [("Authorization", f"Bearer {good}"), ("Authorization", f"Bearer {good}")]
    problem(await verifying.get(API, headers=twice), 401)
    for name in ("access_token", "token", "authorization"):
        problem(await verifying.get(API, params={name: good}), 401)


async def test_the_queue_s_headers_are_no_identity(
    verifying: httpx.AsyncClient, behind_iam: httpx.AsyncClient, issuer: Issuer
) -> None:
    headers = {"X-CloudTasks-QueueName": "proctor", "X-CloudTasks-TaskName": "t", "X-AppEngine-QueueName": "proctor"}
    for client, stranger in ((verifying, token(issuer, "a@staff.example")), (behind_iam, checked(email=ALICE))):
        problem(await client.post(PUSH, headers=headers), 401)
        assert "PROCTOR_PUSH_CALLERS" in problem(await client.post(PUSH, headers=headers | bearer(stranger)), 403)


@pytest.mark.parametrize(
    ("email", "api", "push"),
    [
        (ALICE, 200, 404),
        ("Alice@EXAMPLE.com", 200, 404),
        ("bob@example.com", 403, 403),
        ("bob@staff.example", 200, 403),
        ("bob@sub.staff.example", 403, 403),
        ("bob@notstaff.example", 403, 403),
        ("bob@staff.example.evil.example", 403, 403),
        (QUEUE, 403, 404),
        ("queue@other.iam.gserviceaccount.com", 403, 403),
    ],
)
async def test_each_is_admitted_to_what_is_theirs(
    verifying: httpx.AsyncClient, issuer: Issuer, email: str, api: int, push: int
) -> None:
    headers = bearer(token(issuer, email))
    assert (await verifying.get(API, headers=headers)).status_code == api
    assert (await verifying.post(PUSH, headers=headers)).status_code == push


async def test_anybody_may_ask_whether_it_is_alive(verifying: httpx.AsyncClient) -> None:
    assert (await verifying.get("/health/live")).status_code == 200


async def test_a_certificate_that_is_out_of_reach_is_not_the_caller_s_fault(issuer: Issuer) -> None:
    async with calling(app_with(auth="oidc", oidc_certs_url="http://127.0.0.1:9/certs")) as client:
        assert "certificates" in problem(await client.get(API, headers=bearer(token(issuer))), 503)
        problem(await client.get(API), 401)


async def test_behind_iam_the_platform_s_word_is_taken_and_no_other(
    behind_iam: httpx.AsyncClient, issuer: Issuer
) -> None:
    assert (await behind_iam.get(API, headers=bearer(checked()))).status_code == 200
    assert (await behind_iam.get(API, headers=bearer(checked(email_verified=None)))).status_code == 200
    assert (await behind_iam.post(PUSH, headers=bearer(checked(email=QUEUE)))).status_code == 404
    for wrong in (
        checked(email=None),
        checked(email_verified=False),
        checked(exp=NOW - 60),
        checked(exp=None),
        checked(exp="soon"),
        f"x.{REMOVED}",
        f"W10.W10.{REMOVED}",
        REMOVED,
    ):
        problem(await behind_iam.get(API, headers=bearer(wrong)), 401)
    assert "IAM seems to be off" in problem(await behind_iam.get(API, headers=bearer(token(issuer))), 401)


async def test_where_the_platform_checked_its_own_header_the_other_counts_for_nothing(
    behind_iam: httpx.AsyncClient,
) -> None:
    """Anybody can write what they like into the header that was not checked."""
    forged = bearer(checked(email=ALICE))
    for own, status in ((checked(email="eve@evil.example"), 403), ("garbage", 401), (checked(), 200)):
        headers = forged | {"X-Serverless-Authorization": f"Bearer {own}"}
        assert (await behind_iam.get(API, headers=headers)).status_code == status
    headers = {"X-Serverless-Authorization": f"Bearer {checked()}", "Authorization": "Basic eA=="}
    assert (await behind_iam.get(API, headers=headers)).status_code == 200


@pytest.mark.usefixtures("every_log")
async def test_behind_iam_what_it_would_have_refused_is_an_alarm(behind_iam: httpx.AsyncClient, issuer: Issuer) -> None:
    """With IAM off anybody could write whose token they like, so its operator must hear of the first sign."""
    for headers in ({}, bearer(token(issuer))):
        with capture_logs() as logs:
            problem(await behind_iam.get(API, headers=headers), 401)
        assert [entry["event"] for entry in logs if entry["log_level"] == "error" and "IAM off" in entry["event"]]


async def test_with_nobody_listed_nobody_is_admitted(issuer: Issuer) -> None:
    app = app_with(auth="iam", cloud_run_service="proctor", callers=(), queue_service_account=None)
    async with calling(app) as client:
        problem(await client.get(API, headers=bearer(checked())), 403)
        problem(await client.post(PUSH, headers=bearer(checked(email=QUEUE))), 403)


@pytest.mark.usefixtures("every_log")
def test_that_nobody_is_listed_is_told_at_start_up() -> None:
    def told(**given: Any) -> list[str]:
        with capture_logs() as logs:
            tell_admitted(load(database_url="postgresql://nobody@127.0.0.1:9/none", **given))
        return [entry["event"] for entry in logs if entry["log_level"] == "warning"]

    api, queue = told(auth="oidc")
    assert "PROCTOR_CALLERS" in api
    assert "PROCTOR_QUEUE_SERVICE_ACCOUNT" in queue
    assert told(auth="oidc", callers=(ALICE,), queue_service_account=QUEUE) == []
    assert told() == []


async def test_the_description_asks_for_tokens_where_they_are_needed(
    verifying: httpx.AsyncClient, issuer: Issuer
) -> None:
    described = (await verifying.get(API, headers=bearer(token(issuer)))).json()["paths"]
    async with calling(app_with(), "http://127.0.0.1") as client:
        without = (await client.get(API)).json()["paths"]
    for path, operations in described.items():
        for method, operation in operations.items():
            open_to_all = path.startswith("/health/")
            assert ("security" in operation, "401" in operation["responses"]) == (not open_to_all, not open_to_all)
            assert not {"401", "security"} & {*without[path][method], *without[path][method]["responses"]}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"host": "0.0.0.0"}, "PROCTOR_HOST"),
        ({"host": "::"}, "PROCTOR_HOST"),
        ({"host": "proctor.internal"}, "PROCTOR_HOST"),
        ({"cloud_run_service": "proctor"}, "Cloud Run"),
        ({"cloud_run_service": "proctor", "host": "0.0.0.0"}, "PROCTOR_AUTH=iam"),
        ({"auth": "iam"}, "PROCTOR_AUTH=oidc"),
    ],
)
def test_what_would_let_strangers_in_does_not_start(given: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as refused:
        app_with(**given)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
async def test_on_this_machine_alone_everybody_is_anonymous(host: str) -> None:
    async with calling(app_with(host=host), "http://localhost:8080") as client:
        assert (await client.get(API)).status_code == 200


async def test_without_tokens_a_name_that_a_website_has_given_this_machine_is_refused() -> None:
    """DNS rebinding: the browser believes that the website and this service are one."""
    async with calling(app_with(), "http://evil.example:8080") as client:
        problem(await client.get(API), 403)
        for host in ("[", "", "127.0.0.1.evil.example"):
            problem(await client.get(API, headers={"Host": host}), 403)
