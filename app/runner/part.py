"""One of the logs that an evaluation's samples lie in, as a report reads it: without transcripts."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from zipfile import ZipFile, ZipInfo

import zipfile_zstd  # noqa: F401  # Inspect's: teaches `zipfile` the method of its logs, which Python knows from 3.14 on
from inspect_ai.log import EvalSample, read_eval_log_sample

from app.runner.members import CHUNK, copy_member, sample_member
from app.runner.messages import SampleRef
from app.runner.values import MEMBER, Values
from app.runner.values import read as read_values

TRANSCRIPT = frozenset({"messages", "output", "store", "events", "events_data", "timelines", "attachments"})
"""The fields that make a sample large, and that no metric can see."""

_SMALL = 2**18
"""Bytes of a sample that are parsed whole: twenty times quicker than looking for what is not wanted. Ours."""

_SUMMARIES, _JOURNAL = "summaries.json", "_journal/summaries/"


class Part:
    """A context manager. What cannot be read raises what `zipfile`, the decompressor or the parser say."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Self:
        self._archive = ZipFile(self._path)
        self._summaries: dict[tuple[str, int], dict[str, Any]] | None = None
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def slim(self, sample: SampleRef) -> EvalSample:
        """The sample without its transcript, which has been read through and is whole."""
        info = self._info(sample)
        if info.file_size <= _SMALL:
            fields = json.loads(self._archive.read(info))
            return EvalSample.model_validate({name: fields[name] for name in fields.keys() - TRANSCRIPT})
        with self._archive.open(info) as member:
            while member.read(CHUNK):
                pass
        return read_eval_log_sample(str(self._path), sample.id, sample.epoch, exclude_fields=set(TRANSCRIPT))

    @cached_property
    def values(self) -> dict[SampleRef, Values]:
        """What JSON has lost of the samples; few logs have any."""
        return read_values(self._path) if MEMBER in self._archive.NameToInfo else {}

    def summary(self, sample: SampleRef) -> dict[str, Any]:
        """As Inspect has written it: in a finished log in one place, in a copy of one in progress in its journal."""
        if self._summaries is None:
            self._summaries = {(str(one["id"]), one["epoch"]): one for one in self._all_summaries()}
        return self._summaries[str(sample.id), sample.epoch]

    def copy(self, sample: SampleRef, target: ZipFile) -> None:
        copy_member(self._archive, self._info(sample), target)

    def _info(self, sample: SampleRef) -> ZipInfo:
        return self._archive.getinfo(sample_member(sample.id, sample.epoch))

    def _all_summaries(self) -> list[dict[str, Any]]:
        names = self._archive.NameToInfo
        journal = sorted(
            (n for n in names if n.startswith(_JOURNAL)), key=lambda n: int(n[len(_JOURNAL) : -len(".json")])
        )
        return [
            one
            for name in ([_SUMMARIES] if _SUMMARIES in names else journal)
            for one in json.loads(self._archive.read(name))
        ]
