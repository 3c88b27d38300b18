"""The ledger as DESIGN.md has it, in memory: no SQL, no clock, one caller at a time. It foretells every answer and row.

What the database counts is derived here (`remaining`, `attempt`), so that the two can disagree.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from itertools import takewhile

from app.ledger import Cancelled, Enqueue, EvaluationState, Held, Outcome, Renewal, Settled
from tests.ledger.model_state import Answer, Ended, Ending, Evaluation, Execution, Look, Rows, rows_of


class Model:
    def __init__(self) -> None:
        self.evaluations: dict[str, Evaluation] = {}
        self._by_key: dict[str, Evaluation] = {}

    def executions(self, which: Callable[[Execution], bool] = lambda _: True) -> list[Execution]:
        return [e for v in self.evaluations.values() for e in v.executions.values() if which(e)]

    def find(self, id: str) -> Execution:
        return self.evaluations[id.partition(".")[0]].executions[id]

    def submit(self, key: str | None, spec: int) -> tuple[str, bool, bool]:
        """The evaluation's name, whether it is new, and whether it has this spec."""
        found = self._by_key.get(key) if key else None
        if found:
            return found.name, False, found.spec == spec
        new = Evaluation(f"E{len(self.evaluations) + 1}", spec)
        new.add("plan", "plan", enqueues=1)
        self.evaluations[new.name] = self._by_key[key or new.name] = new
        return new.name, True, True

    def claim(self, id: str, claim_id: int, worker: str) -> Answer | None:
        execution, evaluation = self._find(id)
        if execution is None:
            return None
        holder = execution.attempts[-1] if execution.state == "running" else None
        verdict = self._verdict(execution, claim_id)
        if holder and verdict == "taken over":
            holder.outcome, holder.usage = "interrupted", execution.tokens
            execution.crashes += 1
        if verdict in ("claimed", "taken over"):
            execution.begin(worker, claim_id)
        refused = verdict in ("held", "over")
        return Answer(
            verdict=verdict,
            attempt=execution.attempt,
            crashes=execution.crashes,
            failures=execution.failures,
            cancel=evaluation.cancel,
            kind=execution.kind,
            samples=execution.samples,
            error=execution.error,
            holder=holder.worker if holder and refused else None,
            state=execution.state if refused else None,
        )

    def _verdict(self, execution: Execution, claim_id: int) -> str:
        if execution.terminal:
            return "over"
        if execution.state == "pending":
            return "claimed"
        if execution.attempts[-1].claim_id == claim_id:
            return "yours"
        return "taken over" if execution.lease == "over" else "held"

    def record(self, id: str, attempt: int, ended: Sequence[Ended]) -> bool:
        execution, evaluation = self._find(id)
        if execution is None or not execution.is_held_by(attempt):
            return False
        if evaluation.keep(execution, attempt, ended) or not ended:  # without samples it is a checkpoint
            execution.crashes = 0
        return True

    def renew(self, held: Iterable[Held]) -> list[Renewal]:
        return sorted((self._renew(one) for one in held), key=astuple)

    def _renew(self, held: Held) -> Renewal:
        execution, evaluation = self._find(held.execution_id)
        if execution is None or not execution.is_held_by(held.attempt):
            return Renewal(held.execution_id, held.attempt, lost=True, cancel=False)
        execution.lease, execution.sweep = "held", "leased"
        if held.progress:
            execution.tokens = held.progress["tokens"]
        return Renewal(held.execution_id, held.attempt, lost=False, cancel=evaluation.cancel)

    def settle(self, id: str, attempt: int, ending: Ending) -> Settled | None:
        execution, evaluation = self._find(id)
        if execution is None:
            return None
        if not execution.is_held_by(attempt):
            return Settled("already" if execution.attempt == attempt else "stale", execution.state)
        mine = execution.attempts[-1]
        mine.outcome, mine.usage = ending.outcome, ending.mark
        execution.error = ending.error
        execution.failures += ending.outcome == "failed"
        news = evaluation.keep(execution, attempt, ending.samples)
        execution.crashes = (0 if news else execution.crashes) + ending.crashed
        state: Outcome = ending.outcome
        if state == "interrupted" or (state == "failed" and execution.failures < ending.max_failures):
            execution.end("pending", "released")
            return Settled("recorded", "pending")
        execution.end(state, None)
        runs, report = self._go_on(evaluation, execution, ending)
        return Settled("recorded", state, runs, report)

    def _go_on(self, evaluation: Evaluation, ended: Execution, ending: Ending) -> tuple[int, Enqueue | None]:
        """What comes after an execution's end: the number of runs, and the report's Cloud Task."""
        if ended.kind == "report":
            evaluation.state = "cancelled" if evaluation.cancel else ending.end
            evaluation.results = ending.mark
            return 0, None
        runs = () if evaluation.cancel else ending.runs
        for n, size in enumerate(runs, 1):
            samples = tuple(f"{n}.{k}" for k in range(size))
            evaluation.add(str(n), "run", samples=samples, sweep="fan-out" if ending.runs_later else "due")
        return len(runs), evaluation.report_if_last()

    def cancel(self, name: str) -> Cancelled:
        evaluation = self.evaluations[name]
        if evaluation.state != "running":
            return Cancelled(evaluation.state, 0, None)
        evaluation.cancel = True
        pending = [e for e in evaluation.executions.values() if e.state == "pending" and e.kind != "report"]
        for execution in pending:
            execution.end("cancelled", None)
        return Cancelled("running", len(pending), evaluation.report_if_last() if pending else None)

    def retry(self, name: str) -> tuple[EvaluationState, int]:
        evaluation = self.evaluations[name]
        found = evaluation.state
        again = self._to_do_again(evaluation) if found != "running" else []
        for execution in again:
            execution.arm("due")
            evaluation.state, evaluation.cancel = "running", False
        return found, len(again)

    def _to_do_again(self, evaluation: Evaluation) -> list[Execution]:
        if not evaluation.runs:
            return [evaluation.executions[f"{evaluation.name}.plan"]]
        unwell = [e for e in evaluation.runs if e.state != "succeeded"]
        if unwell or evaluation.state == "succeeded":
            return unwell
        return [evaluation.executions[f"{evaluation.name}.report"]]

    def take_due(self) -> set[Enqueue]:
        due = self.executions(lambda e: e.sweep == "due")
        for execution in due:
            execution.enqueues += 1
            execution.sweep = "uncertain"
        return {Enqueue(e.id, e.enqueues) for e in due}

    def enqueued(self, tasks: Iterable[Enqueue]) -> None:
        for task in tasks:
            execution, _ = self._find(task.execution_id)
            if execution and execution.state == "pending" and execution.enqueues == task.number:
                execution.sweep = "enqueued"

    def all_due(self) -> None:
        for execution in self.executions(lambda e: not e.terminal):
            execution.sweep = "due"

    def make_due(self, id: str) -> None:
        self.find(id).sweep = "due"

    def let_expire(self, id: str) -> None:
        self.find(id).lease = "over"

    def scored(self, id: str) -> set[str]:
        """Those of the execution's samples that need not run again."""
        execution, evaluation = self._find(id)
        kept = evaluation.samples
        return {s for s in execution.samples if s in kept and not kept[s][2].errored} if execution else set()

    def interrupted(self, id: str) -> list[int]:
        """The attempts before this one that did not end by themselves, back to the last that did."""
        before = list(enumerate(self.find(id).attempts, 1))[-2::-1]
        return [n for n, _ in takewhile(lambda attempt: attempt[1].outcome == "interrupted", before)]

    def look(self, name: str) -> Look:
        evaluation = self.evaluations[name]
        plan = evaluation.executions[f"{name}.plan"]
        planned = [sample for run in evaluation.runs for sample in run.samples]
        return Look(
            unfinished=[e.id for e in evaluation.in_order() if not e.terminal],
            plan=(plan.state, plan.attempt, plan.error),
            to_report=[(s, evaluation.samples[s][2].log) for s in planned if s in evaluation.samples],
            missing=sum(s not in evaluation.samples for s in planned),
        )

    def _find(self, id: str) -> tuple[Execution | None, Evaluation]:
        evaluation = self.evaluations[id.partition(".")[0]]
        return evaluation.executions.get(id), evaluation

    def rows(self) -> Rows:
        return dict(row for evaluation in self.evaluations.values() for row in rows_of(evaluation))
