"""What a checker finds."""

from dataclasses import dataclass
from typing import Literal

Rule = Literal[
    "lost",
    "doubled",
    "failed",
    "held twice",
    "acknowledged early",
    "stale",
    "artifact",
    "wrong",
    "counts",
    "spent",
    "left behind",
]


@dataclass(frozen=True)
class Violation:
    """`subject`: the evaluation, execution or sample."""

    rule: Rule
    subject: str
    detail: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.subject}: {self.detail}"
