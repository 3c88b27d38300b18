"""Runs hidden tests inside the sandbox. Never imported here: `python3 -I -` reads it from its standard input there.

The folder /workspace is the agent's, so nothing in it is trusted: only its file `solution.py` is taken, as a copy, into
a new folder that comes last on the path. No `conftest.py`, `pytest.ini`, `sitecustomize.py` or `pytest.py` there is
looked at (`-I` leaves the working folder and the environment out), and the result goes to no file that could have been
prepared: it is printed, each line behind a mark that the scorer makes up for this run.

The solution does run in this process. One that searches the interpreter's memory for the mark could print results of
its own: the judge sees its source, and so does the transcript.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Generator
from types import FrameType
from typing import Any

# Of the processor, not of the clock: a score must not depend on how busy the machine is. What sleeps for ever ends with
# the whole run.
SECONDS_TO_IMPORT = 5
SECONDS_PER_TEST = 5


def main(mark: str, tests: str, solution: str, pytest_folder: str) -> None:
    """Prints `mark` and JSON: first that pytest is there, then one line for each test. All else goes to stderr."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.dont_write_bytecode = True
    sys.path.insert(0, pytest_folder)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import pytest

    class Results:
        @pytest.hookimpl(wrapper=True)
        def pytest_collection(self) -> Generator[None, Any, Any]:
            with _deadline(SECONDS_TO_IMPORT):
                return (yield)

        @pytest.hookimpl(wrapper=True)
        def pytest_runtest_call(self) -> Generator[None, Any, Any]:
            with _deadline(SECONDS_PER_TEST):
                return (yield)

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call":
                name = report.nodeid.rpartition("::")[2]
                print(f"{mark}{json.dumps({'test': name, 'passed': report.passed})}", file=results)

    print(f"{mark}{json.dumps({'pytest': pytest.__version__})}", file=results)
    os.chdir(_folder(tests, solution))
    sys.path.append(os.getcwd())
    options = ["-q", "--tb=short", "--color=no", "-c", os.devnull, "--rootdir=.", "--noconftest"]
    pytest.main([*options, "--import-mode=importlib", "-p", "no:cacheprovider", "test_hidden.py"], plugins=[Results()])


def _folder(tests: str, solution: str) -> str:
    folder = tempfile.mkdtemp()
    with open(os.path.join(folder, "test_hidden.py"), "w", encoding="utf-8") as file:
        file.write(tests)
    with contextlib.suppress(OSError):  # without a solution, the tests fail to import it: that is their result
        shutil.copyfile(solution, os.path.join(folder, "solution.py"))
    return folder


@contextlib.contextmanager
def _deadline(seconds: int) -> Generator[None, None, None]:
    """One test that does not end fails; the others still count."""

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s of computing")

    signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
