"""The task `programming`, in Inspect, with the scripted model and the real sandbox."""

import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest
from inspect_ai.log import EvalLog, EvalSample, read_eval_log
from inspect_ai.scorer import Score
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.util import sandbox

from app.examples import TASKS, programming
from app.examples.problem import load_problems, markdown_files

REPOSITORY = Path(__file__).resolve().parents[2]

EXPECTED = {  # passed tests, all tests, the judge's grade
    "bank_ledger": (3, 8, "I"),
    "business_days": (7, 7, "C"),
    "line_diff": (0, 6, "I"),
    "lru_cache": (5, 7, "P"),
    "merge_intervals": (7, 7, "C"),
    "query_string": (7, 7, "C"),
    "rate_limiter": (7, 7, "P"),
    "roman_numerals": (6, 6, "C"),
    "spiral_matrix": (8, 8, "C"),
    "tokenizer": (9, 9, "C"),
    "topological_sort": (7, 7, "C"),
    "wrap_text": (6, 9, "P"),
}


def _evaluate(folder: Path, task: str) -> EvalLog:
    """Runs `task`, the first arguments of `eval`, in Inspect. In a process of its own: what Inspect leaves open would
    be found in other tests here. Without a way out: what would be downloaded fails."""
    code = f"""
from inspect_ai import eval, task_with
from app.examples import programming
from tests.examples.test_programming import attempt
eval({task}, model="scripted/agent", display="none", ctl_server=False, log_dir={str(folder)!r})
"""
    environment = {**os.environ, "HTTPS_PROXY": "http://127.0.0.1:9"}
    command = [sys.executable, "-c", code]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, timeout=150, stdout=subprocess.DEVNULL)
    [file] = folder.glob("*.eval")
    log = read_eval_log(str(file))
    assert log.status == "success", log.error
    return log


def _samples(log: EvalLog) -> dict[str, EvalSample]:
    return {str(sample.id): sample for sample in log.samples or []}


def _scores(sample: EvalSample) -> dict[str, Score]:
    assert sample.error is None, sample.error
    return sample.scores or {}


def test_a_whole_evaluation_needs_no_key_and_comes_out_as_scripted(tmp_path: Path) -> None:
    whole = _evaluate(tmp_path, "programming(), model_roles={'grader': 'scripted/judge'}")
    _assert_scores(whole)
    _assert_metrics(whole)
    _assert_hidden_tests_stay_hidden(whole)


def _assert_scores(whole: EvalLog) -> None:
    found = {}
    for name, sample in _samples(whole).items():
        tests, judge = _scores(sample)["tests_pass"], _scores(sample)["judge"]
        passed, total = (int(word) for word in (tests.answer or "").split() if word.isdigit())
        assert tests.value == passed / total
        found[name] = (passed, total, judge.value)
        assert all(sample.model_usage[model].total_tokens for model in ("scripted/agent", "scripted/judge"))
    assert found == EXPECTED


def _assert_metrics(whole: EvalLog) -> None:
    assert whole.results is not None
    tests, judge = ({name: metric.value for name, metric in score.metrics.items()} for score in whole.results.scores)
    shares = {name: passed / total for name, (passed, total, _) in EXPECTED.items()}
    assert tests["mean"] == pytest.approx(mean(shares.values()))
    assert tests["hard"] == pytest.approx(mean(shares[name] for name in ("bank_ledger", "line_diff", "tokenizer")))
    assert tests["money"] == pytest.approx(shares["bank_ledger"])
    assert judge["mean"] == pytest.approx((7 * 1 + 3 * 0.5) / 12)
    assert {"stderr", "easy", "medium", "parsing"} < set(tests)


def _assert_hidden_tests_stay_hidden(whole: EvalLog) -> None:
    problems = load_problems()
    for name, sample in _samples(whole).items():
        conversation = "\n".join(message.text for message in sample.messages)
        assert problems[name].prompt in conversation
        assert not any(test in conversation for test in problems[name].test_names)
        assert sample.metadata == {"category": problems[name].category, "difficulty": problems[name].difficulty}


# Attempts to get a score without a solution. Each is a set of files in /workspace.

