"""Releasing a version: its database first, then the service without traffic, then the traffic, then proof; and back, if
the proof fails. Cloud Build has no hook for failures, so what must be undone is undone here.

    migrate    a Cloud Run job brings the tables to this version's, and is waited for
    roll out   the new revision starts beside the old one, under the tag `candidate`, and must say that it is ready
               it gets the traffic, for pushes go to the service's own address and nowhere else
               one sample is evaluated, through the queue
               or the traffic goes back to what it was

The image goes in by digest: what was tested is what runs, whatever becomes of its tag.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from app.cloud import budget, flags, gcloud, service
from app.cloud.place import SERVICE, Place
from app.cloud.service import Service
from app.cloud.smoke import PATIENCE, READY_PATIENCE, Smoke
from app.errors import ProctorError

CANDIDATE = "candidate"

Say: TypeAlias = Callable[[str], None]


class ReleaseFailed(ProctorError):
    """The message says what failed, and what serves now."""

    title = "Release failed"


@dataclass(frozen=True)
class Release:
    """`image`: with a tag or a digest. Seconds: `every`, between two looks at the smoke test; `patience`, for its
    evaluation; `ready_patience`, for a revision."""

    place: Place
    image: str
    say: Say
    file: Path = service.FILE
    every: float = 2
    patience: float = PATIENCE
    ready_patience: float = READY_PATIENCE

    def migrate(self) -> None:
        """Raises `GcloudFailed`; the old version still serves then."""
        self.run_job("migrate")

    def run_job(self, command: str) -> None:
        """One run of `proctor <command>` in a Cloud Run job of its own, waited for."""
        name = f"{SERVICE}-{command}"
        described = service.load(self.file, self.place, self._digest())
        gcloud.run(flags.job(described, name, command, self.place.region, self.place.project))
        gcloud.run(["run", "jobs", "execute", name, "--wait", *self._where])
        self.say(f"job {name} has succeeded")

    def deploy(self) -> None:
        """`gcloud run deploy`, by flags, at once with all traffic and without proof: for people in a hurry."""
        described = self._load(self._digest())
        gcloud.run(flags.deploy(described, self.place.region, self.place.project))
        gcloud.run(["run", "services", "update-traffic", SERVICE, "--to-latest", *self._where])
        self.say(f"{self.place.service_url} serves {described.container['image']}")
        self.say(f"no flag says {', '.join(name.rpartition('.')[2] for name in flags.NO_FLAG)}: `proctor release` does")

    def roll_out(self, suffix: str) -> None:
        """The new revision is `proctor-<suffix>`. Raises `ReleaseFailed`; what served before serves again then."""
        described = self._load(self._digest())
        revision = f"{SERVICE}-{suffix}"
        before = self._traffic()
        self._replace(described, revision, before)
        self.say(f"revision {revision} is there, {_share(before)}")
        try:
            with self._smoke(self._candidate_url()) as smoke:
                smoke.ready(self.ready_patience)
            self.say(f"revision {revision} is ready")
        except ProctorError as error:
            raise ReleaseFailed(f"{error} It got no traffic; {_share(before)}.{self._forget_candidate()}") from error
        self._prove(revision, before)

    def _prove(self, revision: str, before: dict[str, int]) -> None:
        try:
            self._send_traffic({revision: 100})
            with self._smoke(self.place.service_url) as smoke:
                id = smoke.evaluate(self.patience)
        except BaseException as error:  # Ctrl-C and Cloud Build's time-out too
            raise ReleaseFailed(f"{error or type(error).__name__} {self._roll_back(revision, before)}") from error
        self.say(f"evaluation {id} has succeeded; {revision} serves")

    def _roll_back(self, revision: str, before: dict[str, int]) -> str:
        """What serves now, in words."""
        if not before:
            return f"There is nothing to go back to: {revision} serves."
        try:
            self._send_traffic(before)
        except ProctorError as error:
            return f"Rolling back failed too, {revision} may serve: {error}"
        try:
            with self._smoke(self.place.service_url) as smoke:
                smoke.ready(self.ready_patience)
        except ProctorError as error:
            return f"Rolled back, {_share(before)}, but it is not ready: {error}"
        return f"Rolled back, {_share(before)}."

    def _load(self, image: str) -> Service:
        """Raises `DoesNotFit` for a service.yaml whose numbers do not."""
        described = service.load(self.file, self.place, image)
        budget.check(described)
        return described

    def _digest(self) -> str:
        """The image by its digest."""
        if "@" in self.image:
            return self.image
        wanted = "--format=value(image_summary.digest)"
        describe = ["artifacts", "docker", "images", "describe", self.image, wanted, f"--project={self.place.project}"]
        digest = gcloud.run(describe).strip()
        return f"{self.image.rpartition(':')[0]}@{digest}"

    def _traffic(self) -> dict[str, int]:
        """Percent by revision, as it is now; empty: there is no such service, or nothing serves."""
        services = gcloud.ask(["run", "services", "list", f"--filter=metadata.name={SERVICE}", *self._where])
        targets = services[0].get("status", {}).get("traffic", []) if services else []
        return {target["revisionName"]: target["percent"] for target in targets if target.get("percent")}

    def _replace(self, described: Service, revision: str, before: dict[str, int]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "service.yaml")
            file.write_text(yaml.safe_dump(_beside(described, revision, before), sort_keys=False))
            gcloud.run(["run", "services", "replace", str(file), *self._where])

    def _candidate_url(self) -> str:
        answer = gcloud.ask(["run", "services", "describe", SERVICE, *self._where])
        for target in answer["status"]["traffic"]:
            if target.get("tag") == CANDIDATE:
                return str(target["url"])
        raise ReleaseFailed(f"The service has no revision with the tag {CANDIDATE}.")

    def _send_traffic(self, shares: dict[str, int]) -> None:
        said = ",".join(f"{revision}={percent}" for revision, percent in shares.items())
        update = ["run", "services", "update-traffic", SERVICE, f"--to-revisions={said}"]
        gcloud.run([*update, f"--remove-tags={CANDIDATE}", *self._where])

    def _forget_candidate(self) -> str:
        """What must be said of it, if anything."""
        try:
            gcloud.run(["run", "services", "update-traffic", SERVICE, f"--remove-tags={CANDIDATE}", *self._where])
        except ProctorError as error:
            return f" Its tag {CANDIDATE} could not be removed: {error}"
        return ""

    def _smoke(self, url: str) -> Smoke:
        """With a token of the builder's own, whose audience is the service whatever the tag."""
        token = gcloud.run(
            [
                *("auth", "print-identity-token", f"--impersonate-service-account={self.place.builder}"),
                *(f"--audiences={self.place.service_url}", "--include-email"),
            ]
        )
        return Smoke(url, token.strip(), every=self.every)

    @property
    def _where(self) -> tuple[str, str]:
        return f"--region={self.place.region}", f"--project={self.place.project}"


def _beside(described: Service, revision: str, before: dict[str, int]) -> dict[str, Any]:
    """The document for a revision that gets no traffic, unless nothing else is there."""
    document, spec, template = described.document, described.document["spec"], described.template
    named = {**template, "metadata": {**template["metadata"], "name": revision}}
    own = {"revisionName": revision, "percent": 0 if before else 100, "tag": CANDIDATE}
    others = [{"revisionName": name, "percent": percent} for name, percent in before.items()]
    return {**document, "spec": {**spec, "template": named, "traffic": [*others, own]}}


def _share(shares: dict[str, int]) -> str:
    said = " and ".join(f"{name} serves {percent} %" for name, percent in shares.items())
    return said or "nothing serves"
