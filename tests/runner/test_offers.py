"""A package with tasks may be installed while the service runs; and who misnames a task is told which there are."""

import json
import os
from pathlib import Path

import pytest

from app.runner.messages import Message, Planned
from app.runner.supervisor import Crashed, Supervisor
from tests.runner.conftest import MakeJob, done, only

pytestmark = pytest.mark.xdist_group("runner")

CODE = """from inspect_ai import Task, task
from inspect_ai.dataset import Sample

@task
def sums() -> Task:
    return Task(dataset=[Sample("1 + 1", id="a")])

@task
def products() -> Task:
    return Task(dataset=[Sample("1 * 1", id="b")])
"""


def install(folder: Path, name: str, code: Path) -> None:
    """As an installer does: the metadata in `folder`, the package in `code`."""
    package = code / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(CODE)
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[inspect_ai]\n{name} = {name}\n")
    (metadata / "RECORD").write_text(f"{name}/__init__.py,,\n")


@pytest.mark.parametrize("editable", [False, True])
async def test_a_package_that_is_installed_while_the_service_runs_is_found(
    tmp_path: Path, make_job: MakeJob, editable: bool
) -> None:
    """Editable: its code lies elsewhere, which a file says that Python only reads as it starts."""
    folder, code = tmp_path / "site-packages", tmp_path / "code"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import site\nreal = site.getsitepackages\nsite.getsitepackages = lambda: [*real(), {str(folder)!r}]\n"
    )
    async with Supervisor({**os.environ, "PYTHONPATH": str(folder)}) as supervisor:
        await supervisor.warm()

        async def planned(task: str) -> list[Message | Crashed]:
            async with supervisor.run(make_job("plan", task)) as child:
                return [message async for message in child]

        before = done(await planned("reckoning/sums")).failure
        assert before is not None
        assert "No installed package offers tasks as `reckoning/…`" in before.message
        install(folder, "reckoning", code if editable else folder)
        if editable:
            (folder / "reckoning.pth").write_text(f"{code}\n")
            says = {"url": code.as_uri(), "dir_info": {"editable": True}}
            (folder / "reckoning-1.0.dist-info" / "direct_url.json").write_text(json.dumps(says))
        after = await planned("reckoning/sums")
        assert [sample.id for sample in only(Planned, after).samples] == ["a"]
        missing = done(await planned("reckoning/sum")).failure
        assert missing is not None
        assert missing.message == (
            "There is no task 'reckoning/sum'. Did you mean 'sums'? The package 'reckoning' offers: products, sums."
        )
