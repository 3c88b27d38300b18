"""Submitting, listing, showing, cancelling and retrying from the command line, against the real service."""

import asyncio
import json
from collections.abc import Callable
from uuid import uuid4

import pytest

from app.spec import SandboxLimits, Spec
from tests.cli.conftest import Proctor, Service
from tests.cli.evaluations import FAULT, LOG, ended, planned, scored, settle, submitted
from tests.cli.relay import open_relay

pytestmark = pytest.mark.xdist_group("cli-commands")

TASK = ("proctor/programming", "--model", "mockllm/model")
NOT_THERE = "00000000-0000-4000-8000-000000000000"


async def test_submit_prints_the_id_and_nothing_else_to_stdout(proctor: Proctor) -> None:
    ran = await proctor("submit", *TASK)
    assert ran.code == 0
    id = ran.out.removesuffix("\n")
    assert f"proctor watch {id}" in ran.err
    shown = await proctor("show", id, "--json")
    assert json.loads(shown.out)["spec"] == {"task": "proctor/programming", "model": "mockllm/model"}


async def test_what_is_given_on_the_command_line_is_what_the_spec_says(proctor: Proctor) -> None:
    ran = await proctor(
        *("submit", *TASK, "--json", "-M", "base-url=http://h?a=b", "--model-role", "grader=openai/gpt-5"),
        *("-T", "n=7", "-T", "x=0.5", "-T", "on=true", "-T", "off=False", "-T", 'l=["a", 1]', "-T", "c=a,b"),
        *("-T", "s=some text", "-T", 'q="007"', "-T", 'comma="a,b"', "-T", "day=2026-01-01", "-T", "e="),
        *("--limit", "3", "--epochs", "2", "--message-limit", "9", "--token-limit", "1000", "--time-limit", "60"),
        *("--working-limit", "50", "--cost-limit", "0.5", "--sandbox", "local", "--samples-per-execution", "4"),
        *("--sandbox-limit", "memory=67108864", "--sandbox-limit", "cpu=10"),
        *("--max-failures", "1", "--no-fail-on-error", "--tag", "suite=nightly", "--tag", "by=me=you"),
    )
    assert ran.code == 0, ran.err
    spec = Spec.model_validate(json.loads(ran.out)["spec"])
    assert spec == Spec(
        task="proctor/programming",
        model="mockllm/model",
        task_args={"n": 7, "x": 0.5, "on": True, "off": False, "l": ["a", 1], "c": ["a", "b"], "s": "some text"}
        | {"q": "007", "comma": "a,b", "day": {"$yaml": "2026-01-01"}, "e": None},
        model_args={"base_url": "http://h?a=b"},
        model_roles={"grader": "openai/gpt-5"},
        limit=3,
        epochs=2,
        message_limit=9,
        token_limit=1000,
        time_limit=60,
        working_limit=50,
        cost_limit=0.5,
        fail_on_error=False,
        sandbox="local",
        sandbox_limits=SandboxLimits(memory=2**26, cpu=10),
        samples_per_execution=4,
        max_failures=1,
        tags={"suite": "nightly", "by": "me=you"},
    )


async def test_a_key_gives_the_same_evaluation_again_and_is_refused_for_another_spec(proctor: Proctor) -> None:
    key = ("--idempotency-key", "nightly")
    first, again = [await proctor("submit", *TASK, *key) for _ in range(2)]
    other = await proctor("submit", *TASK, "--limit", "1", *key)
    assert (first.code, again.code, first.out) == (0, 0, again.out)
    assert (other.code, other.out) == (2, "")
    assert other.err.startswith("proctor: Idempotency-Key 'nightly' already stands for another spec")
    assert other.err.count("\n") == 1


async def test_a_submit_whose_answer_was_lost_makes_one_evaluation(
    service: Service, proctor: Proctor, at: Callable[[str], Proctor]
) -> None:
    tag = f"run={uuid4()}"
    async with open_relay(service.url) as relay:
        relay.lose_answers(2)
        ran = await at(relay.url)("submit", *TASK, "--tag", tag)
    assert ran.code == 0, ran.err
    assert [answer.split(b" ")[1] for answer in relay.lost_answers] == [b"202", b"202"]
    listed = json.loads((await proctor("list", "--tag", tag, "--json")).out)
    assert [view["id"] for view in listed["evaluations"]] == [ran.out.strip()]


async def test_a_retry_whose_answer_was_lost_is_not_sent_again(service: Service, at: Callable[[str], Proctor]) -> None:
    id = await ended(service.ledger, "failed")
    async with open_relay(service.url) as relay:
        relay.lose_answers(2)
        ran = await at(relay.url)("retry", str(id))
    assert (ran.code, len(relay.lost_answers)) == (3, 1)


