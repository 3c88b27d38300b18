"""Calls into code that is not trusted, in a process of its own. Never imported here: `hidden_test_run` reads it as text.

The tests and the solution share no memory. What passes between them are copies of plain values: a subclass of `list` with an
`__eq__` of its own arrives as a list, any other object as a `Remote`, which equals nothing but itself. An argument that the
solution changes, and a result that is part of an argument, look to the tests as if there had been one process: containers
are numbered for each call, and their contents come back with the result.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import operator
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import date, datetime, timedelta
from decimal import Decimal
from types import ModuleType
from typing import Any

# One reply's bytes. A solution that answers with more than this would cost the tests their memory.
LONGEST = 16 * 2**20
# Characters of an exception's message.
_MESSAGE = 2_000
# Seconds for the import of the solution and one test: of the processor, not of the clock, so that a score does not depend on
# how busy the machine is. What sleeps for ever ends with the whole run.
CPU_SECONDS = 5

_SPECIAL: dict[str, Callable[..., Any]] = {
    "len": len,
    "iter": iter,
    "next": next,
    "bool": bool,
    "str": str,
    "contains": operator.contains,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
}
# Subclasses come as what they are subclasses of. The order matters: bool before int, datetime before date.
_PLAIN: tuple[tuple[type, str, Callable[[Any], Any], Callable[[Any], Any]], ...] = (
    (bool, "bool", bool, bool),
    (int, "int", lambda value: hex(int(value)), lambda text: int(text, 16)),
    (float, "float", lambda value: float(value).hex(), float.fromhex),
    # as bytes: JSON would join two halves of a pair that were apart
    (
        str,
        "str",
        lambda value: str.encode(value, "utf-8", "surrogatepass").hex(),
        lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    ),
    (bytes, "bytes", lambda value: bytes(value).hex(), bytes.fromhex),
    (datetime, "datetime", datetime.isoformat, datetime.fromisoformat),
    (date, "date", date.isoformat, date.fromisoformat),
    (
        timedelta,
        "timedelta",
        lambda value: [value.days, value.seconds, value.microseconds],
        lambda parts: timedelta(*parts),
    ),
    (Decimal, "decimal", Decimal.__str__, Decimal),
)
_MUTABLE: tuple[type, ...] = (list, dict, set)


class SolutionError(RuntimeError):
    """The solution's process ended, or answered what cannot be read."""


class Values:
    """Turns values into JSON and back for one call. `other` encodes an object that has no plain form, `found` decodes it."""

    def __init__(self, other: Callable[[Any], Any], found: Callable[[Any], Any]) -> None:
        self._other, self._found = other, found
        self._numbers: dict[int, int] = {}
        self.containers: list[Any] = []

    def encode(self, value: Any) -> Any:
        if value is None:
            return None
        for kind, name, plain, _ in _PLAIN:
            if isinstance(value, kind):
                return [name, plain(value)]
        if isinstance(value, tuple):
            return ["tuple", [self.encode(item) for item in tuple.__iter__(value)]]
        if isinstance(value, frozenset):
            return ["frozenset", [self.encode(item) for item in frozenset.__iter__(value)]]
        if isinstance(value, _MUTABLE):
            return self._container(value)
        return ["other", self._other(value)]

    def _container(self, value: Any) -> Any:
        if id(value) in self._numbers:
            return ["same", self._numbers[id(value)]]
        number = self._keep(value)
        kind = next(kind for kind in _MUTABLE if isinstance(value, kind))
        return [kind.__name__, number, self.contents(value)]

    def _keep(self, value: Any) -> int:
        self.containers.append(value)
        self._numbers[id(value)] = len(self.containers) - 1
        return len(self.containers) - 1

    def contents(self, value: Any) -> list[Any]:
        """What a list, a dict (pairs) or a set holds, encoded."""
        if isinstance(value, dict):
            return [[self.encode(key), self.encode(item)] for key, item in dict.items(value)]
        return [self.encode(item) for item in (list if isinstance(value, list) else set).__iter__(value)]

    def decode(self, form: Any) -> Any:
        if form is None:
            return None
        name, *rest = form
        for _, known, _, read in _PLAIN:
            if name == known:
                return read(rest[0])
        if name == "tuple":
            return tuple(self.decode(item) for item in rest[0])
        if name == "frozenset":
            return frozenset(self.decode(item) for item in rest[0])
        if name == "same":
            return self.containers[rest[0]]
        if name == "other":
            return self._found(rest[0])
        container = {"list": list, "dict": dict, "set": set}[name]()
        if self._keep(container) != rest[0]:
            raise ValueError("containers are out of order")
        self.fill(container, rest[1])
        return container

    def fill(self, container: Any, contents: list[Any]) -> None:
        """Makes a container hold just `contents`. A dict keeps the order that they come in."""
        if isinstance(container, dict):
            pairs = [(self.decode(key), self.decode(item)) for key, item in contents]
            container.clear()
            container.update(pairs)
            return
        items = [self.decode(item) for item in contents]
        container.clear()
        container.extend(items) if isinstance(container, list) else container.update(items)


