"""What the forkserver's scout runs to find out which modules an evaluation imports late: all three kinds of work on a
task of one sample, and the usual model providers. Nothing here uses the network."""

import os
import tempfile
from contextlib import closing, suppress
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import Model, ModelOutput, ModelUsage, get_model
from inspect_ai.scorer import includes

from app.runner.messages import LOGS, Job, SampleRef, Transcript
from app.runner.plan import plan
from app.runner.report import report
from app.runner.run import run
from app.runner.writer import Writer
from app.spec import Spec

_PROVIDERS = ("openai/x", "openai-api/x/x", "anthropic/x", "google/x")
_SAMPLE = SampleRef(id=1, epoch=1)


@task
def tiny() -> Task:
    return Task(dataset=[Sample(input="?", target="!")], scorer=includes(), model=_model())


def exercise() -> None:
    for name in _PROVIDERS:
        with suppress(Exception):  # its package is not installed: then no child will need it either
            get_model(name, api_key="none", base_url="http://127.0.0.1:9", memoize=False)
    with tempfile.TemporaryDirectory() as directory, closing(Writer(os.open(os.devnull, os.O_WRONLY))) as out:
        spec = Spec(task=f"{__file__}@tiny", model="mockllm/model")
        job = Job(kind="plan", evaluation_id="", execution_id="", attempt=1, spec=spec, directory=f"{directory}/plan")
        plan(job, out)
        run(job.model_copy(update={"samples": (_SAMPLE,), "directory": f"{directory}/run"}), out)
        report(
            job.model_copy(
                update={
                    "plan_log": _log(directory, "plan"),
                    "transcripts": (Transcript(sample=_SAMPLE, log=_log(directory, "run")),),
                    "directory": f"{directory}/report",
                }
            ),
            out,
        )


def _model() -> Model:
    output = ModelOutput.from_content("mockllm/model", "!")
    output.usage = ModelUsage(input_tokens=1, output_tokens=1, total_tokens=2)  # else Inspect counts: with a download
    return get_model("mockllm/model", custom_outputs=[output])


def _log(directory: str, kind: str) -> str:
    return str(next(Path(directory, kind, LOGS).glob("*.eval")))
