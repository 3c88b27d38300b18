"""Hidden tests and a solution that runs in a process of its own: what passes between them, and what does not."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from app.examples.programming import _beginning, _end, _source
from app.runner.visible import PYTEST

MARK = "<mark of this run>"


def _run(folder: Path, solution: str, tests: str) -> tuple[dict[str, bool], str]:
    """Each test that was reported, whether it passed, and all that was printed beside."""
    file = folder / "given.py"
    file.write_text(solution)
    call = f"main({MARK!r}, {tests!r}, {str(file)!r}, {PYTEST!r}, {_source('solution_process')!r})"
    script = f"{_source('hidden_test_run')}\n\n{call}\n"
    done = subprocess.run([sys.executable, "-I", "-"], input=script, capture_output=True, text=True, timeout=100)
    lines = [json.loads(line.removeprefix(MARK)) for line in done.stdout.splitlines() if line.startswith(MARK)]
    return {line["test"]: line["passed"] for line in lines if "test" in line}, done.stderr


# What a test in one process with the solution would see, it sees here

HONEST = """
from collections import Counter, OrderedDict, namedtuple
from datetime import date, timedelta
from decimal import Decimal

Point = namedtuple("Point", "x y")

class Stack:
    limit = 3
    def __init__(self, *items, name="stack"):
        self.items, self.name = list(items), name
    def push(self, item):
        if len(self.items) >= self.limit:
            raise Full("no room", item)
        self.items.append(item)
        return self
    def other(self, stack): return Stack(*self.items, *stack.items)
    def __len__(self): return len(self.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, index): return self.items[index]
    def __setitem__(self, index, value): self.items[index] = value
    def __delitem__(self, index): del self.items[index]
    def __contains__(self, item): return item in self.items
    def __bool__(self): return bool(self.items)
    def __str__(self): return f"<{self.name}>"

class Trouble(Exception): pass
class Full(Trouble, ValueError):
    def __init__(self, message, item):
        super().__init__(message)
        self.item = item

COUNT = []
def count():
    COUNT.append(1)
    return len(COUNT)
def values():
    return [None, True, 1, 2**80, 1.5, float("inf"), "\\ud83d\\ude00\\udc80", b"\\x00", (1, [2]), {1: {2}}, frozenset({3}),
            date(2024, 2, 29), timedelta(1, 2, 3), Decimal("1.10"), Point(1, 2), Counter("aab"), OrderedDict(a=1)]
def sort(items): items.sort()
def first(rows): return rows[0]
def grow(table, key): table.setdefault(key, set()).add(key); return table
def numbers(n):
    yield from range(n)
def leave(): raise SystemExit(3)
def look_up(key): return {}[key]
def decode(data): return data.decode()
def cycle():
    items = [1]
    items.append(items)
    return items
"""

TESTS = """
from datetime import date, timedelta
from decimal import Decimal
import pytest
import solution
from solution import Full, Stack, Trouble, count, cycle, decode, first, grow, leave, look_up, numbers, sort, values

def test_values_arrive_as_they_are():
    assert values() == [None, True, 1, 2**80, 1.5, float("inf"), "\\ud83d\\ude00\\udc80", b"\\x00", (1, [2]), {1: {2}},
                        frozenset({3}), date(2024, 2, 29), timedelta(1, 2, 3), Decimal("1.10"), (1, 2), {"a": 2, "b": 1},
                        {"a": 1}]
    assert values()[1] is True

def test_an_argument_that_was_changed():
    items, table = [3, 1, 2], {}
    sort(items)
    assert items == [1, 2, 3]
    assert grow(table, "a") is table and table == {"a": {"a"}}

def test_a_result_that_is_part_of_an_argument():
    rows = [[1], [2]]
    first(rows).append(9)
    assert rows == [[1, 9], [2]]

def test_what_holds_itself():
    items = cycle()
    assert items[1] is items

def test_objects():
    stack = Stack(1, 2, name="s")
    assert stack.push(3).items == [1, 2, 3] and len(stack) == 3 and list(stack) == [1, 2, 3] and stack[1] == 2
    stack[1] = 7
    del stack[0]
    assert 7 in stack and 1 not in stack and str(stack) == "<s>" and stack and not Stack()
    assert stack.other(Stack(5)).items == [7, 3, 5]
    assert Stack.limit == solution.Stack.limit == 3
    assert list(numbers(3)) == [0, 1, 2]

def test_errors_keep_their_class_message_and_attributes():
    with pytest.raises(Full, match="no room") as caught:
        Stack(1, 2, 3).push(4)
    assert caught.value.item == 4
    assert isinstance(caught.value, Trouble) and isinstance(caught.value, ValueError)
    with pytest.raises(KeyError):
        look_up("a")
    with pytest.raises(UnicodeDecodeError):
        decode(b"\\xff")