# The solution's side


def serve(channel: int, folder: str) -> None:
    """Answers calls into `folder`/solution.py until the other side hangs up."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    sys.dont_write_bytecode = True
    sys.path.append(folder)
    with socket.socket(fileno=channel) as link, link.makefile("rwb") as stream:
        server = _Server()
        for line in stream:
            stream.write(json.dumps(server.answer(json.loads(line))).encode() + b"\n")
            stream.flush()


class _Server:
    def __init__(self) -> None:
        self._objects: list[Any] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        values = Values(self._hold, self._held)
        try:
            arguments = values.decode(request["arguments"])
            given = list(values.containers)
            result = self._do(request["verb"], arguments)
            if isinstance(result, type) and issubclass(result, BaseException):
                return {"exception": _class(result)}
            form = values.encode(result)
        except BaseException as error:  # SystemExit too: it ends the call, not the tests
            return {"raised": _class(type(error)), "message": _text(error), "object": self._hold(error)}
        return {"result": form, "given": [values.contents(container) for container in given]}

    def _do(self, verb: str, arguments: list[Any]) -> Any:
        if verb == "import":
            import solution  # type: ignore[import-not-found, unused-ignore]

            return getattr(solution, *arguments)
        if verb == "get":
            return getattr(*arguments)
        if verb == "call":
            function, positional, named = arguments
            return function(*positional, **named)
        return _SPECIAL[verb](*arguments)

    def _hold(self, value: Any) -> Any:
        self._objects.append(value)
        return len(self._objects) - 1

    def _held(self, form: Any) -> Any:
        if isinstance(form, str):
            return self._do("import", [form])
        return self._objects[form]


def _class(kind: type) -> dict[str, Any]:
    """An exception's class with its bases, so that `except` on the other side goes by them."""
    return {
        "name": kind.__name__,
        "builtin": kind.__module__ == "builtins",
        "bases": [_class(base) for base in kind.__bases__ if issubclass(base, BaseException)],
    }


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_MESSAGE]
    except Exception:
        return ""


# The tests' side


