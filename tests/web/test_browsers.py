"""Pages are safe to open, and other sites' pages can do nothing here."""

import re
from collections.abc import AsyncIterator
from urllib.parse import urljoin

import httpx
import pytest
from fastapi import FastAPI
from structlog.testing import capture_logs

from app.web.headers import SAFE
from tests.web.test_evaluations import problem
from tests.web.tokens import API, app_with, calling

SERVICE = "http://127.0.0.1:8080"


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return app_with()


@pytest.fixture
async def browser(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with calling(app, SERVICE) as client:
        yield client


async def test_every_answer_tells_the_browser_to_be_careful(browser: httpx.AsyncClient, app: FastAPI) -> None:
    big = {"Content-Length": "99999999"}
    answers = [
        *[await browser.get(path) for path in (API, "/docs", "/health/live", "/nowhere", "/docs/nothing")],
        await browser.delete("/evaluations"),
        await browser.post("/evaluations", json=[]),
        await browser.post("/evaluations", headers=big, content=b"{}"),
        await browser.get(API, headers={"Host": "evil.example"}),
    ]
    assert {answer.status_code for answer in answers} == {200, 403, 404, 405, 413, 422}
    for answer in answers:
        assert {name: answer.headers[name] for name in SAFE} == SAFE
    assert "default-src 'none'" in SAFE["Content-Security-Policy"]
    assert "unsafe" not in SAFE["Content-Security-Policy"]


@pytest.mark.usefixtures("every_log")
async def test_so_does_the_answer_to_an_unexpected_error(browser: httpx.AsyncClient) -> None:
    with capture_logs() as logs:
        broken = await browser.get("/evaluations")
    problem(broken, 500)
    assert "unexpected error" in {entry["event"] for entry in logs}
    assert {name: broken.headers[name] for name in SAFE} == SAFE


async def test_the_api_s_page_is_this_service_s_alone(browser: httpx.AsyncClient) -> None:
    page = await browser.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    named = re.findall(r'(?:src|href|action)="([^"]*)"', page.text)
    assert len(named) == 4
    for name in named:
        url = urljoin(str(page.url), name)
        assert url.startswith(f"{SERVICE}/docs/")
        assert (await browser.get(url)).status_code == 200
    assert not re.search(r"<script>|<style|\bon\w+=|javascript:", page.text), "the policy forbids what is inline"
    start = (await browser.get("/docs/start.js")).text
    (description,) = re.findall(r'\burl: "([^"]*)"', start)
    assert (await browser.get(urljoin(str(page.url), description))).json()["openapi"] == "3.1.0"
    assert "://" not in page.text + start
    assert (await browser.get("/redoc")).status_code == 404


async def test_the_page_s_program_reads_the_description_s_version(browser: httpx.AsyncClient) -> None:
    """OpenAPI 3.1 takes Swagger UI 5."""
    assert re.search(r'PACKAGE_VERSION:"5\.', (await browser.get("/docs/swagger-ui-bundle.js")).text)


@pytest.mark.parametrize("path", ["/docs/../settings.py", "/docs/%2e%2e/settings.py", "/docs/docs.html", "/docs/a/b"])
async def test_it_serves_no_other_file(browser: httpx.AsyncClient, path: str) -> None:
    problem(await browser.get(path), 404)


CHANGING = (
    "/evaluations",
    "/evaluations/00000000-0000-4000-8000-000000000000/cancel",
    "/tasks/execute",
    "/tasks/sweep",
)


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Origin": SERVICE},
        {"Sec-Fetch-Site": "something new"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://127.0.0.1:9090"},
        {"Origin": "http://127.0.0.1:8080.evil.example"},
        {"Origin": "null"},
    ],
)
async def test_a_page_of_another_site_changes_nothing(browser: httpx.AsyncClient, headers: dict[str, str]) -> None:
    for path in CHANGING:
        assert "another site" in problem(await browser.post(path, json={}, headers=headers), 403)
    assert (await browser.get(API, headers=headers)).status_code == 200, "a link from elsewhere may be followed"


@pytest.mark.parametrize(
    "headers", [{}, {"Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {"Origin": SERVICE}]
)
async def test_the_service_s_own_pages_and_programs_may(browser: httpx.AsyncClient, headers: dict[str, str]) -> None:
    problem(await browser.post("/evaluations", json=[], headers=headers), 422)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
async def test_json_in_a_form_s_clothes_is_refused(browser: httpx.AsyncClient, kind: str) -> None:
    """What a form of any site can send without asking."""
    content = b'{"task": "t", "model": "m"}'
    answer = await browser.post("/evaluations", content=content, headers={"Content-Type": kind})
    assert "Content-Type: application/json" in problem(answer, 400)
