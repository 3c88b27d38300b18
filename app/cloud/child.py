"""Which restic an evaluation would find on this machine, asked in a child: only there is Inspect loaded, and none of our
settings are.

    python -m app.cloud.child    prints its path, or nothing
"""

import subprocess
import sys

from app.settings import children_environment

PATIENCE = 50
"""Seconds for the child. Ours: loading Inspect takes some."""


def find_restic() -> str | None:
    """None: there is none that Inspect's checkpoints can use. Raises `RuntimeError` when no child can start at all."""
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "app.cloud.child"],
            env=children_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"a child cannot start: {error}") from error
    if ended.returncode != 0:
        said = (ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1]
        raise RuntimeError(f"a child cannot start: {said}")
    return ended.stdout.strip() or None


def main() -> None:
    """In the child itself."""
    from app.runner import checkpoint

    print(checkpoint.find_restic() or "")


if __name__ == "__main__":
    main()
