"""What the handlers work with, put together once in `app.main` and handed to them as typed dependencies."""

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from app.database.session import Database
from app.evaluations.read import Reader
from app.evaluations.submit import Submissions
from app.execution import Executor
from app.inline import Inline
from app.metrics import QueueFigures
from app.settings import Settings


@dataclass(frozen=True)
class Services:
    settings: Settings
    database: Database
    executor: Executor
    submissions: Submissions
    reader: Reader
    inline: Inline
    queue_figures: QueueFigures


def services(request: Request) -> Services:
    found: Services = request.state.services
    return found


ServicesDep = Annotated[Services, Depends(services)]


def caller() -> str:
    """Who asks. Until the service checks identities itself, everyone who may reach it is the same."""
    return "anonymous"


Caller = Annotated[str, Depends(caller)]
