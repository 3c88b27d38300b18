"""The `proctor` command.

Exit codes: 0 succeeded; 1 the evaluation that was waited for failed or was cancelled; 2 the command or the request is
wrong; 3 the service cannot be reached; 130 Ctrl-C. Results go to stdout, everything else to stderr.

What a command needs is imported when it runs: `proctor --help` and the client's commands load nothing of the service.
"""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import typer

from app.cli_cloud import cloud
from app.cli_service import service
from app.errors import DatabaseRefused, DatabaseUnavailable, ProctorError

if TYPE_CHECKING:
    from app.client import Client, Json

app = typer.Typer(
    name="proctor",
    help="Runs long AI agent evaluations and never loses one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Errors are one line, without a traceback: what was wrong, and what to do."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # whatever the terminal's encoding is
    try:
        app(prog_name="proctor")
    except ProctorError as error:
        _say(f"proctor: {error}")
        sys.exit(_exit_code(error))


def _exit_code(error: ProctorError) -> int:
    from app.client import Unreachable

    unreachable = isinstance(error, Unreachable | DatabaseUnavailable) and not isinstance(error, DatabaseRefused)
    return 3 if unreachable else 2


def _say(message: str) -> None:
    from app.cells import plain

    print(plain(message), file=sys.stderr)


# Options --------------------------------------------------------------------------------------------------------------


def _http(url: str) -> str:
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url
    raise typer.BadParameter(f"{url!r} is not an address like http://127.0.0.1:8080.")


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("proctor"))
        raise typer.Exit


Id = Annotated[str, typer.Argument(metavar="ID", help="The evaluation's id, or the first 6 or more characters of it.")]
AnyId = Annotated[
    str,
    typer.Argument(
        metavar="ID",
        help="An evaluation's id, or its first characters; with .plan, .1, .2 … or .report behind it, that execution's.",
    ),
]
Url = Annotated[
    str, typer.Option("--url", envvar="PROCTOR_URL", callback=_http, metavar="URL", help="Where the service is.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the API's own JSON, and nothing else, to stdout.")]
State = Literal["running", "succeeded", "failed", "cancelled"]
HERE = "http://127.0.0.1:8080"


def _pairs(name: str, given: Sequence[str] | None) -> dict[str, str]:
    pairs = {}
    for one in given or ():
        key, separator, value = one.partition("=")
        if not key or not separator:
            raise typer.BadParameter(f"{one!r} is not KEY=VALUE.", param_hint=name)
        pairs[key] = value
    return pairs


def _arguments(name: str, given: Sequence[str] | None) -> dict[str, Any]:
    """As `inspect eval` reads them: YAML, so that JSON works too, and dates; `a,b` is a list; `-` in a key is `_`."""
    return {key.replace("-", "_"): _value(name, value) for key, value in _pairs(name, given).items()}


def _value(name: str, given: str) -> Any:
    from app.yaml_text import carried

    try:
        value = carried(given)
    except ValueError as error:
        raise typer.BadParameter(f"{given!r} {error}.", param_hint=name) from error
    if isinstance(value, str) and "," in value and given[0] not in "\"'":
        return value.split(",")
    return value


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# Evaluations ----------------------------------------------------------------------------------------------------------


