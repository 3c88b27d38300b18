"""The ledger beside its model: each step is made to both, and they must answer the same and come to the same rows."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

from sqlalchemy.ext.asyncio import AsyncEngine

from app.ledger import Enqueue, Held, Outcome, Settled
from tests.ledger.factories import lost_reply
from tests.ledger.model import Model
from tests.ledger.model_state import Answer, Ended, Ending, Rows
from tests.ledger.real import Real, World, lost_commit
from tests.ledger.snapshot import broken_rules, differences

T = TypeVar("T")
Losing = Callable[[AsyncEngine], AbstractContextManager[Sequence[object]]]
Lost = Literal["answer", "connection"] | None
"""What became of a step's first answer. `answer`: nobody took it in, so that the same was asked again; `connection`: it was
carried out, but the connection dropped before the reply, and `Database` sent it again."""

ROUNDS = 4
"""In which a queue that delivers everything brings all to its end: plans, runs, reports, and one to see that it did."""


class Differs(AssertionError):
    """The ledger is not what its model says."""


class Pair:
    def __init__(self, world: World) -> None:
        self.model = Model()
        self.real = Real(world)
        self.world = world
        self.pushes: list[tuple[str, int]] = []
        self.settles: list[tuple[str, int, Ending]] = []
        self.tasks: list[Enqueue] = []
        self._rows: Rows = {}
        self._versions: set[str] = set()
        self._marks = 0

    def mark(self) -> int:
        """A number that nothing else has."""
        self._marks += 1
        return self._marks

    def submit(self, key: str | None, spec: int, lost: Lost = None) -> None:
        _, created, same = self._both(lambda ledger: ledger.submit(key, spec), lost=lost, known=True)
        self._came_to("submit", "created" if created else "found" if same else "another spec")

    def push(self, name: str, lost: Lost = None) -> Answer | None:
        """A new push's claim."""
        self.pushes.append((name, self.mark()))
        return self.claim(*self.pushes[-1], lost)

    def claim(self, name: str, claim_id: int, lost: Lost = None) -> Answer | None:
        """By one of two workers: the same one each time."""
        worker = f"worker-{claim_id % 2 + 1}"

        def idle(answer: Answer | None) -> bool:
            return answer is None or answer.verdict not in ("claimed", "taken over")

        answer = self._both(lambda ledger: ledger.claim(name, claim_id, worker), idle, lost=lost)
        self._came_to("claim", answer.verdict if answer else "no such execution")
        if answer and answer.state is None:
            self._same(lambda ledger: ledger.scored(name))
            self._same(lambda ledger: ledger.interrupted(name))
        return answer

    def record(self, name: str, attempt: int, ended: Sequence[Ended], lost: Lost = None) -> None:
        held = self._both(lambda ledger: ledger.record(name, attempt, ended), lambda held: not held, lost=lost)
        self._came_to("record", "held" if held else "stale")

    def renew(self, held: Sequence[Held], lost: Lost = None) -> None:
        renewals = self._both(
            lambda ledger: ledger.renew(held), lambda renewals: all(r.lost for r in renewals), lost=lost
        )
        for renewal in renewals:
            self._came_to("renew", "lost" if renewal.lost else "to be cancelled" if renewal.cancel else "held")

    def settle(self, name: str, attempt: int, ending: Ending, lost: Lost = None) -> None:
        def idle(settled: Settled | None) -> bool:
            return settled is None or settled.verdict != "recorded"

        self.settles.append((name, attempt, ending))
        settled = self._both(lambda ledger: ledger.settle(name, attempt, ending), idle, lost=lost)
        if settled:
            self._came_to("settle", settled.verdict)
            self._came_to("settle", f"{settled.verdict}, {ending.outcome}, {settled.state}")
            self._to_enqueue(settled.report)

    def cancel(self, name: str, lost: Lost = None) -> None:
        cancelled = self._both(
            lambda ledger: ledger.cancel(name), lambda cancelled: cancelled.state != "running", lost=lost
        )
        self._came_to("cancel", cancelled.state)
        self._to_enqueue(cancelled.report)

    def retry(self, name: str, lost: Lost = None) -> None:
        found, armed = self._both(
            lambda ledger: ledger.retry(name), lambda found: not found[1], lost=lost, losing=lost_commit, known=True
        )
        self._came_to("retry", "armed" if armed else f"nothing, {found}")

    def sweep(self, lost: Lost = None) -> set[Enqueue]:
        due = self._both(lambda ledger: ledger.take_due(), lambda due: not due, lost=lost)
        self._came_to("sweep", "some" if due else "none")
        self.tasks += sorted(due, key=lambda task: task.execution_id)
        return due

    def enqueued(self, tasks: Iterable[Enqueue], lost: Lost = None) -> None:
        self._both(lambda ledger: ledger.enqueued(tasks), lost=lost)
        self._came_to("enqueued", "noted")

    def all_due(self, lost: Lost = None) -> None:
        self._both(lambda ledger: ledger.all_due(), lost=lost)
        self._came_to("all due", "noted")

    def make_due(self, name: str) -> None:
        self._both(lambda ledger: ledger.make_due(name))

    def let_expire(self, name: str) -> None:
        self._both(lambda ledger: ledger.let_expire(name))

    def look(self, name: str) -> None:
        self._same(lambda ledger: ledger.look(name))
        self._came_to("look", "same")

    def deliver_everything(self) -> None:
        """The queue was lost, all workers too; then all goes well, and everything must come to its end."""
        for execution in self.model.executions(lambda e: e.state == "running"):
            self.let_expire(execution.id)
        for _ in range(ROUNDS):
            self.all_due()
            due = self.sweep()
            if not due:
                break
            for task in sorted(due, key=lambda task: task.execution_id):
                self._finish(task.execution_id)
        if left := [v.name for v in self.model.evaluations.values() if v.state == "running"]:
            raise Differs(f"{left} never came to an end")
        self._came_to("everything", "delivered")

    def _finish(self, name: str) -> None:
        answer = self.push(name)
        if answer is None or answer.state:
            raise Differs(f"What was due was not granted: {answer}")
        samples = tuple(self.ended(sample, errored=False) for sample in answer.samples)
        outcome: Outcome = "cancelled" if answer.cancel and answer.kind != "report" else "succeeded"
        self.settle(name, answer.attempt, Ending(outcome, samples=samples, mark=self.mark()))

    def ended(self, sample: str, errored: bool) -> Ended:
        """Its log is named like no other's."""
        return Ended(sample, errored, f"log {self.mark()}")

    def _both(
        self,
        act: Callable[[Model | Real], T],
        idle: Callable[[T], bool] = lambda _: False,
        *,
        lost: Lost = None,
        losing: Losing = lost_reply,
        known: bool = False,
    ) -> T:
        """What both answer. `idle`: whether, by the model's answer, nothing at all may be written. `known`: what `Database`
        sends again is known to be the same request."""
        answer = act(self.model)
        nothing = idle(answer)
        if lost == "answer" or (lost and not known):
            answer = act(self.model)
        if lost == "answer":
            act(self.real)
        with losing(self.world.engine) if lost == "connection" else nullcontext([lost]) as dropped:
            found = act(self.real)
        if lost:
            assert dropped, "there was no reply to lose"
            self._came_to("lost", lost)
        _agree(answer, found)
        self._compare(written=not nothing)
        return answer

    def _same(self, ask: Callable[[Model | Real], object]) -> None:
        """A question that writes nothing."""
        _agree(ask(self.model), ask(self.real))

    def _compare(self, written: bool) -> None:
        """All rows with the model's, and with what must hold of them whatever the model says."""
        rows, versions = self.real.rows()
        wrong = [*broken_rules(self._rows, rows), *differences(self.model.rows(), rows)]
        if not written and versions != self._versions:
            wrong.append("Nothing should have been written, not even the same again.")
        if wrong:
            raise Differs("\n".join(wrong))
        self._rows, self._versions = rows, versions

    def _to_enqueue(self, task: Enqueue | None) -> None:
        if task:
            self.tasks.append(task)

    def _came_to(self, step: str, what: str) -> None:
        self.world.did[f"{step}: {what}"] += 1


def _agree(answer: object, found: object) -> None:
    if found != answer:
        raise Differs(f"The answer was\n  {found}\nand should have been\n  {answer}")
