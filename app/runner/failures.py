"""What went wrong in a child, in words a user can act on."""

import io
import re
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from inspect_ai.log import EvalError
from rich.console import Console

from app.runner.messages import ErrorClass, Failure

_MESSAGE_LENGTH = 1_000
_TRACEBACK_LENGTH = 10_000

_PROVIDERS = (
    "openai.",
    "anthropic.",
    "google.",
    "mistralai.",
    "groq.",
    "botocore.",
    "httpx.",
    "httpcore.",
    "tenacity.",
)
"""Where the exceptions of model providers' clients come from."""

_HOPELESS = re.compile(r"\.(AuthenticationError|PermissionDeniedError|NotFoundError)$")


_GAVE_UP = "tenacity.RetryError"

_OF_NOTHING = ("IndexError", "TypeError", "AttributeError", "KeyError")
"""What using the first of no choices raises."""

_READERS = re.compile(r"/inspect_ai/model/(_providers/|_openai|_model_output\.py)")
"""Inspect's code that turns a provider's answer into its own form, and gives the answer's first choice."""

_INSTALLED = "/site-packages/"
_LIBRARIES = re.compile(
    r"/site-packages/(inspect_ai|anyio|tenacity|openai|anthropic|google|httpx2?|httpcore2?|mistralai|groq|botocore|aiohttp"
    r"|pydantic|pydantic_core|rich|fsspec|numpy|pandas|datasets)/"
)
_STANDARD = sysconfig.get_path("stdlib") + "/"
_OURS = str(Path(__file__).parents[1]) + "/"
_EXAMPLES = _OURS + "examples/"


class _Frame(NamedTuple):
    """One line of a traceback."""

    file: str
    line: str
    function: str


class Refused(Exception):
    """This work cannot be done, for a reason that the user should read."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


def refusal(message: str, error_class: ErrorClass = "evaluation") -> Refused:
    return Refused(Failure(error_class=error_class, message=_cut(message), final=True))


@contextmanager
def refused(what: str, error_class: ErrorClass = "evaluation") -> Iterator[None]:
    """Turns any error inside into a refusal that starts with `what`: for steps that fail the same way each time."""
    try:
        yield
    except Refused:
        raise
    except (Exception, SystemExit) as error:
        raise Refused(failure(error, what, error_class, final=True)) from error


def failure(error: BaseException, what: str, error_class: ErrorClass, *, final: bool = False) -> Failure:
    lines = "".join(traceback.format_exception(error))[-_TRACEBACK_LENGTH:]
    return Failure(error_class=error_class, message=_cut(f"{what}: {_text(error)}"), final=final, traceback=lines)


def recorded_failure(error: EvalError, *, answered_nothing: bool = False) -> Failure:
    """Whose fault an error in a log is. Inspect keeps the traceback as text only, so that is what there is to go by.
    `answered_nothing`: the model's last answer had no choices."""
    name = _exception_name(error.traceback)
    frames = _frames(error.traceback)
    if name.startswith(_PROVIDERS):
        error_class: ErrorClass = "model"
    elif name.endswith("LimitExceededError"):
        error_class = "limit"
    elif name in ("MemoryError", "OSError") or name.endswith("SandboxUnavailableError"):
        error_class = "infrastructure"
    elif _reading_an_answer(frames) or (answered_nothing and name in _OF_NOTHING):
        error_class = "model"
    else:
        error_class = "evaluation"
    message = _last_answer(error.traceback) if name == _GAVE_UP else _one_line(error.message) or name
    if error_class == "model" and answered_nothing:
        message = f"The model answered without a choice: {message}"
    return Failure(
        error_class=error_class,
        message=_cut(message) + _place(frames),
        final=bool(_HOPELESS.search(name)),
        traceback=error.traceback[-_TRACEBACK_LENGTH:],
    )


def _frames(formatted: str) -> list[_Frame]:
    """Of the last exception, the innermost last."""
    last = re.split(r"\n\n(?:During handling of|The above exception was)[^\n]*\n", formatted)[-1]
    return [_Frame(*found) for found in re.findall(r'^[ |]*File "([^"]+)", line (\d+), in (.+)$', last, re.MULTILINE)]


def _reading_an_answer(frames: Sequence[_Frame]) -> bool:
    """What a model's server says is read by Inspect's code for that provider: an error there is of the answer, unless the
    task's own code was called from it."""
    reading = [place for place, frame in enumerate(frames) if _READERS.search(frame.file)]
    return bool(reading) and not any(_is_of_task(frame, packages=False) for frame in frames[reading[-1] :])


def _place(frames: Sequence[_Frame]) -> str:
    """Where in the task's code it happened."""
    own = [frame for frame in frames if _is_of_task(frame)]
    return f" (at {own[-1].file}:{own[-1].line}, in {own[-1].function})" if own else ""


def _is_of_task(frame: _Frame, *, packages: bool = True) -> bool:
    """`packages`: those that are installed too, for a task may be of one; but not what is known to be a library."""
    if frame.file.startswith(_EXAMPLES):
        return True
    if frame.file.startswith(("<", _OURS)):
        return False
    if _INSTALLED in frame.file:
        return packages and not _LIBRARIES.search(frame.file)
    return not frame.file.startswith(_STANDARD)


def _last_answer(formatted: str) -> str:
    """Why each of the calls failed that a retry was given up after: the line before that of giving up."""
    *_, cause, _ = ["", *_exception_lines(formatted)]
    return f"The model's provider was asked again as often as is allowed. The last time: {_one_line(cause)}"


def is_cancellation(error: EvalError) -> bool:
    """Inspect records a cancelled sample's error as the repr of the exception."""
    return error.message.startswith(("CancelledError(", "Cancelled("))


def _exception_name(formatted: str) -> str:
    """The qualified name in the last line of a traceback that starts with one."""
    found = _exception_lines(formatted)
    return found[-1].partition(":")[0].strip() if found else ""


def _exception_lines(formatted: str) -> list[str]:
    return [line for line in formatted.splitlines() if re.match(r"^[\w.]+(Error|Exception|\w*)(:|$)", line)]


def _text(error: BaseException) -> str:
    message = getattr(error, "message", None)
    if message is not None and type(error).__module__.startswith("inspect_ai."):
        # Inspect's own errors are written for a terminal: rich markup, or a rich renderable
        console = Console(file=io.StringIO(), width=10_000, no_color=True, force_terminal=False, highlight=False)
        with console.capture() as capture:
            console.print(message)
        return re.sub(r"^ERROR: ", "", _one_line(capture.get()), flags=re.IGNORECASE)
    text = _one_line(str(error))
    if isinstance(error, SystemExit):
        return f"it called exit({text})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cut(text: str) -> str:
    return text if len(text) <= _MESSAGE_LENGTH else text[: _MESSAGE_LENGTH - 1] + "…"