class Solution(ModuleType):
    """The module `solution`, as tests import it. Each test starts a process of its own: none sees what another has left."""

    def __init__(self, command: list[str], before: Callable[[], None]) -> None:
        """`command` gets a socket's number as its last argument. `before`: called before the solution's first line runs."""
        super().__init__("solution")
        self._command, self._before = command, before
        self.process: subprocess.Popen[bytes] | None = None
        self._stream: Any = None
        self._exceptions: dict[str, type[Exception]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        reply = self._ask("import", [name])
        return self._answer(reply, whole=name)

    def end(self) -> None:
        """Ends the solution's process, and what it started in its group. The next call starts a new one."""
        if self.process is None:
            return
        self._stream.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def ask(self, verb: str, *arguments: Any) -> Any:
        return self._answer(self._ask(verb, list(arguments)))

    def _ask(self, verb: str, arguments: list[Any]) -> dict[str, Any]:
        self._values = Values(_form, self._remote)
        # The outer list is no argument of the solution's, so it is not one of those that come back.
        request = {"verb": verb, "arguments": ["tuple", [self._values.encode(item) for item in arguments]]}
        self._start()
        try:
            self._stream.write(json.dumps(request).encode() + b"\n")
            self._stream.flush()
            line = self._stream.readline(LONGEST)
            if not line.endswith(b"\n"):
                raise SolutionError(
                    "The solution ended in the middle of a call." if len(line) < LONGEST else "It said too much."
                )
            reply: dict[str, Any] = json.loads(line)
        except (OSError, ValueError, RecursionError) as error:
            raise SolutionError(f"The solution gave no answer: {type(error).__name__}") from None
        return reply

    def _start(self) -> None:
        if self.process is not None:
            return
        self._before()
        ours, theirs = socket.socketpair()
        with theirs:
            command = [*self._command, str(theirs.fileno())]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True, env={}
            )
        with ours:
            self._stream = ours.makefile("rwb")

    def _answer(self, reply: dict[str, Any], whole: str | None = None) -> Any:
        """`whole`: the name in the module that the reply is about, by which every process of it knows it."""
        if "raised" in reply:
            raise self._raised(reply)
        try:
            result = self._read(reply)
        except (LookupError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise SolutionError(f"The solution's answer cannot be read: {type(error).__name__}") from None
        return Remote(self, whole) if whole and isinstance(result, Remote) else result

    def _read(self, reply: dict[str, Any]) -> Any:
        if "exception" in reply:
            return self._exception(reply["exception"])
        given = list(self._values.containers)
        result = self._values.decode(reply["result"])
        for container, contents in zip(given, reply["given"], strict=True):
            self._values.fill(container, contents)
        return result

    def _raised(self, reply: dict[str, Any]) -> Exception:
        kind = self._exception(reply["raised"])
        error = kind.__new__(kind, reply["message"])
        error.args = (reply["message"],)
        error.remote = Remote(self, reply["object"])  # type: ignore[attr-defined]
        return error

    def _exception(self, form: dict[str, Any]) -> type[Exception]:
        """The class that stands for one of the solution's. SystemExit would end the tests: it becomes an error."""
        if form["builtin"]:
            kind = getattr(builtins, form["name"], None)
            return kind if isinstance(kind, type) and issubclass(kind, Exception) else SolutionError
        if form["name"] not in self._exceptions:
            bases = tuple(dict.fromkeys(self._exception(base) for base in form["bases"]))
            self._exceptions[form["name"]] = type(form["name"], bases, {"__getattr__": _of_remote})
        return self._exceptions[form["name"]]

    def _remote(self, form: Any) -> Remote:
        return Remote(self, form)


class Remote:
    """An object of the solution's. It can be called, asked for attributes and items, gone through and measured.

    It equals itself alone: what the solution's own `__eq__` would say is worth nothing. Compare its attributes instead.
    """

    def __init__(self, solution: Solution, form: Any) -> None:
        """`form`: a name in the module, which every process knows, or a number that the running one gave it."""
        process = None if isinstance(form, str) else solution.process
        self.__dict__.update(_solution=solution, _form=form, _process=process)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        return self._solution.ask("call", self, positional, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pytest and Python ask for some: what the solution would say is not looked at
            raise AttributeError(name)
        return self._solution.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise TypeError(f"The tests cannot set {name!r} of an object of the solution's.")

    def __len__(self) -> int:
        return int(self._solution.ask("len", self))

    def __bool__(self) -> bool:
        return bool(self._solution.ask("bool", self))

    def __str__(self) -> str:
        return str(self._solution.ask("str", self))

    def __iter__(self) -> Iterator[Any]:
        iterator = self._solution.ask("iter", self)
        with contextlib.suppress(StopIteration):
            while True:
                yield self._solution.ask("next", iterator)

    def __contains__(self, item: Any) -> bool:
        return bool(self._solution.ask("contains", self, item))

    def __getitem__(self, key: Any) -> Any:
        return self._solution.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._solution.ask("setitem", self, key, value)

    def __delitem__(self, key: Any) -> None:
        self._solution.ask("delitem", self, key)


def _of_remote(error: Any, name: str) -> Any:
    """The attribute of an exception that stands for one of the solution's."""
    if name.startswith("__") or "remote" not in error.__dict__:
        raise AttributeError(name)
    return getattr(error.remote, name)


def _form(value: Any) -> Any:
    if isinstance(value, Remote):
        if value._process is not None and value._process is not value._solution.process:
            raise SolutionError("This object went with the process that it lived in: each test has its own.")
        return value._form
    raise TypeError(f"Only plain values and the solution's own objects can be given to it, not {type(value).__name__}.")
