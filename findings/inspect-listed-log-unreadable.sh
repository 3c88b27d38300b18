#!/usr/bin/env bash
# inspect-ai 0.3.285: a log that eval() has just written, and that list_eval_logs() lists, cannot be read by what the list
# says of it, if its task's name or a folder above it has `#`, `?` or `%` followed by two hex digits.
#
# A log's file is named after its task, with these characters kept. list_eval_logs() names files as file:// URLs without
# quoting them, and read_eval_log() takes such a URL apart: `#` and `?` end the path, `%25` becomes `%`.
# The path that eval() itself gives (log.location, no URL) is read without trouble.
# Seen: FileNotFoundError for "C# riddles", "why?" and "50%25 off"; IsADirectoryError for a log in the folder "logs#1".
#
# Exits 0 while this is so, 1 once it has changed. Needs Python 3.11 to 3.13 and pip; some 60 s.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check inspect-ai==0.3.285
cd "$folder"
cat >listed.py <<'PYTHON'
import os
import sys

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.log import list_eval_logs, read_eval_log
from inspect_ai.solver import solver


@solver
def nothing():
    async def solve(state, generate):
        return state

    return solve


CASES = [
    ("plain", "logs", "read"),
    ("C# riddles", "sharp", "FileNotFoundError"),
    ("why?", "asking", "FileNotFoundError"),
    ("50%25 off", "percent", "FileNotFoundError"),
    ("plain", "logs#1", "IsADirectoryError"),
]
os.mkdir("logs")  # so that what is left of the path of `logs#1` is there
as_seen = True
for name, log_dir, expected in CASES:
    task = Task(dataset=[Sample(input="?")], solver=nothing(), name=name)
    log = eval(task, model="mockllm/model", log_dir=log_dir, display="none")[0]
    assert read_eval_log(log.location).status == "success"
    (listed,) = list_eval_logs(log_dir)
    try:
        read_eval_log(listed)
        came_to = "read"
    except OSError as error:
        came_to = type(error).__name__
    print(f"task {name!r} in {log_dir!r}: {came_to}")
    as_seen = as_seen and came_to == expected
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" listed.py
