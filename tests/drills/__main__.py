"""`python -m tests.drills DRILL [--help]`

chaos      faults of every kind, drawn from a seed, on two workers and all that is around them; then the history is checked
stranded   kills the worker before and after every message that it sends; every evaluation must end
kills      kills the whole local system at random moments and starts it again
"""

import importlib
import sys

DRILLS = {"chaos": "tests.drills.chaos.__main__", "stranded": "tests.drills.stranded", "kills": "tests.drills.kills"}


def main() -> int:
    """The drill's own exit code: 1 if a goal was not met. 2: there is no such drill."""
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in DRILLS:
        print(__doc__, file=sys.stderr if name not in ("-h", "--help") else sys.stdout)
        return 2
    code: int = importlib.import_module(DRILLS[name]).main()
    return code


if __name__ == "__main__":
    sys.exit(main())
