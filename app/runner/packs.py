"""Samples on their way from an evaluation's logs to its merged one, packed so that a report that is cut short goes on.

A pack holds samples as they lie in their logs, compressed. Beside it lies its index: of each sample which log it is from, its
summary, and the sample without its transcript. A pack in the store counts once its index is there.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZipFile

from inspect_ai.log import EvalSample

from app.runner.messages import SampleRef, Transcript
from app.runner.part import TRANSCRIPT, Part
from app.runner.values import Values

PACK, INDEX = ".pack", ".index"


class Entry(NamedTuple):
    """One sample of a pack, and the values in it that JSON loses."""

    transcript: Transcript
    summary: dict[str, Any]
    sample: EvalSample
    values: Values | None


class Pack(NamedTuple):
    """A file here, or an address in the store; and which of its samples are wanted."""

    place: Path | str
    samples: list[SampleRef]


class Packing:
    """A pack that is being filled, in a local folder."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.pack, self.index = folder / f"{name}{PACK}", folder / f"{name}{INDEX}"
        self.samples: list[SampleRef] = []
        self._archive = ZipFile(self.pack, "w")
        self._entries = gzip.open(self.index, "wt", compresslevel=1)  # noqa: SIM115  # `close` does

    @property
    def bytes(self) -> int:
        return self._archive.start_dir

    def add(self, part: Part, entry: Entry) -> None:
        """`entry`: what was read of it from the part."""
        part.copy(entry.transcript.sample, self._archive)
        sample = entry.sample.model_dump(mode="json", exclude=set(TRANSCRIPT))
        line = {
            "transcript": entry.transcript.model_dump(),
            "summary": entry.summary,
            "sample": sample,
            "values": entry.values,
        }
        self._entries.write(json.dumps(line) + "\n")
        self.samples.append(entry.transcript.sample)

    def close(self) -> None:
        self._archive.close()
        self._entries.close()

    def delete(self) -> None:
        self.pack.unlink()
        self.index.unlink()


def entries(index: Path) -> Iterator[Entry]:
    with gzip.open(index, "rt") as lines:
        for line in lines:
            fields = json.loads(line)
            transcript, sample = (
                Transcript.model_validate(fields["transcript"]),
                EvalSample.model_validate(fields["sample"]),
            )
            yield Entry(transcript, fields["summary"], sample, Values(*fields["values"]) if fields["values"] else None)
