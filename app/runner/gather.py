"""Takes an evaluation's samples out of the logs they lie in: each without its transcript, for the metrics, and the whole of
it, still compressed, into packs for the merged log.

Logs of a remote store are brought here some at a time. Packs go to the store as they are full, and each counts as progress:
an attempt that is cut short, or lost, leaves them to the next.
"""

import json
import signal
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, Any, NoReturn

from inspect_ai.log import EvalSample

from app.addresses import local_path
from app.runner.checkpoint import wind_down
from app.runner.messages import LOGS, Job, Packed, Paused, SampleRef, Transcript
from app.runner.packs import INDEX, PACK, Entry, Pack, Packing, entries
from app.runner.part import Part
from app.runner.values import Values
from app.runner.writer import Writer
from app.store import Store

PACK_BYTES = 64 * 2**20
PACK_SECONDS = 60.0
"""A pack is full at either. Ours: what a lost attempt costs at most, against the store's price of a file."""

BROUGHT_BYTES = 64 * 2**20
"""Of logs at a time, or one that is larger. Ours: on Cloud Run the local disk is memory."""

_AT_ONCE = 8
"""Requests to the store."""

_PACKS = "checkpoint"
"""The folder of an attempt that is deleted once its execution is over."""


class Summaries:
    """What Inspect's lists show of each sample, kept on disk."""

    def __init__(self, folder: Path) -> None:
        self._file: IO[bytes] = TemporaryFile(dir=folder)  # noqa: SIM115  # as long as the process
        self._places: dict[SampleRef, tuple[int, int]] = {}

    def add(self, sample: SampleRef, summary: dict[str, Any]) -> None:
        text = json.dumps(summary).encode()
        self._places[sample] = self._file.seek(0, 2), len(text)
        self._file.write(text)

    def get(self, sample: SampleRef) -> bytes:
        place, length = self._places[sample]
        self._file.seek(place)
        return self._file.read(length)


