#!/usr/bin/env bash
# inspect-ai 0.3.285: recompute_metrics() gives other numbers than the evaluation whose log it is given, without a word,
# where a reducer has a function as argument; where a metric has one, it raises.
#
# A log's header keeps metrics and reducers by name, and their arguments as JSON. A function becomes its name there, and
# recompute_metrics() makes the objects anew from that header.
# Seen: mean 3.0 in the log, 6.0 after recompute_metrics(); accuracy(to_float=f): TypeError: 'str' object is not callable.
#
# Exits 0 while this is so, 1 once it has changed. Needs Python 3.11 to 3.13 and pip; some 60 s.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check inspect-ai==0.3.285
cd "$folder"
cat >recompute.py <<'PYTHON'
import sys

from inspect_ai import Epochs, Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.log import read_eval_log, recompute_metrics
from inspect_ai.scorer import Score, accuracy, mean, mean_score, scorer, value_to_float
from inspect_ai.solver import solver


@solver
def nothing():
    async def solve(state, generate):
        return state

    return solve


@scorer(metrics=[mean()])
def fours():
    async def score(state, target):
        return Score(value=state.epoch * 4)

    return score


@scorer(metrics=[accuracy(to_float=value_to_float(correct="GOOD", incorrect="BAD"))])
def words():
    async def score(state, target):
        return Score(value="GOOD")

    return score


def evaluated(scored_by, epochs=None):
    task = Task(dataset=[Sample(id=1, input="?")], solver=nothing(), scorer=scored_by, epochs=epochs)
    log = eval(task, model="mockllm/model", log_dir="logs", display="none")[0]
    assert log.status == "success", log.error
    return log


def value(log, metric):
    return log.results.scores[0].metrics[metric].value


halves = evaluated(fours(), Epochs(2, [mean_score(value_to_float=lambda score: float(score) / 2)]))
again = read_eval_log(halves.location)
recompute_metrics(again)
print(f"mean: evaluated {value(halves, 'mean')}, recomputed {value(again, 'mean')}")

judged = evaluated(words())
try:
    recompute_metrics(read_eval_log(judged.location))
    raised = "nothing"
except Exception as error:
    raised = f"{type(error).__name__}: {error}"
print(f"accuracy: evaluated {value(judged, 'accuracy')}, recompute_metrics raises {raised}")

as_seen = (value(halves, "mean"), value(again, "mean")) == (3.0, 6.0) and raised == "TypeError: 'str' object is not callable"
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" recompute.py
