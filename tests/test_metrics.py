"""Figures that no run of a test brings about by itself."""

import pytest

from app import metrics
from app.metrics import QueueFigures, RunnerFigures
from tests.recorded import Recorded

AGE, PENDING = "proctor.queue.oldest_pending_age", "proctor.queue.pending"


@pytest.fixture
def recorded() -> Recorded:
    """Its own."""
    return Recorded()


def test_tokens_and_dollars_add_up_by_provider(recorded: Recorded) -> None:
    figures = RunnerFigures(recorded.telemetry.meter)
    figures.spent("openai", 100, 0.25)
    figures.spent("anthropic", 10, 0)
    figures.spent("openai", 50, 0.5)
    assert recorded.value("proctor.runner.tokens", provider="openai") == 150
    assert recorded.value("proctor.runner.cost", provider="openai") == 0.75
    assert recorded.value("proctor.runner.tokens", provider="anthropic") == 10
    assert recorded.points("proctor.runner.cost", provider="anthropic") == [], "its price is not known, which is not 0"


def test_what_the_last_sweep_saw_is_told_until_it_is_stale(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next sweep may reach another worker, and two must not tell of two times."""
    figures = QueueFigures(recorded.telemetry.meter)
    assert recorded.points(AGE) == []
    figures.swept(12.5, 3)
    assert (recorded.value(AGE), recorded.value(PENDING)) == (12.5, 3)
    monkeypatch.setattr(metrics, "FRESH", 0)
    assert (recorded.points(AGE), recorded.points(PENDING)) == ([], [])


def test_without_telemetry_nobody_asks_how_long_things_wait(recorded: Recorded) -> None:
    assert not QueueFigures().wanted
    assert QueueFigures(recorded.telemetry.meter).wanted
