"""An artifact store that is away, or that says yes and keeps nothing: stands in front of a real file system."""

from typing import Any

from app.store import Store

_WRITES, _READS = ("put_file", "pipe_file"), ("cat_file", "get_file", "find", "rm_file", "size")


class FaultyStore:
    """`away`: refuses everything; `hollow`: takes every file and keeps nothing of it; `refuses`: a part of a name that it
    does not take. `refused` counts."""

    def __init__(self, files: Any) -> None:
        self.away = self.hollow = False
        self.refuses: str | None = None
        self.refused = 0
        self._files = files

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._files, name)
        if name not in (*_WRITES, *_READS):
            return real

        def call(*args: Any, **named: Any) -> Any:
            if self.away or (self.refuses and name in _WRITES and any(self.refuses in str(arg) for arg in args)):
                self.refused += 1
                raise OSError("503 Service Unavailable")
            if self.hollow and name in _WRITES:
                return self._files.pipe_file(args[1] if name == "put_file" else args[0], b"")
            return real(*args, **named)

        return call


def in_front_of(store: Store) -> FaultyStore:
    faulty = FaultyStore(store._filesystem)
    store._filesystem = faulty
    return faulty
