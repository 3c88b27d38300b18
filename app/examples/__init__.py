"""Inspect tasks to try: a real one, and a model that needs no key to run it with."""

from collections.abc import Callable

from inspect_ai import Task

from app.examples.programming import programming
from app.examples.scripted import ScriptedAPI
from app.runner.sandbox import ProctorSandbox

__all__ = ["TASKS", "ProctorSandbox", "ScriptedAPI", "programming"]

TASKS: dict[str, Callable[..., Task]] = {"programming": programming}
"""What `proctor/NAME` stands for in a spec."""
