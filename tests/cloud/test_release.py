"""Releasing against the local stack: the smoke test is a real evaluation through a real queue; only gcloud is written down
instead of being run."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from google.cloud import tasks_v2
from google.cloud.tasks_v2.services.cloud_tasks.transports import CloudTasksGrpcAsyncIOTransport

from app.cloud import flags
from app.cloud.budget import DoesNotFit
from app.cloud.gcloud import GcloudFailed
from app.cloud.place import Place
from app.cloud.release import Release, ReleaseFailed
from app.cloud.service import Service
from app.local.stack import Stack
from tests.cloud.conftest import IMAGE, ROOT, Gcloud
from tests.cloud.real_gcloud import refused
from tests.cloud.run_schema import problems

WHERE = "--region=us-central1 --project=my-project"
TOKEN = (
    "auth print-identity-token --impersonate-service-account=proctor-build@my-project.iam.gserviceaccount.com"
    " --audiences={} --include-email"
)
LIST = f"run services list --filter=metadata.name=proctor {WHERE} --format=json"
DESCRIBE = f"run services describe proctor {WHERE} --format=json"
TO_NEW = f"run services update-traffic proctor --to-revisions=proctor-2=100 --remove-tags=candidate {WHERE}"
TO_OLD = f"run services update-traffic proctor --to-revisions=proctor-1=100 --remove-tags=candidate {WHERE}"
OLD: list[dict[str, Any]] = [{"revisionName": "proctor-1", "percent": 100, "latestRevision": True}]


class Here(Place):
    """A deployment whose service is at an address that can be called."""

    url = ""

    @property
    def service_url(self) -> str:
        return self.url


@pytest.fixture
def here(place: Place) -> Here:
    return Here(**vars(place))


def _answers(gcloud: Gcloud, candidate: str, before: list[dict[str, Any]]) -> None:
    gcloud.answer(["auth", "print-identity-token"], "a-token\n")
    gcloud.answer(["run", "services", "list"], [{"status": {"traffic": before}}] if before else [])
    tagged = {"revisionName": "proctor-2", "tag": "candidate", "url": candidate}
    gcloud.answer(["run", "services", "describe"], {"status": {"traffic": [*before, tagged]}})


def _release(place: Place, told: list[str], **more: Any) -> Release:
    return Release(place, IMAGE, told.append, file=ROOT / "service.yaml", every=0.1, ready_patience=0.5, **more)


@pytest.fixture
def nobody() -> str:
    """An address where connections are refused: port 1 is nobody's."""
    return "http://127.0.0.1:1"


@asynccontextmanager
async def paused(stack: Stack) -> AsyncIterator[None]:
    """The queue delivers nothing."""
    assert stack.settings.queue_endpoint is not None
    async with grpc.aio.insecure_channel(stack.settings.queue_endpoint) as channel:
        client = tasks_v2.CloudTasksAsyncClient(transport=CloudTasksGrpcAsyncIOTransport(channel=channel))
        await client.pause_queue(name=stack.settings.queue)
        try:
            yield
        finally:
            await client.resume_queue(name=stack.settings.queue)


async def test_a_release_is_proved_by_an_evaluation_through_the_queue(
    gcloud: Gcloud, here: Here, stack: Stack, client: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Here, "url", stack.url)
    _answers(gcloud, stack.url, OLD)
    told: list[str] = []
    await asyncio.to_thread(_release(here, told).roll_out, "2")

    token = TOKEN.format(stack.url)
    replace = gcloud.calls[1]
    assert replace.argv[:3] == ["run", "services", "replace"]
    assert gcloud.said == [LIST, " ".join(replace.argv), DESCRIBE, token, TO_NEW, token]
    (text,) = replace.files.values()
    assert problems(yaml.safe_load(text)) == []
    spec = yaml.safe_load(text)["spec"]
    assert spec["template"]["metadata"]["name"] == "proctor-2"
    assert spec["template"]["spec"]["containers"][0]["image"] == IMAGE
    assert spec["traffic"] == [
        {"revisionName": "proctor-1", "percent": 100},
        {"revisionName": "proctor-2", "percent": 0, "tag": "candidate"},
    ]
    id = told[-1].split()[1]
    view = (await client.get(f"/evaluations/{id}")).json()
    assert (view["state"], view["spec"]["model"], view["spec"]["limit"]) == ("succeeded", "scripted/agent", 1)

    Path(tmp_path, "service.yaml").write_text(text)
    argvs = [
        [str(tmp_path / "service.yaml") if a.endswith("service.yaml") else a for a in c.argv] for c in gcloud.calls
    ]
    assert refused(argvs, tmp_path) == {}


async def test_a_failed_smoke_test_is_rolled_back(
    gcloud: Gcloud, here: Here, stack: Stack, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Here, "url", stack.url)
    _answers(gcloud, stack.url, OLD)
    async with paused(stack):
        with pytest.raises(ReleaseFailed, match=r"its time is over.*Rolled back, proctor-1 serves 100 %\.$") as failed:
            await asyncio.to_thread(_release(here, [], patience=0.5).roll_out, "2")
    token = TOKEN.format(stack.url)
    assert gcloud.said[2:] == [DESCRIBE, token, TO_NEW, token, TO_OLD, token]
    id = str(failed.value).split()[1]
    assert (await client.get(f"/evaluations/{id}")).json()["cancel_requested"], "it is not left running"


