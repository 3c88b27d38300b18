"""What went wrong in a child, in words a user can act on."""

import io
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

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


def recorded_failure(error: EvalError) -> Failure:
    """Whose fault an error in a log is. Inspect keeps the traceback as text only, so that is what there is to go by."""
    name = _exception_name(error.traceback)
    if name.startswith(_PROVIDERS):
        error_class: ErrorClass = "model"
    elif name.endswith("LimitExceededError"):
        error_class = "limit"
    elif name in ("MemoryError", "OSError") or name.endswith("SandboxUnavailableError"):
        error_class = "infrastructure"
    else:
        error_class = "evaluation"
    return Failure(
        error_class=error_class,
        message=_cut(_one_line(error.message) or name),
        final=bool(_HOPELESS.search(name)),
        traceback=error.traceback[-_TRACEBACK_LENGTH:],
    )


def is_cancellation(error: EvalError) -> bool:
    """Inspect records a cancelled sample's error as the repr of the exception."""
    return error.message.startswith(("CancelledError(", "Cancelled("))


def _exception_name(formatted: str) -> str:
    """The qualified name in the last line of a traceback that starts with one."""
    found = [line for line in formatted.splitlines() if re.match(r"^[\w.]+(Error|Exception|\w*)(:|$)", line)]
    return found[-1].partition(":")[0].strip() if found else ""


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