async def test_list_filters_by_tag_and_state_and_follows_pages(service: Service, proctor: Proctor) -> None:
    tag = str(uuid4())
    ids = [str(await submitted(service.ledger, tags={"run": tag, "n": str(n)})) for n in range(203)]
    over = str(await ended(service.ledger, tags={"run": tag}))

    newest = json.loads((await proctor("list", "--tag", f"run={tag}", "--json", "--limit", "202")).out)
    assert [view["id"] for view in newest["evaluations"]] == [over, *ids[:1:-1]]
    assert newest["next"] is not None
    succeeded = await proctor("list", "--tag", f"run={tag}", "--state", "succeeded")
    assert len(succeeded.out.splitlines()) == 3, "title, rule, evaluation"
    line = succeeded.out.splitlines()[-1].split()
    assert line[:5] == [over, "succeeded", "2/2", "proctor/programming", "mockllm/model"]
    assert line[5:9] == ["accuracy", "0.500", "±", "0.354"]
    both = await proctor("list", "--tag", f"run={tag}", "--tag", "n=1", "--json")
    assert [view["id"] for view in json.loads(both.out)["evaluations"]] == [ids[1]]


async def test_an_empty_list_is_empty_on_stdout(proctor: Proctor) -> None:
    ran = await proctor("list", "--tag", f"nothing={uuid4()}")
    assert (ran.code, ran.out, ran.err) == (0, "", "No evaluations.\n")


async def test_show_has_samples_scores_tokens_metrics_and_the_log(service: Service, proctor: Proctor) -> None:
    id = await ended(service.ledger, samples=(1, "007"), limit=2)
    ran = await proctor("show", str(id))
    assert ran.code == 0
    words = [line.split() for line in ran.out.splitlines()]
    assert ["evaluation", str(id), "succeeded"] in words
    assert ["spec", "limit", "2"] in words
    assert ["tokens", "1,234"] in words
    assert ["log", LOG] in words
    assert ["sample", "epoch", "state", "verify", "tokens", "time"] in words
    assert ["007", "1", "succeeded", "C", "617", "1", "min", "12", "s"] in words
    assert ["verify", "accuracy", "0.500", "±", "0.354", "2"] in words


async def test_show_says_that_there_are_more_samples(service: Service, proctor: Proctor) -> None:
    id = await planned(service.ledger, *range(1, 5))
    three, four, none = await asyncio.gather(*(proctor("show", str(id), "--samples", n) for n in "340"))
    assert "the first 3" in three.out
    assert "the first" not in four.out
    assert "epoch" not in none.out


async def test_what_others_wrote_is_neither_markup_nor_control_and_stays_on_its_line(
    service: Service, proctor: Proctor
) -> None:
    id = await ended(service.ledger, "failed", ("[bold]one[/bold]", "[/]two\x07"), tags={"[red]a": ":warning: b"})
    ran = await proctor("show", str(id))
    assert ran.code == 0, ran.err
    assert "[bold]one[/bold]" in ran.out
    assert "[red]a" in ran.out
    assert ":warning: b" in ran.out
    error = "model: RateLimitError: slow down [/] second line \N{REPLACEMENT CHARACTER}[31mred"
    assert sum(error in line for line in ran.out.splitlines()) == 3, "the evaluation's, and each sample's"
    assert "\x1b" not in ran.out
    assert "\x07" not in ran.out
    assert "RateLimitError: slow down [/] second" in (await proctor("show", str(id), LC_ALL="C", PYTHONUTF8="0")).out


async def test_the_beginning_of_an_id_is_enough_where_it_means_one(service: Service, proctor: Proctor) -> None:
    id = str(await submitted(service.ledger))
    found = await proctor("show", id[:10].upper(), "--json")
    assert json.loads(found.out)["id"] == id
    for refused in await asyncio.gather(*(proctor("show", wrong) for wrong in (id[:5], "nightly", "../evaluations"))):
        assert (refused.code, refused.out) == (2, "")
        assert "is not an evaluation's id" in refused.err
    nobody = await proctor("show", "000000")
    assert nobody.code == 2
    assert "give the whole id" in nobody.err


async def test_cancel_ends_what_is_pending_and_is_harmless_when_sent_again(service: Service, proctor: Proctor) -> None:
    id = str(await planned(service.ledger, 1, 2))
    first = await proctor("cancel", id)
    assert (first.code, first.out) == (0, "")
    assert first.err.startswith(f"Evaluation {id} is being cancelled")
    again = await proctor("cancel", id, "--json")
    assert json.loads(again.out) == {"id": id, "state": "running", "cancelled": 0}
    assert "is being cancelled" in (await proctor("show", id)).out


