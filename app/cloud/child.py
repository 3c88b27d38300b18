"""What an evaluation would find on this machine, asked in a child: only there is Inspect loaded, and none of our settings.

python -m app.cloud.child    prints the answers as JSON
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass

from app.settings import children_environment

PATIENCE = 50
"""Seconds for the child. Ours: loading Inspect takes some, and the sandbox's probe has 30."""


@dataclass(frozen=True)
class Machine:
    """`sandbox`: why it does not work; None if it does. `restic`: where it is."""

    sandbox: str | None
    restic: str | None


def look_in_a_child() -> Machine:
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "app.cloud.child"],
            env=children_environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        return Machine(**json.loads(ended.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return Machine(f"a child did not answer in {PATIENCE} s", None)
    except (IndexError, ValueError, TypeError):
        said = (ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1]
        return Machine(f"a child cannot start: {said}", None)


def look() -> Machine:
    """In the child itself."""
    import anyio

    from app.runner.checkpoint import find_restic
    from app.runner.sandbox import probe

    restic = find_restic()
    return Machine(sandbox=anyio.run(probe), restic=str(restic) if restic else None)


if __name__ == "__main__":
    print(json.dumps(asdict(look())))
