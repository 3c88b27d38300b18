"""Shifts the clock of a Python process by CLOCK_WRONG_BY seconds: this folder in PYTHONPATH is all that it takes, so that
the processes it starts are as wrong.

Shifted are, each as Python code calls it to learn what time it is: `time.time`, `time.time_ns`, `time.localtime`,
`time.gmtime`, `time.ctime`, `datetime.now`, `datetime.utcnow`, and `today` of both classes, which asks `time.time`. Not
shifted: the monotonic clocks, what C code asks the kernel for (OpenSSL, gRPC's core, the times of files), other programs;
and gRPC's Python half, which tells its core deadlines by the clock: where a clock is really wrong, the two agree.
"""

import ctypes
import datetime
import gc
import os
import sys
import time
from collections.abc import Callable
from typing import Any


def shift(by: float) -> None:
    real_time, real_time_ns, delta = time.time, time.time_ns, datetime.timedelta(seconds=by)
    time.time = lambda: real_time() + (0 if _is_grpc(sys._getframe(1)) else by)
    time.time_ns = lambda: real_time_ns() + int(by * 10**9)
    for name in ("localtime", "gmtime", "ctime"):
        setattr(time, name, _of_now(getattr(time, name)))
    for name in ("now", "utcnow"):
        _replace(datetime.datetime, name, _later(vars(datetime.datetime)[name], delta))


def _is_grpc(caller: Any) -> bool:
    return str(caller.f_globals.get("__name__", "")).startswith("grpc.")


def _of_now(form: Callable[[float], Any]) -> Callable[..., Any]:
    return lambda seconds=None: form(time.time() if seconds is None else seconds)


def _later(real: Any, delta: datetime.timedelta) -> Any:
    return classmethod(lambda cls, *args, **named: real.__get__(None, cls)(*args, **named) + delta)


def _replace(kind: type, name: str, method: Any) -> None:
    """Types made in C do not let their methods be set, and a subclass in their place would not be what C code makes: so
    it is done in their dictionary itself, which CPython hands out to the garbage collector."""
    gc.get_referents(vars(kind))[0][name] = method
    ctypes.pythonapi.PyType_Modified(ctypes.py_object(kind))


if "CLOCK_WRONG_BY" in os.environ:
    shift(float(os.environ["CLOCK_WRONG_BY"]))
