"""Runs hidden tests inside the sandbox. Never imported here: `python3 -I -` reads it from its standard input there.

The folder /workspace is the agent's, so nothing in it is trusted: only its file `solution.py` is taken, as a copy, into a new
folder. It runs in processes of its own (`solution_process`), which the tests call: it finds neither pytest nor the tests in
its memory, the file with the tests is gone before its first line runs, and the kernel refuses it this process's memory and
files. No `conftest.py`, `pytest.ini`, `sitecustomize.py` or `pytest.py` in /workspace is looked at (`-I` leaves the working
folder and the environment out). The result goes to no file that could have been prepared: it is printed, each line behind a
mark that the scorer makes up for this run and that only this process knows.
"""

import contextlib
import ctypes
import json
import linecache
import os
import shutil
import sys
import tempfile
from collections.abc import Generator
from types import ModuleType
from typing import Any

_PR_SET_DUMPABLE = 4  # prctl(2)


def main(mark: str, tests: str, solution: str, pytest_folder: str, solution_process: str) -> None:
    """Prints `mark` and JSON: first that pytest is there, then one line for each test. All else goes to stderr."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    os.set_inheritable(results.fileno(), False)
    _close_to_others()
    sys.dont_write_bytecode = True
    sys.path.insert(0, pytest_folder)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    import pytest

    print(f"{mark}{json.dumps({'pytest': pytest.__version__})}", file=results)
    with _tests_file(tests) as file, _solution(solution, solution_process, file) as module:
        sys.modules["solution"] = module

        class Results:
            @pytest.hookimpl(wrapper=True)
            def pytest_collection(self) -> Generator[None, Any, Any]:
                try:
                    return (yield)
                finally:
                    module.end()

            @pytest.hookimpl(wrapper=True)
            def pytest_runtest_call(self) -> Generator[None, Any, Any]:
                try:
                    return (yield)
                finally:
                    module.end()

            def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
                if report.when == "call":
                    name = report.nodeid.rpartition("::")[2]
                    print(f"{mark}{json.dumps({'test': name, 'passed': report.passed})}", file=results)

        os.chdir(os.path.dirname(file))
        options = ["-q", "--tb=short", "--color=no", "-c", os.devnull, "--rootdir=.", "--noconftest"]
        pytest.main([*options, "--import-mode=importlib", "-p", "no:cacheprovider", file], plugins=[Results()])


def _close_to_others() -> None:
    """From here on, processes of the same user can read neither this one's memory nor its open files."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


@contextlib.contextmanager
def _tests_file(tests: str) -> Generator[str, None, None]:
    """pytest reads tests from a file only. Their lines stay in memory, for tracebacks, when the file is gone."""
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "test_hidden.py")
        with open(file, "w", encoding="utf-8") as stream:
            stream.write(tests)
        linecache.cache[file] = (len(tests), None, tests.splitlines(keepends=True), file)
        yield file


@contextlib.contextmanager
def _solution(path: str, solution_process: str, tests_file: str) -> Generator[Any, None, None]:
    """The module that stands for the solution in the tests' process."""
    code: dict[str, Any] = ModuleType("solution_process").__dict__
    exec(compile(solution_process, "solution_process.py", "exec"), code)  # noqa: S102 # our own file, brought as text
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(OSError):  # without a solution, the tests fail to import it: that is their result
            shutil.copyfile(path, os.path.join(folder, "solution.py"))
        start = f"{solution_process}\n\nserve(int(sys.argv[1]), {folder!r})\n"

        def before() -> None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(tests_file)

        module = code["Solution"]([sys.executable, "-Iu", "-c", start], before)
        try:
            yield module
        finally:
            module.end()
