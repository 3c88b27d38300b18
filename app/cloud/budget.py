"""The arithmetic of a deployment: what must fit what, before it is deployed.

Sources: DESIGN's "Scale" and "The clock of one push"; `make bench` for the memory of each part (README, "What it costs").
"""

from collections.abc import Iterator

from app.cloud.service import Service
from app.errors import ProctorError
from app.settings import PREFIX, Settings

MIB = 2**20

PARENT = (113 + 40) * MIB
"""Bytes of the service and its forkserver. Measured by `make bench`."""

CHILD = 32 * MIB
"""Bytes of one child, shared pages counted in part. Measured by `make bench`."""

API_SLOTS = 1
"""Requests of each instance that the queue leaves to people and the sweeper. Ours."""

CONNECTIONS = 1000
"""AlloyDB's max_connections. Source: its default. A start-up log and `proctor doctor` hold the real one against it."""


def concurrent_dispatches(service: Service) -> int:
    """The queue's: as many pushes as all instances take, less what the API needs."""
    return service.max_instances * (service.concurrency - API_SLOTS)


class DoesNotFit(ProctorError):
    """The message names each number."""

    title = "Does not fit"


def check(service: Service) -> None:
    """Raises `DoesNotFit`."""
    if found := list(problems(service, concurrent_dispatches(service))):
        raise DoesNotFit(f"service.yaml: {' '.join(found)}")


def problems(service: Service, dispatches: int) -> Iterator[str]:
    """What does not fit, one sentence each. `dispatches`: max_concurrent_dispatches of all queues together."""
    connections = _number(service, "pool_size") + _number(service, "max_overflow")
    if service.concurrency != connections:
        yield f"containerConcurrency is {service.concurrency}, pool_size + max_overflow {connections}: they must be equal."
    if service.timeout <= (deadline := _number(service, "dispatch_deadline")):
        yield f"timeoutSeconds is {service.timeout}: it must be above the dispatch deadline of {deadline} s."
    if (told := _number(service, "max_instances")) != service.max_instances:
        yield f"maxScale is {service.max_instances}, {PREFIX}MAX_INSTANCES {told}: they must be equal."
    if (pushes := service.max_instances * service.concurrency) < dispatches:
        yield f"The queue dispatches {dispatches} at once, the instances take {pushes}: the rest would be answered 429."
    if (needed := 2 * service.max_instances * connections) > CONNECTIONS:
        yield f"Two revisions' instances want {needed} connections, AlloyDB grants {CONNECTIONS}: lower maxScale."
    files = _number(service, "sandbox_workspace") + _number(service, "sandbox_tmp")
    if (memory := PARENT + service.concurrency * (CHILD + files)) > service.memory:
        yield (
            f"{service.concurrency} pushes and their files want {memory // MIB} MiB, an instance has"
            f" {service.memory // MIB} MiB: raise resources.limits.memory, or lower PROCTOR_SANDBOX_WORKSPACE."
        )


def _number(service: Service, name: str) -> int:
    """A setting as the service will have it."""
    told = service.setting(name)
    return int(float(told)) if told is not None else int(Settings.model_fields[name].default)
