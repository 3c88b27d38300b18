"""The certificates that ID tokens are signed with: cached, and fetched so that strangers cannot decide how often."""

import asyncio
import re
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import structlog
from google.auth.crypt import RSAVerifier

from app.errors import IdentityUnavailable

DEADLINE = 5
"""Seconds for one fetch. Ours: fifty times a slow one, and a push that waits so long is none the worse."""

UNKNOWN_KEY_EVERY = 60
"""Seconds between two fetches that an unknown key asks for. Ours: keys are published long before they sign, so one is
rarely needed, and anybody can name a key that does not exist."""

FAILED_EVERY = 5
"""Seconds until a fetch that failed is tried again. Ours: as DEADLINE, so that a hung address costs one wait at a time."""

LEAST_AGE, USUAL_AGE, MOST_AGE = 60, 3600, 86_400
"""Seconds that certificates are fresh: Cache-Control's max-age within these bounds; without one, the middle. Ours: Google's
own max-age is some hours."""

GRACE = 3600
"""Seconds past that in which they still serve while new ones cannot be had. Ours: Google's keys overlap by days."""

log = structlog.get_logger(__name__)


class Certificates:
    """Those at `url`, as {key id: X.509 PEM}. `clock`: monotonic seconds."""

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._clock = clock
        self._known: dict[str, str] = {}
        self._fresh_until = self._asked_at = -float("inf")
        self._failure: str | None = None
        self._fetching = asyncio.Lock()

    async def of(self, key_id: str) -> str | None:
        """The key's certificate, without a wait where it is known; None: there is no such key. Raises
        `IdentityUnavailable` when that cannot be found out."""
        if self._is_fresh() and key_id in self._known:
            return self._known[key_id]
        async with self._fetching:
            if self._is_due(key_id):
                await self._fetch()
        if key_id in self._known and self._clock() < self._fresh_until + GRACE:
            return self._known[key_id]
        if self._failure:
            raise IdentityUnavailable(
                f"Tokens cannot be verified now: their certificates at {self._url} are out of reach ({self._failure})."
                " Send the request again in a while."
            )
        return None

    def _is_fresh(self) -> bool:
        return self._clock() < self._fresh_until

    def _is_due(self, key_id: str) -> bool:
        """Whether to fetch, by what whoever held the lock before has found."""
        if self._is_fresh() and key_id in self._known:
            return False
        wait = FAILED_EVERY if self._failure else UNKNOWN_KEY_EVERY if self._is_fresh() else 0
        return self._clock() - self._asked_at >= wait

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(DEADLINE):
                self._known, age = await _download(self._url)
        except (httpx.HTTPError, TimeoutError, ValueError) as error:
            self._failure = f"{type(error).__name__}: {error}".removesuffix(": ")
            log.warning("certificates not fetched", url=self._url, reason=self._failure)
        else:
            self._failure = None
            self._fresh_until = self._clock() + age
        self._asked_at = self._clock()


async def _download(url: str) -> tuple[dict[str, str], float]:
    """The certificates, and for how many seconds they are fresh."""
    # a proxy from the environment is for addresses elsewhere
    here = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    async with httpx.AsyncClient(timeout=DEADLINE, trust_env=not here) as client:
        response = await client.get(url)
        response.raise_for_status()
    found = response.json()
    if not isinstance(found, dict) or not found or not all(isinstance(pem, str) for pem in found.values()):
        raise ValueError("what is there are no certificates by key id")
    for pem in found.values():
        RSAVerifier.from_string(pem)  # type: ignore[no-untyped-call]  # raises ValueError
    return found, _age(response.headers)


def _age(headers: httpx.Headers) -> float:
    given = re.search(r"max-age=(\d+)", headers.get("cache-control", ""))
    already = re.fullmatch(r"\d{1,9}", headers.get("age", ""))
    age = int(given[1][:12]) - (int(already[0]) if already else 0) if given else USUAL_AGE
    return min(max(age, LEAST_AGE), MOST_AGE)
