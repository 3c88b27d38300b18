"""What Inspect tells while it runs, passed on to the service."""

import math
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import anyio
from inspect_ai.event import ModelEvent
from inspect_ai.hooks import (
    BeforeModelGenerate,
    Hooks,
    ModelRetry,
    ModelUsageData,
    SampleEnd,
    SampleEvent,
    SampleScoring,
    SampleStart,
    hooks,
)
from inspect_ai.log import EvalSample
from inspect_ai.model import ModelUsage
from inspect_ai.scorer import Score
from pydantic import JsonValue

from app.runner.checkpoint import commits, wind_down
from app.runner.excerpt import excerpt
from app.runner.failures import is_cancellation, recorded_failure
from app.runner.messages import (
    ENDED,
    VALUES,
    Checkpointed,
    Paused,
    Progress,
    SampleEnded,
    SampleRef,
    SampleResult,
    ScoreValue,
    Spent,
)
from app.runner.storable import storable
from app.runner.values import Values, values_of, write
from app.runner.writer import Writer


def register(out: Writer, logs: Path, scorers: Collection[str]) -> "Told":
    """To be called once in a process: Inspect never forgets a hook. `scorers`: the names of the task's own."""
    told = Told(out, logs, scorers)

    @hooks(name="proctor", description="Reports to the service.")
    class _Registered(Reporter):
        def __init__(self) -> None:
            super().__init__(told)

    return told


class Told:
    """What the service has been told of samples that ended."""

    def __init__(self, out: Writer, logs: Path, scorers: Collection[str]) -> None:
        self.out = out
        self._scorers = scorers
        self._logs = logs
        self.samples: set[SampleRef] = set()
        self._values: dict[SampleRef, Values] = {}

    def ended(self, sample: EvalSample) -> None:
        """Once for each."""
        ref = SampleRef(id=sample.id, epoch=sample.epoch)
        if ref not in self.samples:
            if not (found := values_of(sample, self._scorers)).empty:
                self._values[ref] = found
            self.out.send(SampleEnded(result=sample_result(sample, self.keep_log())))
            self.samples.add(ref)

    def keep_log(self) -> str:
        """Copies the log as it is now to where the service takes it from: Inspect goes on writing to its own. Returns its
        name."""
        return self._copy(self._logs.with_name(ENDED))

    def finish(self) -> None:
        """The run has ended, and the service takes the whole log from Inspect's folder, by the name that was told."""
        if self._values:
            self._copy(self._logs)

    def _copy(self, folder: Path) -> str:
        log = self._log()
        kept = folder / (log.stem + VALUES if self._values else log.name)
        kept.parent.mkdir(exist_ok=True)
        half = kept.with_suffix(".half")
        shutil.copyfile(log, half)
        if self._values:
            write(half, self._values)
        half.replace(kept)
        return kept.name

    def _log(self) -> Path:
        """Inspect's own, of this attempt: a resumed one's folder holds older ones too."""
        logs = (path for path in self._logs.glob("*.eval") if not path.name.endswith(VALUES))
        return max(logs, key=lambda path: path.stat().st_mtime_ns)


