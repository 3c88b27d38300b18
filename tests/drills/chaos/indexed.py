"""A history, to be looked things up in."""

from collections import defaultdict
from collections.abc import Iterable
from functools import cached_property
from typing import TypeVar

from tests.drills.chaos.history import (
    Attempt,
    Call,
    Evaluation,
    Execution,
    File,
    History,
    Logged,
    Result,
    Sample,
    Submission,
)

T = TypeVar("T")
TERMINAL = ("succeeded", "failed", "cancelled")
THREE_CRASHES = "times without progress"
"""In the message of an execution that was given up by rule: its worker or child was lost so often."""


class Indexed:
    def __init__(self, history: History) -> None:
        self.history = history
        self.evaluations: dict[str, Evaluation] = {e.id: e for e in history.evaluations}
        self.executions: dict[str, Execution] = {e.id: e for e in history.executions}
        self.submissions: dict[str, Submission] = {s.evaluation: s for s in history.submissions}

    @cached_property
    def executions_of(self) -> dict[str, list[Execution]]:
        return _grouped((e.evaluation, e) for e in self.history.executions)

    @cached_property
    def attempts_at(self) -> dict[str, list[Attempt]]:
        """In order."""
        ordered = sorted(self.history.attempts, key=lambda a: a.attempt)
        return _grouped((a.execution, a) for a in ordered)

    @cached_property
    def results_of(self) -> dict[str, list[Result]]:
        return _grouped((r.evaluation, r) for r in self.history.results)

    @cached_property
    def files(self) -> dict[str, File]:
        return {file.path: file for file in self.history.files}

    @cached_property
    def logged(self) -> dict[tuple[str, str, int], Logged]:
        return {(one.log, one.sample, one.epoch): one for one in self.history.logged}

    @cached_property
    def calls_in(self) -> dict[str, list[Call]]:
        """The agents' only, by conversation."""
        return _grouped((c.conversation, c) for c in self.history.calls if c.kind == "agent")

    def planned(self, evaluation: str) -> list[tuple[Sample, Execution]]:
        return [(sample, run) for run in self.executions_of[evaluation] for sample in run.samples]

    def path(self, url: str) -> str:
        """Below the store's root."""
        return url.removeprefix(f"{self.history.root}/")

    def given_up(self, evaluation: str) -> bool:
        """An execution of it was, by the rule of three crashes."""
        return any(
            e.state == "failed" and THREE_CRASHES in str((e.error or {}).get("message"))
            for e in self.executions_of[evaluation]
        )


def _grouped(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    groups: defaultdict[str, list[T]] = defaultdict(list)
    for key, thing in pairs:
        groups[key].append(thing)
    return groups