async def test_retry_runs_what_failed_again_and_is_refused_while_it_runs(service: Service, proctor: Proctor) -> None:
    id = str(await ended(service.ledger, "failed"))
    ran = await proctor("retry", id, "--json")
    assert json.loads(ran.out) == {"id": id, "state": "running", "executions": 2}
    again = await proctor("retry", id)
    assert (again.code, again.out) == (2, "")
    assert "is still running" in again.err


async def test_explain_takes_an_evaluation_or_one_of_its_executions(service: Service, proctor: Proctor) -> None:
    id = str(await planned(service.ledger, 1, "007"))
    await settle(service.ledger, f"{id}.1", "interrupted", error=FAULT, usage={"tokens": 12_340, "model_calls": 3})
    await service.ledger.claim(f"{id}.1", uuid4())

    whole = await proctor("explain", id[:13])
    assert (whole.code, whole.err) == (0, "")
    said = [" ".join(line.split()) for line in whole.out.splitlines()]
    assert said[:3] == [
        f"evaluation {id} running",
        "It runs: 0 of its 2 runs are over; 1 is running, 1 is pending.",
        "It has spent 12,340 tokens.",
    ]
    assert said[4] == f"execution {id}.1 running sample 1"
    assert said[5].startswith("It runs: worker worker-1 (attempt 2) holds it; its lease lasts ")

    one = await proctor("explain", f"{id[:13]}.1")
    said = [" ".join(line.split()) for line in one.out.splitlines()]
    assert said[0] == f"execution {id}.1 running sample 1"
    assert any("It had spent 12,340 tokens." in line for line in said)
    title, _, first, second = said[-4:]
    assert title == "attempt outcome error worker began lasted model calls tokens"
    assert first.startswith("1 interrupted model worker-1 ")
    assert first.endswith(" 3 12,340")
    assert second.startswith("2 running worker-1 ")

    for given in (id, f"{id}.1"):
        view = json.loads((await proctor("explain", given, "--json")).out)
        assert (view["id"], view["state"]) == (given, "running")
        assert view["explanation"]


async def test_what_cannot_be_explained_is_said_in_one_line(service: Service, proctor: Proctor) -> None:
    id = str(await submitted(service.ledger))
    wrong = {
        f"{id}.7": f"There is no execution '{id}.7'.",
        f"{id}.1/../../evaluations?x=1": f"'{id}.1/../../evaluations?x=1' is not an execution's id",
        f"{id}.": f"'{id}.' is not an execution's id",
        "nightly.1": "'nightly' is not an evaluation's id",
        f"{NOT_THERE}.plan": f"There is no execution '{NOT_THERE}.plan'.",
    }
    for ran, said in zip(await asyncio.gather(*(proctor("explain", g) for g in wrong)), wrong.values(), strict=True):
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
        assert ran.err.startswith(f"proctor: {said}")


async def test_show_tells_tokens_that_retries_have_wasted(service: Service, proctor: Proctor) -> None:
    id = await planned(service.ledger, 1)
    await settle(service.ledger, f"{id}.1", "interrupted", error=FAULT, usage={"tokens": 1_000})
    await settle(service.ledger, f"{id}.1", samples=[scored(1)], usage={"tokens": 617})
    ran = await proctor("show", str(id))
    assert "1,617 spent, 1,000 wasted by retries" in ran.out


@pytest.mark.parametrize("command", ["show", "watch", "explain", "cancel", "retry"])
async def test_an_unknown_evaluation_is_said_in_one_line(proctor: Proctor, command: str) -> None:
    ran = await proctor(command, NOT_THERE)
    assert (ran.code, ran.out, ran.err) == (2, "", f"proctor: There is no evaluation {NOT_THERE}.\n")


async def test_a_spec_that_the_service_refuses_is_said_in_one_line(proctor: Proctor) -> None:
    ran = await proctor("submit", *TASK, "--max-failures", "11")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "max_failures" in ran.err


async def test_nothing_is_submitted_where_the_command_is_wrong(proctor: Proctor) -> None:
    tag = f"run={uuid4()}"
    wrong = (
        ["-T", "novalue"],
        ["-T", "a=[1"],
        ["-T", "a=2021-13-01"],
        ["-T", "a=" + "[" * 999],
        ["--limit", "0"],
        ["--sandbox", "docker"],
        ["--tag", "=x"],
    )
    all = await asyncio.gather(*(proctor("submit", *TASK, "--tag", tag, *options) for options in wrong))
    for ran, options in zip(all, wrong, strict=True):
        assert (ran.code, ran.out) == (2, ""), options
        assert options[0] in ran.err
    assert json.loads((await proctor("list", "--tag", tag, "--json")).out)["evaluations"] == []