@app.command()
def submit(
    task: Annotated[
        str,
        typer.Argument(metavar="TASK", help="An Inspect task, for example proctor/programming.", show_default=False),
    ],
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="As Inspect names it: provider/name.")],
    task_args: Annotated[
        list[str] | None, typer.Option("-T", metavar="KEY=VALUE", help="An argument of the task.")
    ] = None,
    model_args: Annotated[
        list[str] | None, typer.Option("-M", metavar="KEY=VALUE", help="An argument of the model.")
    ] = None,
    model_roles: Annotated[
        list[str] | None,
        typer.Option("--model-role", metavar="ROLE=MODEL", help="For example the judge: grader=openai/gpt-5."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Run only the first so many samples.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, metavar="N", help="Run each sample so many times.")] = None,
    message_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Messages in a sample's conversation.")
    ] = None,
    token_limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens a sample may use.")] = None,
    time_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Seconds on the clock for a sample.")
    ] = None,
    working_limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Seconds of work for a sample: less known waits. A wait within a call counts until the call returns.",
        ),
    ] = None,
    max_retries: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="Try a failing call of a model so often again. Default: without end."),
    ] = None,
    timeout: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Seconds after which a failing call of a model is not tried again."),
    ] = None,
    attempt_timeout: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Seconds that one try of a model's call may take.")
    ] = None,
    cost_limit: Annotated[
        float | None, typer.Option(min=0, metavar="USD", help="US dollars a sample may cost.")
    ] = None,
    fail_on_error: Annotated[
        bool | None,
        typer.Option("--fail-on-error/--no-fail-on-error", help="Does a sample's error fail the evaluation?"),
    ] = None,
    continue_on_fail: Annotated[
        bool | None,
        typer.Option(
            "--continue-on-fail/--no-continue-on-fail", help="Run all samples, also once errors fail the evaluation?"
        ),
    ] = None,
    sandbox: Annotated[
        Literal["proctor", "local"] | None, typer.Option(help="Instead of the task's own; local isolates nothing.")
    ] = None,
    sandbox_limits: Annotated[
        list[str] | None,
        typer.Option(
            "--sandbox-limit",
            metavar="KEY=N",
            help="Less for a sample's code than the service allows: memory, workspace, tmp, output (bytes), processes, cpu"
            " (seconds). Can be given again.",
        ),
    ] = None,
    samples_per_execution: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Samples that one unit of queue work runs.")
    ] = None,
    retry_on_error: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Run an errored sample again at once, so many times.")
    ] = None,
    checkpoint: Annotated[
        Literal["turn", "minute", "off"] | None, typer.Option(help="How often a running sample's state is saved.")
    ] = None,
    max_failures: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="How often a sample may fail by its own fault.")
    ] = None,
    queue: Annotated[
        str | None, typer.Option(metavar="NAME", help="The queue that paces it: one that the service allows.")
    ] = None,
    tags: Annotated[list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="A label to find it by.")] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(metavar="KEY", help="The same key and spec give the same evaluation again.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Watch it to its end; the exit code is 1 if it fails.")] = False,
    as_json: AsJson = False,
    url: Url = HERE,
) -> None:
    """Submit an evaluation. It runs whether or not anybody waits for it; its id goes to stdout."""
    spec = {
        "task": task,
        "model": model,
        "task_args": _arguments("-T", task_args),
        "model_args": _arguments("-M", model_args),
        "model_roles": _pairs("--model-role", model_roles),
        "limit": limit,
        "epochs": epochs,
        "message_limit": message_limit,
        "token_limit": token_limit,
        "time_limit": time_limit,
        "working_limit": working_limit,
        "max_retries": max_retries,
        "timeout": timeout,
        "attempt_timeout": attempt_timeout,
        "cost_limit": cost_limit,
        "fail_on_error": fail_on_error,
        "continue_on_fail": continue_on_fail,
        "sandbox": sandbox,
        "sandbox_limits": _arguments("--sandbox-limit", sandbox_limits) or None,
        "samples_per_execution": samples_per_execution,
        "retry_on_error": retry_on_error,
        "checkpoint": checkpoint,
        "max_failures": max_failures,
        "queue": queue,
        "tags": _pairs("--tag", tags),
    }
    with _client(url) as client:
        view = client.submit({k: v for k, v in spec.items() if v not in (None, {})}, idempotency_key)
        for note in view.get("notes", ()):
            _say(note)
        if wait:
            _say(f"Evaluation {view['id']} is submitted.")
            _watch(client, view["id"], as_json)
        elif as_json:
            _print_json(view)
        else:
            print(view["id"])
            _say(f"Submitted. To follow it: proctor watch {view['id']}")


@app.command()
def watch(id: Id, as_json: AsJson = False, url: Url = HERE) -> None:
    """Follow an evaluation to its end, then show it. The exit code is 1 if it fails or is cancelled."""
    with _client(url) as client:
        _watch(client, client.find(id), as_json)


