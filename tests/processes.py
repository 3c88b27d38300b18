"""What a running process can be told apart by, though it may end at any moment."""

from contextlib import suppress

import psutil


def command_line(process: psutil.Process) -> str:
    """Empty for one that has ended meanwhile: a worker also starts some that last a tenth of a second."""
    with suppress(psutil.NoSuchProcess):  # a zombie's error is one of these
        return " ".join(process.cmdline())
    return ""


def is_forkserver(process: psutil.Process) -> bool:
    return "app.runner.forkserver" in command_line(process)
