"""Any interleaving of what callers, workers, sweepers and the queue do to the ledger, beside its model.

A failure is printed as a program of steps, made as short as possible. To go through it again, put the `@reproduce_failure`
that is printed with it on `LedgerMachine`.

Each argument is one choice from a list: Hypothesis leaves out a step only if it is made of few choices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, ClassVar, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from hypothesis.strategies import SearchStrategy

from app.ledger import Held, Outcome
from tests.ledger.model_state import Ended, Ending, Execution
from tests.ledger.pair import Lost, Pair
from tests.ledger.real import World

T = TypeVar("T")
Attempt = tuple[str, int]
Arguments = tuple[SearchStrategy[Any], ...]

MOST = 2
"""Evaluations at a time: with more, two steps would rarely meet."""
MANY = 8
"""Of what was sent long ago, the newest are sent again."""

RUNS = [(), (1,), (2,), (1, 1), (2, 1), (2, 2), (1, 1, 1), (2, 1, 1), (2, 2, 2)]
"""How many samples each run has that a plan fans out to."""
RESULTS = list(product(["scored", "errored", "not ended"], repeat=2))
"""Of an execution's samples in turn."""
OUTCOMES: list[Outcome] = ["succeeded", "succeeded", "failed", "failed", "interrupted", "cancelled"]
DRAFTS = [
    (results, Ending(outcome, crashed, failures, runs=runs, runs_later=later, end="failed" if later else "succeeded"))
    for outcome, later, crashed, failures, (results, runs) in product(
        OUTCOMES, [False, True], [False, True], [1, 2, 3], zip(RESULTS, RUNS, strict=True)
    )
]
"""Endings, whatever is to end: only a plan fans out, only a run has results, only a report ends the evaluation."""


@dataclass(frozen=True)
class Step:
    name: str
    lost: Lost
    arguments: tuple[Any, ...]

    def __repr__(self) -> str:
        lost = [f"lost={self.lost!r}"] if self.lost else []
        return f"{self.name}({', '.join([*map(repr, self.arguments), *lost])})"


@dataclass(frozen=True)
class Kind:
    """`weight`: how often such a step is made, among the others; `arguments`: as things are, or None: it cannot be made;
    `loses`: the reply to it can be lost."""

    name: str
    weight: int
    arguments: Callable[[Pair], Arguments | None]
    loses: bool = True

    def ways(self) -> list[tuple["Kind", Lost]]:
        losses: list[Lost] = ["answer", "answer", "answer", "connection"] if self.loses else []
        kept: list[Lost] = [None] * (40 - len(losses))
        return [(self, lost) for lost in (*kept, *losses) for _ in range(self.weight)]


def of(*those: Sequence[Any]) -> Arguments | None:
    """One of each; None if there is none to choose from."""
    if not all(those):
        return None
    return tuple(st.sampled_from(range(len(some))).map(some.__getitem__) for some in those)


def ids(pair: Pair, which: Callable[[Execution], bool]) -> list[str]:
    return [e.id for e in pair.model.executions(which)]


def unfinished(pair: Pair) -> list[str]:
    return ids(pair, lambda e: not e.terminal)


def holders(pair: Pair) -> list[Attempt]:
    return [(e.id, e.attempt) for e in pair.model.executions(lambda e: e.state == "running")]


def attempts(pair: Pair) -> list[Attempt]:
    """All there ever were."""
    return [(e.id, n) for e in pair.model.executions() for n in range(1, e.attempt + 1)]


def unwell(pair: Pair) -> list[str]:
    """Evaluations that are over, and not all is well."""
    over = [v for v in pair.model.evaluations.values() if v.state != "running"]
    return [v.name for v in over if {v.state, *(run.state for run in v.runs)} != {"succeeded"}]


def submit(pair: Pair) -> Arguments | None:
    keys = [None, "key", "other key"] if len(pair.model.evaluations) < MOST else []
    return of(keys, [0, 1])


def enqueued(pair: Pair) -> Arguments | None:
    """One of the Cloud Tasks that there ever were to make for what is pending, or all."""
    tasks = [t for t in dict.fromkeys(pair.tasks) if pair.model.find(t.execution_id).state == "pending"]
    return of([[task] for task in tasks] + [tasks] if tasks else [])