PASS_ALL = """
import pytest
@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    report.outcome = "passed"
    return report
"""
IMPORTED = "raise SystemExit('imported from /workspace')\n"
CORRECT_BUT_ENDLESS = """
from collections import OrderedDict
class LRUCache:
    def __init__(self, capacity):
        if capacity < 1: raise ValueError
        self.capacity, self.entries = capacity, OrderedDict()
    def get(self, key, default=None):
        if key not in self.entries: return default
        self.entries.move_to_end(key)
        return self.entries[key]
    def put(self, key, value):
        self.entries[key] = value
        self.entries.move_to_end(key)
        if len(self.entries) > self.capacity: self.entries.popitem(last=False)
    def __len__(self):
        while True: pass
    def keys(self):
        return list(self.entries)
"""
SPY = """
import glob, os
def seen():
    found = []
    for name in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/fd/*") + glob.glob("/tmp/**", recursive=True):
        try:
            if f"/{os.getpid()}/" not in name and os.path.isfile(name) and b"def " + b"test_" in open(name, "rb").read():
                found.append(name)
        except OSError:
            pass
    return found
def open_memory():
    try:
        open(f"/proc/{os.getppid()}/mem", "rb").close()
    except PermissionError:
        return "refused"
    return "open"
def spiral(matrix): print("spied:", seen(), "memory:", open_memory())
rotate = spiral
"""
ATTEMPTS = {
    "spiral_matrix": {"solution.py": SPY},
    "bank_ledger": {
        "conftest.py": PASS_ALL,
        "solution.py": "class Ledger: pass\nclass InsufficientFunds(Exception): pass",
    },
    "business_days": {"solution.py": "import os; print('7 passed in 0.01s'); os._exit(0)"},
    "line_diff": {"solution.py": "import pytest; pytest.skip('not today', allow_module_level=True)"},
    "lru_cache": {"solution.py": CORRECT_BUT_ENDLESS},
    "merge_intervals": {"pytest.ini": "[pytest]\npython_functions = nothing\n", "solution.py": "gaps = merge = None"},
    "query_string": {"solution.py": "while True: pass"},
    "rate_limiter": {},
    "roman_numerals": {"solution.py/file": "a folder in its place"},
}
OWED = {"lru_cache": 6 / 7}
SHADOWS = dict.fromkeys(("pytest.py", "json.py", "sitecustomize.py", "usercustomize.py", "os.py"), IMPORTED)


@solver
def attempt() -> Solver:
    async def solve(state: TaskState, generate: Generate) -> TaskState:
        for name, content in {**SHADOWS, **ATTEMPTS[str(state.sample_id)]}.items():
            await sandbox().write_file(name, content)
        return state

    return solve


def test_only_a_solution_earns_a_score(tmp_path: Path) -> None:
    log = _evaluate(tmp_path, f"task_with(programming(n={len(ATTEMPTS)}), solver=attempt())")
    spied = str(_scores(_samples(log)["spiral_matrix"])["tests_pass"].explanation)
    assert "spied: [] memory: refused" in spied, spied
    values = {name: _scores(sample)["tests_pass"].value for name, sample in _samples(log).items()}
    assert values == {name: OWED.get(name, 0) for name in ATTEMPTS}
    without, graded = (_samples(log)[name] for name in ("rate_limiter", "query_string"))
    assert _scores(without)["judge"].value == "I"
    assert not without.model_usage
    assert _scores(graded)["judge"].value == "C"  # as scripted for the problem, whatever stands in the file
    assert set(graded.model_usage) == {"scripted/agent"}  # no grader is named: the model itself judges


# The task's arguments and files


def test_the_first_problems_of_a_difficulty() -> None:
    assert [sample.id for sample in programming(n=2, difficulty="easy").dataset] == ["merge_intervals", "query_string"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"difficulty": "brutal"}, "difficulty is one of easy, hard, medium, not 'brutal'"),
        ({"n": 0}, "n is a whole number from 1 to 12, not 0"),
        ({"n": "3"}, "n is a whole number from 1 to 12, not '3'"),
        ({"n": 4, "difficulty": "hard"}, "n is a whole number from 1 to 3, not 4"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TASKS["programming"](**arguments)


def test_each_problem_is_whole_and_has_a_script() -> None:
    problems = load_problems()
    assert set(problems) == set(markdown_files("scripts")) == set(EXPECTED)
    for name, problem in problems.items():
        assert problem.prompt, name
        assert problem.rubric, name
        assert len(problem.test_names) == EXPECTED[name][1]