class Gathering:
    """`samples`: without their transcripts; `values`: of theirs that JSON loses; `unreadable`: why a sample could not be had
    from its log; `packs`: where the samples lie whole; `obstacle`: why some do not; `progress`: this attempt has come further
    than the one before."""

    def __init__(self, job: Job, out: Writer) -> None:
        self.samples: dict[SampleRef, EvalSample] = {}
        self.values: dict[SampleRef, Values] = {}
        self.unreadable: dict[SampleRef, str] = {}
        self.packs: list[Pack] = []
        self.obstacle: str | None = None
        self.progress = False
        self.store = Store(job.artifacts or f"{job.directory}/{LOGS}")
        self._attempt = (job.evaluation_id, job.execution_id, job.attempt) if job.artifacts else ()
        self._local = Path(job.directory, "packs")
        self._local.mkdir(parents=True, exist_ok=True)
        self.summaries = Summaries(self._local)
        self._transcripts = job.transcripts
        self._out = out
        self._packing: Packing | None = None
        self._full = 0.0

    def url(self, *parts: str) -> str:
        """In the attempt's own folder."""
        return self.store.url(*self._attempt, *parts)

    def gather(self) -> None:
        """Waits for the end if the process is to stop."""
        self._take_up()
        logs: defaultdict[str, list[Transcript]] = defaultdict(list)
        for transcript in self._transcripts:
            if transcript.sample not in self.samples:
                logs[transcript.log].append(transcript)
        for log, path in self._bring(list(logs)):
            self._read(path, logs[log])
            if self._packing and (self._packing.bytes > PACK_BYTES or time.monotonic() > self._full):
                self._ship()
            if wind_down.asked:
                self.pause()
        if self._packing:
            self._packing.close()
            self.packs.append(Pack(self._packing.pack, self._packing.samples))

    def pause(self) -> NoReturn:
        """Leaves what there is to the next attempt."""
        if self._packing:
            self._ship()
        self._out.send(Paused())
        while True:
            signal.pause()

    def open(self, pack: Pack, folder: Path) -> Path:
        """The pack as a file, in `folder` if it has to be brought."""
        return self._here(pack.place, folder / "pack") if isinstance(pack.place, str) else pack.place

    def _take_up(self) -> None:
        """What earlier attempts have packed, as far as the samples still lie in the same logs."""
        if not self._attempt:
            return
        wanted, folder = set(self._transcripts), self.store.url(*self._attempt[:2])
        names = set(self.store._find(folder))
        for name in sorted(name for name in names if name.endswith(INDEX)):
            pack = name.removesuffix(INDEX) + PACK
            if pack not in names:
                continue
            found = Pack(f"{folder}/{pack}", [])
            index = self._here(f"{folder}/{name}", self._local / "index")
            for entry in entries(index):
                if entry.transcript in wanted and entry.transcript.sample not in self.samples:
                    self._keep(entry)
                    found.samples.append(entry.transcript.sample)
            self.packs.append(found)

    def _keep(self, entry: Entry) -> None:
        self.samples[entry.transcript.sample] = entry.sample
        self.summaries.add(entry.transcript.sample, entry.summary)
        if entry.values:
            self.values[entry.transcript.sample] = entry.values

    def _read(self, path: Path, transcripts: Sequence[Transcript]) -> None:
        try:
            with Part(path) as part:
                for transcript in transcripts:
                    entry = _entry(part, transcript)
                    self._keep(entry)
                    self._pack(part, entry)
        except MemoryError:
            raise
        except Exception as error:  # of zipfile, the decompressor, the parser, or pydantic
            reason = f"its log cannot be read: {type(error).__name__}: {error}"
            rest = [t.sample for t in transcripts if t.sample not in self.samples]
            self.unreadable |= dict.fromkeys(rest, reason)

    def _pack(self, part: Part, entry: Entry) -> None:
        """Without room on the local disk the metrics are computed all the same."""
        if self.obstacle:
            return
        try:
            if self._packing is None:
                self._packing = Packing(self._local, f"{len(self.packs) + 1:05}")
                self._full = time.monotonic() + PACK_SECONDS
            self._packing.add(part, entry)
        except OSError as error:
            self._give_up(f"the samples could not be packed: {error}")

    def _ship(self) -> None:
        """The index last, for the pack counts with it."""
        assert self._packing
        packing, self._packing = self._packing, None
        pack = self.url(_PACKS, packing.pack.name)
        try:
            packing.close()
            self.store._put(packing.pack, pack)
            self.store._put(packing.index, self.url(_PACKS, packing.index.name))
        except OSError as error:
            self._give_up(f"the samples could not be stored: {error}")
            return
        self.packs.append(Pack(pack, packing.samples))
        packing.delete()
        self.progress = True
        self._out.send(Packed(samples=len(packing.samples)))

    def _give_up(self, obstacle: str) -> None:
        self.obstacle, self._packing = obstacle, None
        for file in self._local.iterdir():
            file.unlink()

    def _bring(self, logs: Sequence[str]) -> Iterator[tuple[str, Path]]:
        """Each log with a path, at which there is no file if the store has none."""
        remote = [log for log in logs if local_path(log) is None]
        for log in logs:
            if path := local_path(log):
                yield log, path
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for group in _groups(remote, list(pool.map(self._size, remote))):
                with TemporaryDirectory(dir=self._local.parent) as folder:
                    paths = [Path(folder, f"{number}.eval") for number in range(len(group))]
                    yield from zip(group, list(pool.map(self._here, group, paths)), strict=True)

    def _size(self, log: str) -> int:
        try:
            return self.store._size(log)
        except FileNotFoundError:
            return 0

    def _here(self, address: str, path: Path) -> Path:
        if (here := local_path(address)) is not None:
            return here
        try:
            self.store._get(address, path)
        except FileNotFoundError:
            path.unlink(missing_ok=True)
        return path


def _entry(part: Part, transcript: Transcript) -> Entry:
    ref = transcript.sample
    return Entry(transcript, part.summary(ref), part.slim(ref), part.values.get(ref))


def _groups(logs: Sequence[str], sizes: Sequence[int]) -> Iterator[list[str]]:
    group, total = list[str](), 0
    for log, size in zip(logs, sizes, strict=True):
        if group and total + size > BROUGHT_BYTES:
            yield group
            group, total = [], 0
        group.append(log)
        total += size
    if group:
        yield group