def test_a_call_that_exits_is_an_error():
    with pytest.raises(RuntimeError):
        leave()

def test_what_cannot_be_given():
    with pytest.raises(TypeError, match="plain values"):
        sort(lambda: 1)

def test_each_test_has_a_process_of_its_own():
    assert (count(), count()) == (1, 2)

def test_and_so_has_the_next():
    assert count() == 1
"""


def test_honest_code_is_tested_as_if_there_were_one_process(tmp_path: Path) -> None:
    passed, output = _run(tmp_path, HONEST, TESTS)
    assert passed, output
    assert all(passed.values()), output
    assert len(passed) == TESTS.count("def test_")


# What earns nothing

VICTIM = """
import pytest
from solution import answer

def test_a_value():
    assert answer(6) == 42

def test_an_error():
    with pytest.raises(ValueError):
        answer(-1)
"""
GAMES = {
    "a result that says it is equal to all": """
class Liar(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def answer(n): return Liar(0)
""",
    "an object that says it is equal to all": """
class Liar:
    def __eq__(self, other): return True
def answer(n): return Liar()
""",
    "a class of result that claims to be another": """
class Liar:
    __class__ = int
    def __eq__(self, other): return True
def answer(n): return Liar()
""",
    "a patch to what the tests use": """
import builtins, sys
for module in list(sys.modules.values()):
    for name in ("raises", "fail", "main", "AssertionError"):
        if hasattr(module, name): setattr(module, name, None)
builtins.AssertionError = builtins.Exception = SystemExit
def answer(n): raise SystemExit(0)
""",
    "an early exit": f"import os\nprint('{MARK}' + '2 passed')\nos._exit(0)\n",
    "an exit in the call": "import os\ndef answer(n): os._exit(0)\n",
    "a look through the frames": """
import sys
def answer(n):
    frame, found = sys._getframe(), None
    while frame:
        found = frame.f_locals.get("other", found)
        frame = frame.f_back
    return found
""",
    "a skip": "import pytest\npytest.skip('not today', allow_module_level=True)\n",
    "answers of its own on the line": """
import gc, socket
def answer(n):
    for item in gc.get_objects():
        if isinstance(item, socket.socket):
            item.send(b'{"result": ["nothing", 1], "given": []}\\n' * 3)
    return 1
""",
    "an answer without an end": "def answer(n): return 'x' * (20 * 2**20)\n",
    "an end of the tests' process": "import os, signal\ndef answer(n): os.kill(os.getppid(), signal.SIGTERM)\n",
}


@pytest.mark.parametrize("game", GAMES)
def test_a_game_earns_nothing(game: str, tmp_path: Path) -> None:
    passed, output = _run(tmp_path, GAMES[game], VICTIM)
    assert not any(passed.values()), output


def test_a_right_answer_earns_what_the_games_do_not(tmp_path: Path) -> None:
    right = "def answer(n):\n    if n < 0: raise ValueError\n    return 7 * n\n"
    assert _run(tmp_path, right, VICTIM)[0] == {"test_a_value": True, "test_an_error": True}


def test_a_test_that_computes_for_ever_fails_alone(tmp_path: Path) -> None:
    endless = "def answer(n):\n    while n > 0: pass\n    raise ValueError\n"
    assert _run(tmp_path, endless, VICTIM)[0] == {"test_a_value": False, "test_an_error": True}


def test_the_solution_finds_no_tests_in_the_folders(tmp_path: Path) -> None:
    spy = """
import os, sys, tempfile
found = [name for folder, _, names in os.walk(tempfile.gettempdir()) for name in names if name == "test_hidden.py"]
def answer(n): return found + [os.getcwd(), sys.path]
"""
    tests = (
        "from solution import answer\n\ndef test_nothing_is_found():\n    assert 'test_hidden.py' not in answer(1)\n"
    )
    passed, output = _run(tmp_path, spy, tests)
    assert passed == {"test_nothing_is_found": True}, output


def test_what_is_cut_is_said_first() -> None:
    assert _beginning("x = 1") == "whole, 5 characters]:\nx = 1"
    long = "#" * 20_000 + "whole]"
    assert _beginning(long).startswith("only the first 20,000 of 20,006 characters: the rest is cut]:\n###")
    assert _beginning(long).endswith("#")
    assert _end("ab" * 10_001) == "[the first 2 characters are cut]\n" + "ab" * 10_000
    assert _end("short") == "short"