async def test_an_old_revision_that_is_not_ready_after_the_roll_back_is_told(
    gcloud: Gcloud, here: Here, stack: Stack, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Here, "url", nobody)
    _answers(gcloud, stack.url, OLD)
    with pytest.raises(
        ReleaseFailed, match=r"Rolled back, proctor-1 serves 100 %, but it is not ready: .*does not answer"
    ):
        await asyncio.to_thread(_release(here, []).roll_out, "2")
    assert TO_OLD in gcloud.said


async def test_what_served_a_part_serves_it_again(
    gcloud: Gcloud, here: Here, stack: Stack, nobody: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Here, "url", nobody)
    split = [{"revisionName": "proctor-0", "percent": 10}, {"revisionName": "proctor-1", "percent": 90}]
    _answers(gcloud, stack.url, [*split, {"revisionName": "proctor-x", "tag": "old"}])
    with pytest.raises(ReleaseFailed, match=r"proctor-0 serves 10 % and proctor-1 serves 90 %"):
        await asyncio.to_thread(_release(here, []).roll_out, "2")
    assert any("--to-revisions=proctor-0=10,proctor-1=90" in said for said in gcloud.said)


def test_a_revision_that_is_not_ready_gets_no_traffic(gcloud: Gcloud, here: Here, nobody: str) -> None:
    _answers(gcloud, nobody, OLD)
    with pytest.raises(ReleaseFailed, match=r"does not answer.*It got no traffic; proctor-1 serves 100 %\.$"):
        _release(here, []).roll_out("2")
    assert [said for said in gcloud.said if "--to-" in said] == []
    assert gcloud.said[-1] == f"run services update-traffic proctor --remove-tags=candidate {WHERE}"


def test_a_tag_that_cannot_be_removed_does_not_hide_why_the_release_failed(
    gcloud: Gcloud, here: Here, nobody: str
) -> None:
    gcloud.answer(["run", "services", "update-traffic"], code=1, err="quota exceeded")
    _answers(gcloud, nobody, OLD)
    with pytest.raises(ReleaseFailed, match=r"does not answer.*no traffic; .*tag candidate could not.*quota exceeded"):
        _release(here, []).roll_out("2")


def test_a_first_release_has_all_traffic_at_once_and_nothing_to_go_back_to(
    gcloud: Gcloud, here: Here, stack: Stack, nobody: str
) -> None:
    _answers(gcloud, nobody, [])
    with pytest.raises(ReleaseFailed):
        _release(here, []).roll_out("2")
    (text,) = gcloud.calls[1].files.values()
    assert yaml.safe_load(text)["spec"]["traffic"] == [
        {"revisionName": "proctor-2", "percent": 100, "tag": "candidate"}
    ]


def test_a_revision_that_cannot_start_changes_nothing(gcloud: Gcloud, here: Here, nobody: str) -> None:
    gcloud.answer(["run", "services", "replace"], code=1, err="The user-provided container failed to start")
    _answers(gcloud, nobody, OLD)
    with pytest.raises(GcloudFailed, match="container failed to start"):
        _release(here, []).roll_out("2")
    assert len(gcloud.calls) == 2


def test_numbers_that_do_not_fit_are_not_deployed(gcloud: Gcloud, here: Here, tmp_path: Path) -> None:
    file = tmp_path / "service.yaml"
    file.write_text((ROOT / "service.yaml").read_text().replace("timeoutSeconds: 1860", "timeoutSeconds: 1800"))
    release = Release(here, IMAGE, lambda _: None, file=file)
    for act in (partial(release.roll_out, "2"), release.deploy):
        with pytest.raises(DoesNotFit, match="timeoutSeconds is 1800: it must be above the dispatch deadline"):
            act()
    assert gcloud.calls == []


def test_the_database_is_migrated_by_a_job_that_is_waited_for(gcloud: Gcloud, place: Place, described: Service) -> None:
    _release(place, []).migrate()
    job = flags.job(described, "proctor-migrate", "migrate", place.region, place.project)
    assert [call.argv for call in gcloud.calls] == [
        job,
        ["run", "jobs", "execute", "proctor-migrate", "--wait", *WHERE.split()],
    ]


def test_a_failed_migration_is_told(gcloud: Gcloud, place: Place) -> None:
    gcloud.answer(["run", "jobs", "execute"], code=1, err="The execution failed.")
    with pytest.raises(GcloudFailed, match=r"proctor-migrate --wait .*: The execution failed"):
        _release(place, []).migrate()


def test_what_is_deployed_is_a_digest_and_not_a_tag(gcloud: Gcloud, place: Place) -> None:
    gcloud.answer(["artifacts", "docker", "images", "describe"], "sha256:abc\n")
    Release(place, f"{place.image}:7", lambda _: None, file=ROOT / "service.yaml").migrate()
    assert f"--image={place.image}@sha256:abc" in gcloud.calls[1].argv


def test_make_deploy_says_what_the_file_says(gcloud: Gcloud, place: Place, described: Service) -> None:
    _release(place, []).deploy()
    deploy, traffic = gcloud.calls
    assert deploy.argv == flags.deploy(described, place.region, place.project)
    assert " ".join(traffic.argv) == f"run services update-traffic proctor --to-latest {WHERE}"
