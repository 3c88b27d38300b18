"""Spans are made below a span that records, and nowhere else; what crosses a queue is W3C's text."""

import pytest
from opentelemetry.trace import INVALID_SPAN, get_current_span

from app.tracing import HEADER, NO_TRACER, begin, coming_from, event, headers, span, to_text
from tests.recorded import Recorded, id_of

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = SAMPLED[:-1] + "0"


@pytest.fixture
def recorded() -> Recorded:
    """Its own."""
    return Recorded()


def test_what_is_below_a_span_is_its_child_and_what_is_in_none_is_nothing(recorded: Recorded) -> None:
    with span("in none") as nothing:
        assert nothing is INVALID_SPAN
        event("unheard")
    with begin(recorded.telemetry.tracer, "push", execution="e.1", retry_count=None) as push, span("claim", attempt=2):
        assert push.is_recording()
    claim, above = recorded.spans()
    assert (above.name, above.attributes) == ("push", {"proctor.execution": "e.1"})
    assert (claim.name, claim.attributes, claim.parent and claim.parent.span_id) == (
        *("claim", {"proctor.attempt": 2}),
        id_of(above),
    )
    assert get_current_span() is INVALID_SPAN


@pytest.mark.parametrize(("parent", "spans"), [(SAMPLED, 2), (UNSAMPLED, 0)])
def test_a_trace_is_recorded_whole_or_not_at_all(recorded: Recorded, parent: str, spans: int) -> None:
    with begin(recorded.telemetry.tracer, "push", parent), span("claim"):
        assert to_text()
    assert len(recorded.spans()) == spans


def test_an_error_leaves_its_kind_and_not_its_words(recorded: Recorded) -> None:
    with pytest.raises(RuntimeError), begin(recorded.telemetry.tracer, "push"), span("run"):
        raise RuntimeError("the prompt, word for word")
    for ended in recorded.spans():
        assert ended.attributes == {"error.type": "RuntimeError"}
        assert (ended.events, ended.status.is_ok, ended.status.description) == ((), False, None)


def test_without_telemetry_the_platform_s_trace_still_reaches_the_queue() -> None:
    """So the log of an evaluation can be found by it."""
    with coming_from(SAMPLED), begin(NO_TRACER, "submit"), span("enqueue"):
        assert headers(to_text()) == {"traceparent": SAMPLED, HEADER: SAMPLED}
    assert headers(to_text()) == {}
