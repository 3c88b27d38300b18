"""Is it alive, and is it ready."""

from fastapi import APIRouter
from pydantic import BaseModel, Field

from app.database.preflight import look
from app.errors import DatabaseUnavailable
from app.runner.messages import Bounds, Containment, Launcher
from app.web.problems import ProblemResponse, problem, responses
from app.web.state import ServicesDep

router = APIRouter(prefix="/health", tags=["health"])


class Health(BaseModel):
    status: str = "ok"


class Sandbox(BaseModel):
    launcher: Launcher | None = Field(description="What starts agents' code; none if no launcher passed its probe.")
    memory: Bounds | None = Field(
        description="What bounds a sample's memory in sum: a control group, all of it; a watchdog, what can be seen."
    )
    at_once: int | None = Field(description="Samples that use a sandbox at once on this worker; null: no bound.")


class Readiness(Health):
    tables: str = Field(description="Revision of the database's tables.")
    ahead: bool = Field(description="They are newer than this version, and serve it too: a deploy is under way.")
    sandbox: Sandbox | None = Field(default=None, description="How agents' code is held; null while that is looked at.")


@router.get("/live")
async def live() -> Health:
    """The process answers. It says nothing of the database: a restart would not mend that."""
    return Health()


@router.get("/ready", response_model=Readiness, responses=responses(503))
async def ready(services: ServicesDep) -> Readiness | ProblemResponse:
    """It takes pushes: it is not about to end, and the database answers, lets it in and has tables that serve this
    version."""
    if services.executor.leases.draining:
        return problem(503, "Draining", "This worker is about to end. Others, or its successor, take what comes.")
    try:
        found = await look(services.database)
    except DatabaseUnavailable as error:
        return problem(503, error.title, str(error))
    return Readiness(tables=found.revision, ahead=found.ahead, sandbox=_sandbox(services.executor.contained.known))


def _sandbox(held: Containment | None) -> Sandbox | None:
    return Sandbox(launcher=held.launcher, memory=held.bounds, at_once=held.at_once) if held else None
