"""The programming problems: one Markdown file each, below `problems/`."""

import ast
import re
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Problem:
    """`tests` is the text of a pytest module that imports `solution`."""

    name: str
    category: str
    difficulty: str
    prompt: str
    rubric: str
    tests: str

    @property
    def test_names(self) -> frozenset[str]:
        functions = (node for node in ast.parse(self.tests).body if isinstance(node, ast.FunctionDef))
        return frozenset(function.name for function in functions if function.name.startswith("test_"))


def load_problems() -> dict[str, Problem]:
    """All problems by name, in the order of their names."""
    return {name: _parse(name, text) for name, text in markdown_files("problems").items()}


def markdown_files(folder: str) -> dict[str, str]:
    """The texts of this package's `folder`/*.md by name."""
    files = (file for file in resources.files(__package__).joinpath(folder).iterdir() if file.name.endswith(".md"))
    return {file.name.removesuffix(".md"): file.read_text("utf-8") for file in sorted(files, key=lambda f: f.name)}


def sections(markdown: str) -> dict[str, str]:
    """The text below each `## ` heading. Code in the files has no line that starts like that."""
    _, *parts = re.split(r"^## (.+)$", markdown, flags=re.MULTILINE)
    return {title: text.strip() for title, text in zip(parts[::2], parts[1::2], strict=True)}


def _parse(name: str, text: str) -> Problem:
    _, head, body = text.split("---\n", 2)
    about = dict(line.split(": ", 1) for line in head.splitlines())
    part = sections(body)
    tests = part["Hidden tests"].removeprefix("```python\n").removesuffix("```")
    return Problem(name, about["category"], about["difficulty"], part["Task"], part["Rubric"], tests)
