"""The log: Cloud Logging's fields, readable on a terminal, and no secret in it whoever lets one slip."""

import logging
from typing import Any

import pytest
import structlog
from pydantic import BaseModel

from app.settings import Settings, load
from tests.logged import logged
from tests.recorded import Recorded, id_of, trace_of

URL = "postgresql://user:of-the-database@127.0.0.1/none"
QUEUE = "projects/the-project/locations/somewhere/queues/q"
log = structlog.get_logger(__name__)


@pytest.fixture
def plain() -> Settings:
    """Of a service that reaches nothing."""
    return load(database_url=URL, queue=QUEUE, worker="worker-1", revision="proctor-00001")


def test_a_line_has_the_fields_that_cloud_logging_reads(plain: Settings) -> None:
    recorded = Recorded()
    with (
        logged(plain) as logs,
        structlog.contextvars.bound_contextvars(evaluation="e", execution="e.1", attempt=2),
        recorded.telemetry.tracer.start_as_current_span("push"),
    ):
        log.warning("something happened", figure=3)
    (line,) = logs.lines
    (span,) = recorded.spans()
    assert (line["severity"], line["message"], line["figure"]) == ("WARNING", "something happened", 3)
    assert (line["evaluation"], line["execution"], line["attempt"]) == ("e", "e.1", 2)
    assert line["logging.googleapis.com/labels"] == {
        "evaluation": "e",
        "execution": "e.1",
        "attempt": "2",
        "worker": "worker-1",
        "revision": "proctor-00001",
    }
    assert line["logging.googleapis.com/trace"] == f"projects/the-project/traces/{trace_of(span):032x}"
    assert line["logging.googleapis.com/spanId"] == f"{id_of(span):016x}"
    assert line["logging.googleapis.com/trace_sampled"] is True


def test_a_line_outside_of_any_trace_names_none(plain: Settings) -> None:
    with logged(plain) as logs:
        logging.getLogger("a.library").error("in %s words", "its own")
    (line,) = logs.lines
    assert (line["severity"], line["message"]) == ("ERROR", "in its own words")
    assert not [name for name in line if name.startswith("logging.googleapis.com/trace")]
    assert line["logging.googleapis.com/labels"] == {"worker": "worker-1", "revision": "proctor-00001"}


def test_an_exception_is_told_as_error_reporting_wants_it(plain: Settings) -> None:
    with logged(plain) as logs:
        try:
            raise ValueError("it broke")
        except ValueError:
            log.exception("unexpected error")
    (line,) = logs.lines
    assert line["message"] == "unexpected error"
    assert line["stack_trace"].startswith("unexpected error\nTraceback (most recent call last)")
    assert line["stack_trace"].endswith("ValueError: it broke")
    assert line["@type"].endswith("ReportedErrorEvent")
    assert line["serviceContext"] == {"service": "proctor", "version": "proctor-00001"}


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_secret_is_logged_however_it_gets_there(
    plain: Settings, monkeypatch: pytest.MonkeyPatch, log_format: str
) -> None:
    secrets = {
        "SOME_PROVIDER_API_KEY": "sk-key-123456",
        "HUB_TOKEN": "hub-123456",
        "WEBHOOK_SECRET": "hook-123456",
        "PGPASSWORD": "pg-123456",
        "OTEL_EXPORTER_OTLP_HEADERS": "x-api-key=collector-123456",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    bare = structlog.get_logger("of.the.service")
    with logged(plain, log_format=log_format) as logs:
        for value in secrets.values():
            bare.info(f"told {value} in the message", field=value, deep={"a": [f"<{value}>"], value: 1})
            logging.getLogger("a.library").warning("%s as an argument", value)
            _fail(value)
        bare.info("headers", headers={"Authorization": "Bearer eyJhbGciOi.J9.x-y_z"})
        bare.info("Basic dXNlcjpwYXNz in the message")
        bare.error("cannot connect", reason="to postgresql://someone:p%40ss@10.0.0.1:5432/x, password='quoted'")
        bare.error("of ours", reason="of-the-database", kind=Exception("of-the-database"))
    written = ("sk-key", "hub-1", "hook-1", "pg-1", "collector-1", "eyJ", "dXNlcjpw", "p%40ss", "quoted", "of-the-data")
    assert [secret for secret in written if secret in logs.text] == []
    assert logs.text.count("[redacted]") > len(secrets) * 5
    assert "someone" in logs.text, "only what is secret goes"
    assert "10.0.0.1" in logs.text


def _fail(value: str) -> None:
    local = value  # a traceback that shows variables would show this one
    try:
        raise RuntimeError(f"the key {local} is not accepted")
    except RuntimeError:
        log.exception("it failed")
        logging.getLogger("a.library").exception("it failed")


class Told(BaseModel):
    number: int


def test_what_pydantic_was_given_is_not_quoted(plain: Settings) -> None:
    prompt = "-".join(("the", "prompt"))  # not in the source line that a traceback shows
    with logged(plain) as logs:
        try:
            Told.model_validate({"number": prompt})
        except ValueError as error:
            log.warning("not understood", reason=str(error))
            log.exception("not understood")
    assert prompt not in logs.text
    assert "unable to parse string as an integer" in logs.text


def test_a_terminal_gets_readable_lines(plain: Settings) -> None:
    with logged(plain, log_format="console") as logs, structlog.contextvars.bound_contextvars(execution="e.1"):
        log.info("something happened", figure=3)
    (line,) = logs.text.splitlines()
    assert "something happened" in line
    assert "e.1" in line
    assert not line.startswith("{")


def test_short_values_are_no_secrets(plain: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or every line would be full of holes."""
    monkeypatch.setenv("SOME_KEY", "1")
    with logged(plain) as logs:
        log.info("1 of 11")
    assert [line["message"] for line in logs.lines] == ["1 of 11"]


def test_children_are_told_nothing_of_where_telemetry_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.settings import children_environment

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=secret")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    kept: dict[str, Any] = children_environment()
    assert not [name for name in kept if name.startswith("OTEL_")]
