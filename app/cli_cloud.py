"""The commands of `proctor` for a deployment on Google Cloud: setup, deploy, release, doctor.

What a command needs is imported when it runs.
"""

import json
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.errors import SettingsError

if TYPE_CHECKING:
    from app.cloud.doctor import Finding
    from app.cloud.place import Place
    from app.cloud.release import Release

cloud = typer.Typer()
release = typer.Typer(help="Release a version, as cloudbuild.yaml does.", no_args_is_help=True)
cloud.add_typer(release, name="release")

Image = Annotated[str, typer.Argument(metavar="IMAGE", help="The image, with a tag or a digest.", show_default=False)]
ENV_FILE = Path("deploy.env")
SERVICE_FILE = Path("service.yaml")


STANDS_FOR_NUMBER = "00000000000000000000"
"""In commands that are printed: no project has this number."""


@cloud.command()
def setup(
    project: Annotated[str, typer.Option(metavar="PROJECT", help="The project's id.", show_default=False)],
    region: Annotated[str, typer.Option(metavar="REGION", help="Of everything.", show_default=False)],
    cluster: Annotated[str, typer.Option(metavar="NAME", help="The AlloyDB cluster.", show_default=False)],
    instance: Annotated[str, typer.Option(metavar="NAME", help="Its primary instance.", show_default=False)],
    callers: Annotated[
        str, typer.Option(metavar="WHO", help="Who may use the API: e-mails, @domains, comma-separated.")
    ],
    network: Annotated[str, typer.Option(metavar="NAME", help="The VPC network that AlloyDB is in.")] = "default",
    subnet: Annotated[str, typer.Option(metavar="NAME", help="The service's subnet in it, /26 or larger.")] = "default",
    bucket: Annotated[
        str | None, typer.Option(metavar="NAME", help="For logs and checkpoints. Default: PROJECT-proctor.")
    ] = None,
    queues: Annotated[
        list[str] | None,
        typer.Option(
            "--queue", metavar="NAME", help="A further queue, which specs may name: one per model provider, say."
        ),
    ] = None,
    project_number: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="The project's number. Default: gcloud is asked.")
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Run the commands instead of printing them.")] = False,
) -> None:
    """Print, or with --apply run, what makes everything around the service. Twice does no harm.

    It writes deploy.env, which `proctor deploy` and `proctor release` read; with --apply only.
    """
    from app.cloud import budget, gcloud, place, service
    from app.cloud.plan import PLACEHOLDER, plan
    from app.cloud.steps import shell, take

    number = ["projects", "describe", project, "--format=value(projectNumber)"]
    asked = project_number is None and not apply  # what is printed asks for it, and so needs no login yet
    if project_number is None:
        project_number = STANDS_FOR_NUMBER if asked else gcloud.run(number).strip()
    where = place.Place(
        project=project,
        project_number=project_number,
        region=region,
        alloydb_cluster=cluster,
        alloydb_instance=instance,
        bucket=bucket or f"{project}-proctor",
        callers=callers,
        network=network,
        subnet=subnet,
        queues=",".join(dict.fromkeys((place.QUEUE, *(queues or ())))),
    )
    described = service.load(SERVICE_FILE, where, PLACEHOLDER)
    budget.check(described)
    steps = plan(where, described, tuple(where.queues.split(",")))
    if not apply:
        lines = "\n".join(shell(steps))
        if asked:
            print(f"PROJECT_NUMBER=$(gcloud {shlex.join(number)})\n")
            lines = lines.replace(STANDS_FOR_NUMBER, "${PROJECT_NUMBER}")
        print(lines)
        return
    place.save(where, ENV_FILE)
    take(steps, print)
    _say(f"{ENV_FILE} is written. Next: what is left to do above, then\n{_submit(where)}")


@cloud.command()
def deploy(
    image: Annotated[str | None, typer.Argument(metavar="IMAGE", help="Default: the newest that was built.")] = None,
    show: Annotated[bool, typer.Option("--print", help="Print the command instead of running it.")] = False,
) -> None:
    """Deploy by `gcloud run deploy`, whose flags say what service.yaml says. At once, and without proof."""
    import shlex

    from app.cloud import flags, place, service

    where = place.load(ENV_FILE)
    image = image or f"{where.image}:latest"
    if show:
        argv = flags.deploy(service.load(SERVICE_FILE, where, image), where.region, where.project)
        print(shlex.join(["gcloud", *argv]))
    else:
        _release(image).deploy()


@release.command()
def migrate(image: Image) -> None:
    """Bring the database to this image's version: a Cloud Run job, waited for."""
    _release(image).migrate()


@release.command("doctor")
def doctor_job(image: Image) -> None:
    """Run `proctor doctor` as a Cloud Run job: what it found is in the job's log."""
    _release(image).run_job("doctor")


@release.command()
def roll_out(
    image: Image,
    revision: Annotated[
        str, typer.Option(metavar="NAME", help="Of the new revision, behind proctor-.", show_default=False)
    ],
    patience: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="For the smoke test.")] = 600,
) -> None:
    """Deploy, prove it by one evaluation through the queue, and roll back if that fails."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ended from outside, it rolls back too
    _release(image, patience).roll_out(revision)


@cloud.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False) -> None:
    """Look whether a deployment is whole, from inside, and say how to mend what is not. Exit code 1: something is wrong."""
    import asyncio
    from dataclasses import asdict

    from app.cloud.doctor import Finding, examine
    from app.settings import load
    from app.telemetry import configure_logging

    try:
        settings = load()
    except SettingsError as error:
        findings = [Finding("settings", False, str(error), "set it in service.yaml, and deploy that")]
    else:
        configure_logging(settings)  # to stderr: stdout is the findings'
        findings = [Finding("settings", True, "all known and valid"), *asyncio.run(examine(settings))]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(_line(finding))
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


def _line(finding: "Finding") -> str:
    line = f"{'ok' if finding.ok else 'WRONG':<6} {finding.check:<12} {finding.says}"
    return line if finding.mend is None else f"{line}\n{'':<19} → {finding.mend}"


def _release(image: str, patience: float = 600) -> "Release":
    from app.cloud import place
    from app.cloud.release import Release

    return Release(place.load(ENV_FILE), image, say=_say, file=SERVICE_FILE, patience=patience)


def _submit(where: "Place") -> str:
    return (
        f"gcloud builds submit --region={where.region} --project={where.project}"
        f" --gcs-source-staging-dir=gs://{where.sources}/source --substitutions=_REGION={where.region}"
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr)