KINDS = [
    # what goes on
    Kind("push", 6, lambda pair: of(ids(pair, lambda e: e.state == "pending" or e.lease == "over"))),
    Kind("settle", 4, lambda pair: of(holders(pair), DRAFTS)),
    Kind("retry", 4, lambda pair: of(unwell(pair))),
    Kind("record", 3, lambda pair: of(holders(pair), RESULTS)),
    Kind("renew", 2, lambda pair: of(holders(pair), attempts(pair))),
    Kind("submit", 1, submit),
    Kind("nothing", 1, lambda pair: of(), loses=False),
    Kind("look", 2, lambda pair: of(list(pair.model.evaluations)), loses=False),
    Kind("cancel", 2, lambda pair: of(list(pair.model.evaluations))),
    # what is late, or comes again
    Kind("push", 2, lambda pair: of([*ids(pair, lambda _: True), "E1.4"])),
    Kind("claim", 2, lambda pair: of(pair.pushes[-MANY:])),
    Kind("settle", 2, lambda pair: of(attempts(pair), DRAFTS)),
    Kind("settle_again", 2, lambda pair: of(pair.settles[-MANY:])),
    Kind("record", 2, lambda pair: of(attempts(pair), RESULTS)),
    Kind("renew", 1, lambda pair: of(attempts(pair), attempts(pair))),
    Kind("retry", 1, lambda pair: of(list(pair.model.evaluations))),
    # what time does, the sweeper and the queue
    Kind("let_expire", 2, lambda pair: of(ids(pair, lambda e: e.lease == "held")), loses=False),
    Kind("make_due", 1, lambda pair: of(unfinished(pair)), loses=False),
    Kind("sweep", 2, lambda pair: of()),
    Kind("enqueued", 2, enqueued),
    Kind("enqueued", 1, lambda pair: of([pair.tasks[-MANY:]] if pair.tasks else [])),
    Kind("all_due", 1, lambda pair: of()),
    Kind("deliver_everything", 1, lambda pair: of(), loses=False),
]
WAYS = {kind: kind.ways() for kind in KINDS}


def steps(machine: "LedgerMachine") -> SearchStrategy[Step]:
    """What can be done now. One rule for all: Hypothesis would leave out half of the rules in each example, and here most
    lead to nothing without the others."""
    possible = {kind: found for kind in KINDS if (found := kind.arguments(machine.pair)) is not None}
    ways = [way for kind in possible for way in WAYS[kind]]
    return st.sampled_from(range(len(ways))).flatmap(lambda n: _step(*ways[n], possible[ways[n][0]]))


def _step(kind: Kind, lost: Lost, arguments: Arguments) -> SearchStrategy[Step]:
    return st.tuples(*arguments).map(partial(Step, kind.name, lost))


class LedgerMachine(RuleBasedStateMachine):
    world: ClassVar[World]

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair(self.world)

    @initialize(runs=st.sampled_from([*RUNS, None, None, None, None]))
    def begin(self, runs: tuple[int, ...] | None) -> None:
        """With a plan that has fanned out, or runs."""
        self.pair.submit("key", 0)
        self.pair.push("E1.plan")
        if runs is not None:
            self.pair.settle("E1.plan", 1, Ending("succeeded", runs=runs))

    @rule(step=st.runner().flatmap(steps))
    def step(self, step: Step) -> None:
        does = getattr(self, step.name, None) or getattr(self.pair, step.name)
        does(*step.arguments, **({"lost": step.lost} if step.lost else {}))

    def nothing(self) -> None:
        """The first choice where nothing goes on, so the simplest examples, which Hypothesis always makes, cost little."""

    def claim(self, push: tuple[str, int], lost: Lost = None) -> None:
        """A push's claim again: a lost reply if it holds the execution still, else a zombie."""
        self.pair.claim(*push, lost=lost)

    def renew(self, one: Attempt, other: Attempt, lost: Lost = None) -> None:
        """Every other time with progress."""
        mark = self.pair.mark()
        progress = {"tokens": mark} if mark % 2 else None
        self.pair.renew([Held(name, attempt, progress) for name, attempt in sorted({one, other})], lost)

    def record(self, by: Attempt, results: Sequence[str], lost: Lost = None) -> None:
        self.pair.record(*by, self._ended(by[0], results), lost)

    def settle(self, by: Attempt, draft: tuple[Sequence[str], Ending], lost: Lost = None) -> None:
        """As an attempt at this execution can end: only a plan that succeeds fans out."""
        results, ending = draft
        runs = ending.runs if by[0].endswith(".plan") and ending.outcome == "succeeded" else ()
        samples = self._ended(by[0], results)
        self.pair.settle(*by, replace(ending, runs=runs, samples=samples, mark=self.pair.mark()), lost)

    def settle_again(self, settle: tuple[str, int, Ending], lost: Lost = None) -> None:
        self.pair.settle(*settle, lost)

    def _ended(self, name: str, results: Sequence[str]) -> tuple[Ended, ...]:
        execution = self.pair.model.find(name)
        both = zip(execution.samples, results, strict=False)
        return tuple(self.pair.ended(sample, result == "errored") for sample, result in both if result != "not ended")
