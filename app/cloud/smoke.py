"""The smoke test: one real sample through everything. It is submitted to the API, goes through the queue as a real push,
runs an agent in a sandbox, and is scored; no model is paid for."""

import time
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, retry_if_result, stop_after_delay, wait_fixed

from app.errors import ProctorError

SPEC: dict[str, Any] = {
    "task": "proctor/programming",
    "model": "scripted/agent",
    "limit": 1,
    "tags": {"purpose": "smoke-test"},
}

PATIENCE = 600
"""Seconds for the evaluation to succeed. Ours: a cold instance and its forkserver take one minute, the sample some
seconds, and a queue that was just changed up to a minute (Google's documentation)."""

READY_PATIENCE = 120
"""Seconds for a new revision to be ready. Ours."""

_TIMEOUT = httpx.Timeout(30, connect=10)


class SmokeFailed(ProctorError):
    """The message says how far it came."""

    title = "Smoke test failed"


class Smoke:
    """A context manager. `token`: an ID token for the service, sent as it is. `every`: seconds between two looks."""

    def __init__(self, url: str, token: str, *, every: float = 2) -> None:
        self._url = url
        self._every = every
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"},
            timeout=_TIMEOUT,
            transport=httpx.HTTPTransport(retries=3),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    def ready(self, patience: float = READY_PATIENCE) -> None:
        """Until the service says that it takes pushes. Raises `SmokeFailed`."""
        answer = self._patiently("/health/ready", patience)
        if not answer.is_success:
            raise SmokeFailed(f"{self._url}/health/ready: {_said(answer)}")

    def evaluate(self, patience: float = PATIENCE) -> str:
        """Submits, and waits for the end; returns the evaluation's id. Raises `SmokeFailed`, and then cancels it."""
        until = time.monotonic() + patience
        id = self._submit()
        try:
            self._wait(id, until)
        except BaseException:
            self._cancel(id)
            raise
        return id

    def _submit(self) -> str:
        try:
            answer = self._http.post("/evaluations", json=SPEC, headers={"Idempotency-Key": f"smoke-{uuid4()}"})
        except httpx.RequestError as error:
            raise SmokeFailed(f"{self._url} does not answer: {error}") from error
        if not answer.is_success:
            raise SmokeFailed(f"{self._url} did not take the evaluation: {_said(answer)}")
        return str(answer.json()["id"])

    def _wait(self, id: str, until: float) -> None:
        state = "not seen"
        while time.monotonic() < until:
            answer = self._patiently(f"/evaluations/{id}", max(0, until - time.monotonic()))
            if not answer.is_success:
                raise SmokeFailed(f"Evaluation {id} cannot be seen: {_said(answer)}")
            state = answer.json()["state"]
            if state == "succeeded":
                return
            if state != "running":
                raise SmokeFailed(f"Evaluation {id} {state}: {answer.json().get('error')}")
            time.sleep(self._every)
        raise SmokeFailed(f"Evaluation {id} is {state}, and its time is over. It says: {self._explanation(id)}")

    def _explanation(self, id: str) -> str:
        try:
            return self._http.get(f"/evaluations/{id}/explanation").text
        except httpx.RequestError as error:
            return str(error)

    def _cancel(self, id: str) -> None:
        try:
            self._http.post(f"/evaluations/{id}/cancel")
        except httpx.RequestError:
            return  # its failure is told already, and one evaluation of a scripted model harms nobody

    def _patiently(self, path: str, patience: float) -> httpx.Response:
        """The answer; 429 and 5xx are asked for again, and the last of them is the answer."""

        def last(state: RetryCallState) -> httpx.Response:
            assert state.outcome is not None
            if (error := state.outcome.exception()) is not None:
                raise SmokeFailed(f"{self._url} does not answer: {error}") from error
            response: httpx.Response = state.outcome.result()
            return response

        tries = Retrying(
            retry=retry_if_exception_type(httpx.RequestError) | retry_if_result(_is_away),
            stop=stop_after_delay(patience),
            wait=wait_fixed(self._every),
            retry_error_callback=last,
        )
        response: httpx.Response = tries(self._http.get, path)
        return response


def _is_away(answer: httpx.Response) -> bool:
    return answer.status_code == 429 or answer.status_code >= 500


def _said(answer: httpx.Response) -> str:
    """A problem's own sentence, or the beginning of what came instead."""
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = answer.text[:200]
    return f"{answer.status_code} {detail}"
