"""Logs of one sample each, as executions leave them, for tests and benchmarks of what becomes of many."""

import random
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from inspect_ai.event import InfoEvent
from inspect_ai.log import EvalConfig, EvalDataset, EvalLog, EvalPlan, EvalSample, EvalSpec, EvalStats, write_eval_log
from inspect_ai.model import ChatMessageAssistant, ChatMessageUser, ModelOutput, ModelUsage
from inspect_ai.scorer import Score

from app.runner.members import copy_member, sample_member
from app.runner.messages import SampleRef, Transcript

WORD_BYTES = 6


def make_parts(folder: Path, samples: int, sample_bytes: int) -> list[Transcript]:
    """Of the task `simple`. They differ in their ids only: the transcripts are words drawn at random."""
    folder.mkdir(parents=True, exist_ok=True)
    first = folder / "1.eval"
    usage = {"mockllm/model": ModelUsage(input_tokens=2, output_tokens=1, total_tokens=3)}
    sample = EvalSample(
        id=1,
        epoch=1,
        input="?",
        target="fine",
        messages=_conversation(sample_bytes),
        output=ModelOutput.from_content("mockllm/model", "fine"),
        scores={"plain": Score(value="C")},
        events=[InfoEvent(data="x")],
        model_usage=usage,
        uuid="1",
    )
    write_eval_log(_log(sample), str(first))
    for id in range(2, samples + 1):
        _copy_as(first, id, folder / f"{id}.eval")
    return [
        Transcript(sample=SampleRef(id=id, epoch=1), log=f"file://{folder}/{id}.eval") for id in range(1, samples + 1)
    ]


def _copy_as(first: Path, id: int, path: Path) -> None:
    with ZipFile(first) as source, ZipFile(path, "w") as target:
        for info in source.infolist():
            if info.filename in (sample_member(1, 1), "summaries.json"):
                name = info.filename.replace("/1_", f"/{id}_")
                fields = (
                    source.read(info)
                    .replace(b'"id":1,', b'"id":%d,' % id, 1)
                    .replace(b'"id": 1,', b'"id": %d,' % id, 1)
                )
                with ZipFile(path.with_suffix(".own"), "w", info.compress_type) as own:
                    own.writestr(name, fields)
                with ZipFile(path.with_suffix(".own")) as own:
                    copy_member(own, own.getinfo(name), target)
                path.with_suffix(".own").unlink()
            elif not info.filename.startswith("_journal/summaries"):
                copy_member(source, info, target)


def _conversation(size: int) -> list[Any]:
    drawn = random.Random(size)
    words = ["".join(drawn.choices("abcdefghijklmnop", k=WORD_BYTES - 1)) for _ in range(4_000)]
    long = [
        ChatMessageUser(content=" ".join(drawn.choices(words, k=min(100_000, size) // WORD_BYTES)))
        for _ in range(max(1, size // 100_000))
    ]
    return [*long, ChatMessageAssistant(content="fine")]


def _log(sample: EvalSample) -> EvalLog:
    spec = EvalSpec(
        created="2026-01-01T00:00:00+00:00",
        task="simple",
        dataset=EvalDataset(),
        model="mockllm/model",
        config=EvalConfig(epochs=1),
    )
    return EvalLog(eval=spec, plan=EvalPlan(), status="success", samples=[sample], stats=EvalStats())