class Reporter(Hooks):
    """Inspect swallows what hooks raise: what must not be lost is checked by the caller of `eval_set`."""

    def __init__(self, told: Told) -> None:
        self._told = told
        self._out = told.out
        self._progress = Progress()
        self._running: dict[str, SampleRef] = {}
        self._waiting: set[str] = set()

    async def on_sample_start(self, data: SampleStart) -> None:
        self._running[data.sample_id] = SampleRef(id=data.summary.id, epoch=data.summary.epoch)
        self._tell(step="started")

    async def on_sample_event(self, data: SampleEvent) -> None:
        """Of what is done: what begins is not told this way."""
        match data.event:
            case ModelEvent(output=output) if output.choices and output.message.tool_calls:
                self._tell(step=f"tool {output.message.tool_calls[0].function}")
            case event if event.event == "checkpoint" and data.sample_id in self._running and commits.take():
                self._told.keep_log()
                self._out.send(Checkpointed(sample=self._running[data.sample_id], number=event.checkpoint_id))

    async def on_before_model_generate(self, data: BeforeModelGenerate) -> None:
        """Winding down, a sample that has saved its state waits here for the interrupt: before its next turn is paid."""
        self._tell(step=f"model {data.model_name}")
        if data.sample_id is not None and wind_down.has_saved():
            await commits.all_told()
            self._waiting.add(data.sample_id)
            if len(self._waiting) >= len(self._running):  # a resumed sample has its old id here, and its new one there
                self._out.send(Paused())
            await anyio.sleep_forever()

    async def on_model_usage(self, data: ModelUsageData) -> None:
        progress, used, cost = self._progress, data.usage.total_tokens, data.usage.total_cost or 0.0
        provider = data.model_name.partition("/")[0]
        before = progress.providers.get(provider, Spent())
        self._tell(
            model_calls=progress.model_calls + 1,
            tokens=progress.tokens + used,
            cost=progress.cost + cost,
            providers={**progress.providers, provider: Spent(tokens=before.tokens + used, cost=before.cost + cost)},
        )

    async def on_model_retry(self, data: ModelRetry) -> None:
        why = data.status_code or data.exception_type or "an error"
        self._tell(step=f"model {data.model_name}: {why}, trying again in {data.wait_time:.0f} s")

    async def on_sample_scoring(self, data: SampleScoring) -> None:
        self._tell(step="scoring")

    async def on_sample_end(self, data: SampleEnd) -> None:
        self._running.pop(data.sample_id, None)
        if data.sample.error is not None and is_cancellation(data.sample.error):
            return  # interrupted: it did not end
        self._tell(samples_done=self._progress.samples_done + 1)
        self._told.ended(data.sample)

    def _tell(self, **changes: Any) -> None:
        self._progress = self._progress.model_copy(update=changes)
        self._out.send(self._progress)


def sample_result(sample: EvalSample, log: str) -> SampleResult:
    costs = [usage.total_cost for usage in sample.model_usage.values() if usage.total_cost is not None]
    return SampleResult(
        sample=SampleRef(id=sample.id, epoch=sample.epoch),
        scores={name: _score(score) for name, score in (sample.scores or {}).items()},
        usage=usage_by_model(sample.model_usage),
        cost=sum(costs) if costs else None,
        limit=sample.limit.type if sample.limit else None,
        error=recorded_failure(sample.error, answered_nothing=_answered_nothing(sample)) if sample.error else None,
        duration=sample.total_time,
        log=log,
    )


def _answered_nothing(sample: EvalSample) -> bool:
    """The last call of a model gave an answer without choices."""
    calls = [event for event in sample.events if isinstance(event, ModelEvent)]
    return bool(calls) and calls[-1].error is None and not calls[-1].output.choices


def usage_by_model(usage: Mapping[str, ModelUsage]) -> dict[str, dict[str, JsonValue]]:
    return {model: used.model_dump(mode="json", exclude_none=True) for model, used in usage.items()}


def as_json(value: object) -> JsonValue:
    """Plain JSON, which has no number for an infinity or NaN, and no database or browser takes one. An infinity is text then,
    as JSON Schema's and pydantic's users write it; NaN, which is what an unscored sample has, is null."""
    return _finite(storable(value))


def _finite(value: JsonValue) -> JsonValue:
    match value:
        case float():
            if math.isinf(value):
                return "Infinity" if value > 0 else "-Infinity"
            return None if math.isnan(value) else value
        case dict():
            return {key: _finite(item) for key, item in value.items()}
        case list():
            return [_finite(item) for item in value]
        case _:
            return value


def _score(score: Score) -> ScoreValue:
    """What is long, only as far as the ledger keeps it."""
    said: dict[str, JsonValue] = {
        "value": as_json(score.value),
        "answer": score.answer,
        "explanation": score.explanation,
    }
    kept = {name: excerpt(value) for name, value in said.items()}
    return ScoreValue.model_validate(kept | {"cut": [name for name in said if kept[name] != said[name]]})
