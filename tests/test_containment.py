"""A worker knows what bounds its samples' memory, says so, and takes no more of them at once than there is memory for."""

import pytest

from app import containment
from app.cloud.doctor import check_sandbox
from app.containment import Contained, bounded
from app.runner.cgroup import Cgroup
from app.runner.messages import Bounds, Containment
from app.settings import Settings
from app.web import health
from app.web.health import Sandbox


@pytest.fixture(params=["control group", "watchdog"])
async def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, settings: Settings) -> Bounds:
    if request.param == "watchdog":
        monkeypatch.setattr(Cgroup, "make", classmethod(lambda cls, limits: None))
    elif (group := Cgroup.make(settings.sandbox_limits)) is None:
        pytest.skip("no control group can be made here")
    else:
        group.remove()
    bounds: Bounds = request.param
    return bounds


async def test_a_worker_says_what_bounds_its_samples_memory(mode: Bounds, settings: Settings) -> None:
    async with Contained(settings) as contained:
        found = await contained.here()
    assert found.bounds == mode
    assert (found.at_once is None) == (mode == "control group")
    assert health._sandbox(contained.known) == Sandbox(launcher="bubblewrap", memory=mode, at_once=found.at_once)
    (finding,) = await check_sandbox(settings)
    assert finding.ok
    assert ("a control group bounds" in finding.says) == (mode == "control group")
    assert (f"{found.at_once} samples at once" in finding.says) == (mode == "watchdog")


async def test_where_no_control_group_holds_them_as_many_at_once_as_there_is_memory_for(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = settings.model_copy(update={"sandbox_memory": 2**30, "sandbox_workspace": 2**28, "sandbox_tmp": 2**29})
    for machine, at_once in ((16 * 2**30, 6), (2**30, 1)):
        monkeypatch.setattr(containment, "machine_memory", lambda machine=machine: machine)
        found = bounded(Containment(launcher="cloud_run"), small)
        assert (found.bounds, found.at_once) == ("watchdog", at_once), "which has no control group"
