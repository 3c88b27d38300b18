"""A spec is stored and shown: it is refused if it holds a key, and the refusal does not repeat it."""

from typing import Any
from unittest.mock import Mock, sentinel

import pytest

from app.errors import InvalidRequest
from app.evaluations.allowed import Allowed
from app.evaluations.submit import Submissions
from app.inline import Inline
from app.redaction import Secrets
from app.spec import Spec
from app.tracing import NO_TRACER

KNOWN = "of-the-provider/and+more"
GUARDED = Allowed(secrets=Secrets({KNOWN}))


def spec(**fields: Any) -> Spec:
    return Spec(**{"task": "suite/one", "model": "mockllm/model", **fields})


@pytest.mark.parametrize(
    "arguments",
    [
        {"api_key": "anything-at-all"},
        {"apiKey": "anything-at-all"},
        {"API-KEY": "x"},
        {"token": "abc"},
        {"azure_ad_token": "abc"},
        {"Authorization": "abc"},
        {"default_headers": {"x-api-key": "abc"}},
        {"default_headers": {"anything": "Bearer abcdef0123"}},
        {"client_args": [{"password": "abc"}]},
        {"credentials": {"of": ["abc"]}},
        {"aws_secret_access_key": "abc"},
        {"base_url": "https://someone:abc@example.com/v1"},
        {"base_url": "https://example.com/v1?key=abcdef0123"},
        {"anything": "sk-ant-" + "a1" * 12},
        {"anything": f"this is {KNOWN}"},
    ],
)
def test_model_args_that_hold_a_key_are_refused_with_the_way_that_is_meant(arguments: dict[str, Any]) -> None:
    with pytest.raises(
        InvalidRequest, match=r"model_args.* must not hold a key.*OPENAI_API_KEY.*Secret Manager"
    ) as error:
        GUARDED.check(spec(model_args=arguments))
    for value in ("anything-at-all", "abc", "sk-ant", KNOWN):
        assert value not in f"{error.value} {error.value.errors}"


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_tokens": 5, "tokenizer": "some/thing", "stop_token": "</s>", "eos_token": "</s>"},
        {"prompt_cache_key": "runs of today", "use_auth_token": True},
        {"base_url": "http://127.0.0.1:8000/v1", "api_key": "none"},
        {"api_key": "", "token": None},
        {"api_key": "EMPTY"},
    ],
)
def test_model_args_without_a_key_are_taken(arguments: dict[str, Any]) -> None:
    GUARDED.check(spec(model_args=arguments))


@pytest.mark.parametrize(
    "fields",
    [
        {"task_args": {"prompt": f"use {KNOWN}"}},
        {"task_args": {KNOWN: 1}},
        {"task": f"suite/{KNOWN}"},
        {"model": f"mockllm/{KNOWN}"},
        {"model_roles": {"grader": f"mockllm/{KNOWN}"}},
        {"tags": {"key": KNOWN}},
        {"task_args": {"in base64": "b2YtdGhlLXByb3ZpZGVyL2FuZCttb3Jl"}},
    ],
)
def test_the_services_own_secrets_are_refused_anywhere(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="must not hold a key") as error:
        GUARDED.check(spec(**fields))
    assert KNOWN not in f"{error.value} {error.value.errors}"


async def test_a_key_is_refused_before_anything_is_written_or_run() -> None:
    """Neither the ledger nor a child is there to be used: no spec, no digest of it and no idempotency key is kept."""
    submissions = Submissions(sentinel.ledger, sentinel.queue, GUARDED)
    inline = Inline(Mock(spec_set=["tracer"], tracer=NO_TRACER), submissions, sentinel.reader)
    holding = spec(model_args={"api_key": "abcdef"})
    with pytest.raises(InvalidRequest, match="must not hold a key"):
        await submissions.submit(holding, "me", "a-key")
    with pytest.raises(InvalidRequest, match="must not hold a key"):
        await inline.run(holding, "me", "a-key")
    with pytest.raises(InvalidRequest, match=r"Idempotency-Key: .* must not hold a key"):
        await submissions.submit(spec(), "me", KNOWN)
