"""Is it alive, and is it ready."""

from fastapi import APIRouter
from pydantic import BaseModel
from sqlalchemy import text

from app.database.migrate import newest_revision
from app.errors import DatabaseUnavailable
from app.web.problems import ProblemResponse, problem, responses
from app.web.state import ServicesDep

router = APIRouter(prefix="/health", tags=["health"])


class Health(BaseModel):
    status: str = "ok"


@router.get("/live")
async def live() -> Health:
    """The process answers. It says nothing of the database: a restart would not mend that."""
    return Health()


@router.get("/ready", response_model=Health, responses=responses(503))
async def ready(services: ServicesDep) -> Health | ProblemResponse:
    """The database answers and has the tables of this version."""
    try:
        (row,) = await services.database.run(
            text("SELECT to_regclass('alembic_version') IS NOT NULL AS there"), patience=0
        )
        if row.there:
            (row,) = await services.database.run(text("SELECT version_num FROM alembic_version"), patience=0)
    except DatabaseUnavailable as error:
        return problem(503, error.title, str(error))
    current, newest = getattr(row, "version_num", "none"), newest_revision()
    if current < newest:
        return problem(
            503, "Not migrated", f"The database is at revision {current}, not {newest}: run `proctor migrate`."
        )
    return Health()
