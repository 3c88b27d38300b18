"""Writes an evaluation's one log: whole, out of packs, or without transcripts if that cannot be."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO
from zipfile import ZIP_ZSTANDARD, BadZipFile, ZipFile  # type: ignore[attr-defined]  # see app.runner.part

from inspect_ai.log import EvalLog, EvalSample, write_eval_log

from app.runner.checkpoint import wind_down
from app.runner.gather import Gathering
from app.runner.members import copy_member, sample_member
from app.runner.messages import SampleRef

_START, _JOURNAL, _SUMMARIES = "_journal/start.json", "_journal/summaries/1.json", "summaries.json"
_HEADER = ("reductions.json", "header.json")


class _Stop(Exception):
    """The process is to stop."""


def save(log: EvalLog, gathering: Gathering, name: str, directory: Path) -> str | None:
    """Writes `log`, whose samples have no transcripts, to the attempt's folder with those of `gathering`. Returns why it has
    none, if that is so. `directory`: for files of the moment."""
    obstacle = gathering.obstacle
    if obstacle is None:
        try:
            gathering.store._stream(gathering.url(name), partial(_write, log, gathering, directory))
            return None
        except _Stop:
            if gathering.progress:
                gathering.pause()
            obstacle = "it takes longer to write than a push may last"
        except (OSError, BadZipFile) as error:
            obstacle = f"it could not be written: {error}"
    _save_slim(log, gathering, name, directory)
    return obstacle


def _save_slim(log: EvalLog, gathering: Gathering, name: str, directory: Path) -> None:
    with TemporaryDirectory(dir=directory) as folder:
        file = Path(folder, "slim.eval")
        write_eval_log(log, str(file))
        gathering.store._put(file, gathering.url(name))


def _write(log: EvalLog, gathering: Gathering, directory: Path, target: IO[bytes]) -> None:
    """Strictly forward, for `target` may be an upload."""
    samples = log.samples or []
    with TemporaryDirectory(dir=directory) as folder, ZipFile(target, "w", ZIP_ZSTANDARD) as whole:
        skeleton = Path(folder, "skeleton.eval")
        write_eval_log(log.model_copy(update={"samples": []}), str(skeleton))
        with ZipFile(skeleton) as header:
            copy_member(header, header.getinfo(_START), whole)
            _copy_packs(gathering, Path(folder), whole)
            with TemporaryFile(dir=folder) as beside:
                _add_own(samples, gathering, beside, whole)
            for name in _HEADER:
                if name in header.NameToInfo:
                    copy_member(header, header.getinfo(name), whole)


def _copy_packs(gathering: Gathering, folder: Path, whole: ZipFile) -> None:
    for pack in gathering.packs:
        with ZipFile(gathering.open(pack, folder)) as archive:
            for sample in pack.samples:
                if wind_down.asked:
                    raise _Stop
                copy_member(archive, archive.getinfo(sample_member(sample.id, sample.epoch)), whole)


def _add_own(samples: Sequence[EvalSample], gathering: Gathering, beside: IO[bytes], whole: ZipFile) -> None:
    """The members that are no log's: compressed beside, for a stream cannot be gone back in to tell their sizes."""
    with ZipFile(beside, "w", ZIP_ZSTANDARD) as own, own.open(_SUMMARIES, "w", force_zip64=True) as summaries:
        for place, sample in enumerate(samples):
            summaries.write(b"," if place else b"[")
            summaries.write(gathering.summaries.get(SampleRef(id=sample.id, epoch=sample.epoch)))
        summaries.write(b"]" if samples else b"[]")
    with ZipFile(beside) as own:
        for name in (_JOURNAL, _SUMMARIES):  # a log that is opened to be written to counts by its journal
            copy_member(own, own.getinfo(_SUMMARIES), whole, name)
