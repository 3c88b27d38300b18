"""The API does what its description says, whatever is sent: no 5xx, and no answer that the description does not have."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import anyio.to_thread
import grpc
import httpx
import pytest
import requests
import schemathesis
from google.cloud import tasks_v2
from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksGrpcAsyncIOTransport
from hypothesis import HealthCheck, Phase, given, settings
from pydantic import ValidationError
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from app.local.stack import Stack, open_stack
from app.spec import Spec
from tests.conftest import own_database
from tests.system.conftest import spec, submit

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
AnyCase = Case[Any]
AnyOperation = APIOperation[Any, Any, Any, Any]

EXAMPLES = 20
"""Generated for each operation, and as many again that are wrong on purpose; always the same ones."""

COVERED = 300
"""Of the cases at each field's bounds, for each operation at most."""


@pytest.fixture
async def held(postgres: str, tmp_path: Path) -> AsyncIterator[Stack]:
    """The whole system, but its queue is paused: what is submitted is not executed."""
    quiet: dict[str, Any] = {"log_level": "warning", "log_format": "json", "sweep_every": 3600}
    async with own_database(postgres) as url, open_stack(tmp_path, database_url=url, **quiet) as stack:
        async with _queue(stack) as client:
            await client.pause_queue(name=stack.settings.queue)
        yield stack


@asynccontextmanager
async def _queue(stack: Stack) -> AsyncIterator[tasks_v2.CloudTasksAsyncClient]:
    async with grpc.aio.insecure_channel(stack.emulator.endpoint) as channel:
        yield tasks_v2.CloudTasksAsyncClient(transport=CloudTasksGrpcAsyncIOTransport(channel=channel))


async def test_whatever_is_sent_the_answer_is_one_that_the_description_has(held: Stack) -> None:
    async with httpx.AsyncClient(base_url=held.url, timeout=60) as client:
        known = await submit(client, spec("nobody/knows", tags={"a": "b"}))
    statuses = await anyio.to_thread.run_sync(_ask_everything, held.url, known)
    assert {200, 202, 400, 404, 409, 422} <= statuses, "the cases are too much alike to prove anything"


def _ask_everything(url: str, known: str) -> set[int]:
    """The statuses that came. `known`: an evaluation that exists."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    statuses: set[int] = set()
    with requests.Session() as session:
        session.trust_env = False

        def ask(case: AnyCase) -> None:
            if _runs_children(case):
                return
            response = case.call(session=session)
            statuses.add(response.status_code)
            case.validate_response(response, checks=CHECKS)

        for found in schema.get_all_operations():
            operation = found.ok()  # type: ignore[union-attr]  # raises on what is no description
            for case in islice(_at_the_bounds(schema, operation), COVERED):
                ask(case)
            for strategy in _strategies(operation, known):
                _generated(strategy, ask)
    return statuses


def _runs_children(case: AnyCase) -> bool:
    """A spec that is right, to be run in the request itself: the same specs go to POST /evaluations, and to no child."""
    if case.path != "/tasks/execute" or not isinstance(case.body, dict):
        return False
    try:
        Spec.model_validate(case.body.get("evaluation"))
    except ValidationError:
        return False
    return True


def _at_the_bounds(schema: Any, operation: AnyOperation) -> Iterator[AnyCase]:
    return schema.iter_coverage_cases(  # type: ignore[no-any-return]
        operation,
        generation_modes=list(GenerationMode),
        generation_config=schema.config.generation_for(operation=operation),
    )


def _strategies(operation: AnyOperation, known: str) -> Iterator[Any]:
    yield operation.as_strategy()
    if operation.body or list(operation.iter_parameters()):
        yield operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)
    if "{evaluation_id}" in operation.path:
        yield operation.as_strategy(path_parameters={"evaluation_id": known})
    if "{execution_id}" in operation.path:
        yield operation.as_strategy(path_parameters={"execution_id": f"{known}.plan"})


def _generated(strategy: Any, ask: Any) -> None:
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def each(case: AnyCase) -> None:
        ask(case)

    each()
