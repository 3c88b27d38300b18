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
from app.retention import Retention
from app.settings import Settings


@dataclass(frozen=True)
class Services:
    settings: Settings
    database: Database
    executor: Executor
    submissions: Submissions
    reader: Reader
    inline: Inline
    retention: Retention
    queue_figures: QueueFigures


def services(request: Request) -> Services:
    found: Services = request.state.services
    return found


ServicesDep = Annotated[Services, Depends(services)]


def caller(request: Request) -> str:
    """Who asks: an e-mail in small letters, or `anonymous` where callers are not known (see `app.web.auth`)."""
    found: str = request.state.caller
    return found


Caller = Annotated[str, Depends(caller)]