@app.command("list")
def list_evaluations(
    state: Annotated[State | None, typer.Option(help="Only those in this state.")] = None,
    tags: Annotated[
        list[str] | None, typer.Option("--tag", metavar="KEY=VALUE", help="Only those with this tag; all must fit.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="The newest so many.")] = 20,
    as_json: AsJson = False,
    url: Url = HERE,
) -> None:
    """List evaluations, newest first."""
    _pairs("--tag", tags)
    with _client(url) as client:
        page = client.evaluations(state=state, tags=tags or (), limit=limit)
    if as_json:
        _print_json(page)
    elif not page["evaluations"]:
        _say("No evaluations.")
    else:
        from app import display

        out = display.console()
        out.print(display.evaluations(page["evaluations"], out.width))


@app.command()
def show(
    id: Id,
    samples: Annotated[int, typer.Option(min=0, metavar="N", help="Show the first so many samples.")] = 100,
    sample: Annotated[
        str | None, typer.Option("--sample", metavar="ID", help="Show this sample instead, in each epoch.")
    ] = None,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where in the task's code the samples' errors come from.")
    ] = False,
    as_json: AsJson = False,
    url: Url = HERE,
) -> None:
    """Show an evaluation: state, samples, scores, metrics, errors."""
    with _client(url) as client:
        found = client.find(id)
        if sample is None and not traceback:
            _show(client, client.evaluation(found), as_json, samples)
            return
        views = client.samples(found, samples)["samples"] if sample is None else client.sample(found, sample)
    if as_json:
        _print_json({"samples": views})
        return
    from app import display

    display.console().print(display.chosen(views, traceback=traceback))


@app.command()
def explain(id: AnyId, as_json: AsJson = False, url: Url = HERE) -> None:
    """Say why an evaluation, or one of its executions, is where it is and what comes next."""
    with _client(url) as client:
        view = client.explanation(id)
    if as_json:
        _print_json(view)
        return
    from app import display, explained

    display.console().print(explained.explanation(view))


@app.command()
def cancel(id: Id, as_json: AsJson = False, url: Url = HERE) -> None:
    """Cancel an evaluation. Samples that are finished stay."""
    with _client(url) as client:
        answer = client.cancel(client.find(id))
    if as_json:
        _print_json(answer)
    elif answer["state"] == "running":
        _say(f"Evaluation {answer['id']} is being cancelled; what runs stops within 15 s.")
    else:
        _say(f"Evaluation {answer['id']} is over: {answer['state']}.")


@app.command()
def retry(id: Id, as_json: AsJson = False, url: Url = HERE) -> None:
    """Run what failed or was cancelled again, once the evaluation is over."""
    with _client(url) as client:
        answer = client.retry(client.find(id))
    if as_json:
        _print_json(answer)
    else:
        _say(f"Evaluation {answer['id']} runs again: {answer['executions']} executions.")


def _client(url: str) -> "Client":
    import os

    from app.client import Client

    return Client(url, os.environ.get("PROCTOR_TOKEN"))  # no option: other users of a machine see commands' arguments


def _watch(client: "Client", id: str, as_json: bool) -> None:
    """Ends with the exit code that the evaluation's end stands for."""
    from app import display
    from app.client import follow

    try:
        with display.Watch(display.console(stderr=True)) as screen:
            for seen in follow(client, id, details=screen.details):
                screen.update(seen)
    except KeyboardInterrupt:
        _say(f"Evaluation {id} goes on. To follow it: proctor watch {id}; to end it: proctor cancel {id}")
        raise typer.Exit(130) from None
    _show(client, seen.view, as_json)
    raise typer.Exit(0 if seen.view["state"] == "succeeded" else 1)


def _show(client: "Client", view: "Json", as_json: bool, most: int = 100) -> None:
    if as_json:
        _print_json(view)
        return
    from app import display

    page = client.samples(view["id"], most) if most else {"samples": [], "next": None}
    display.console().print(display.evaluation(view, page["samples"], more=page["next"] is not None))


def _print_json(document: "Json") -> None:
    print(json.dumps(document, indent=2))


app.add_typer(service)
app.add_typer(cloud)


if __name__ == "__main__":
    main()
