"""The one composition root: settings in, application out."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypedDict

import structlog
from fastapi import FastAPI
from opentelemetry.metrics import Meter

from app.artifacts import Artifacts
from app.containment import Contained
from app.database import preflight
from app.database.engine import open_engine
from app.database.session import Database, refuse_held_session
from app.errors import DatabaseRefused, DatabaseUnavailable, SettingsError
from app.evaluations.allowed import Allowed
from app.evaluations.billing import Billing
from app.evaluations.read import Reader
from app.evaluations.submit import Submissions
from app.execution import Executor
from app.exporters import Telemetry, open_telemetry
from app.inline import Inline
from app.leases import Leases
from app.ledger import Ledger, SweepTimes
from app.metrics import NO_METER, QueueFigures, RunnerFigures
from app.prices import Prices
from app.queue import open_queue
from app.redaction import Secrets
from app.retention import Retention
from app.runner.supervisor import Supervisor
from app.saved import Saved
from app.scratch import Scratch
from app.settings import Settings, children_environment, secrets
from app.web import auth, docs, evaluations, headers, health, problems, tasks
from app.web.identity import identity
from app.web.state import Services
from app.web.trace import IncomingTrace

log = structlog.get_logger(__name__)


class State(TypedDict):
    services: Services


def create_app(settings: Settings, telemetry: Telemetry | None = None) -> FastAPI:
    """Raises `SettingsError` where the settings would let strangers in. `telemetry`: instead of what the settings say."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        async with AsyncExitStack() as stack:
            try:
                services = await stack.enter_async_context(open_services(settings, telemetry))
                await first_look(services)
            except (DatabaseRefused, SettingsError) as refusal:
                app.state.refused = refusal
                raise
            app.state.leases = services.executor.leases
            yield {"services": services}

    app = FastAPI(
        title="Proctor",
        summary="Runs long AI agent evaluations and never loses one.",
        lifespan=lifespan,
        version="0.1.0",
        docs_url=None,
        redoc_url=None,
        # the spans that matter are our own, and its log of what it could not validate would quote it
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.refused = None
    app.state.leases = None
    tokens = settings.auth != "none"
    problems.install(app, tokens=tokens)
    # the last added comes first: headers on every answer, nothing read of a request before its caller is known
    app.add_middleware(problems.BodyLimit, limit=settings.max_body)
    app.add_middleware(IncomingTrace)
    app.add_middleware(auth.Guard, settings=settings, identity=identity(settings))
    app.add_middleware(headers.SafeHeaders)
    for router in (evaluations.router, tasks.router):
        app.include_router(router, responses=problems.responses(*((401, 403, 503) if tokens else (403,))))
    app.include_router(docs.router)
    app.include_router(health.router)
    return app


@asynccontextmanager
async def open_services(settings: Settings, given: Telemetry | None = None) -> AsyncIterator[Services]:
    async with AsyncExitStack() as stack:
        telemetry = given if given is not None else await stack.enter_async_context(open_telemetry(settings))
        tracer, meters = telemetry.tracer, telemetry.meter
        figures = RunnerFigures(meters)
        engine = await stack.enter_async_context(open_engine(settings, meters=meters))
        queue = await stack.enter_async_context(open_queue(settings))
        kept_secret = Secrets(secrets(settings))
        supervisor = await stack.enter_async_context(
            Supervisor(children_environment(), refuse_held_session, figures, kept_secret)
        )
        database = Database(engine, settings, meters)
        ledger = open_ledger(database, settings, meters)
        artifacts = Artifacts(settings.artifacts, settings.artifacts_patience)
        executor = Executor(
            ledger=ledger,
            queue=queue,
            artifacts=artifacts,
            saved=Saved(artifacts),
            scratch=await stack.enter_async_context(Scratch(settings.scratch)),
            supervisor=supervisor,
            contained=await stack.enter_async_context(Contained(settings)),
            leases=Leases(ledger, settings),
            settings=settings,
            tracer=tracer,
            figures=figures,
            secrets=kept_secret,
        )
        billing = Billing(Prices(settings.model_prices))
        allowed = Allowed(settings.allowed_tasks, settings.allowed_models, settings.queues, kept_secret)
        submissions, reader = Submissions(ledger, queue, allowed, billing, tracer), Reader(database)
        yield Services(
            settings=settings,
            database=database,
            executor=executor,
            submissions=submissions,
            reader=reader,
            inline=Inline(executor, submissions, reader),
            retention=Retention(
                ledger, artifacts, executor.saved, settings.keep_transcripts, settings.keep_checkpoints
            ),
            queue_figures=QueueFigures(meters),
        )


def open_ledger(database: Database, settings: Settings, meters: Meter = NO_METER) -> Ledger:
    sweep = SweepTimes(settings.sweep_after, settings.sweep_after_release, settings.sweep_after_enqueue)
    return Ledger(
        database,
        lease=settings.lease,
        worker=settings.worker,
        revision=settings.revision,
        sweep=sweep,
        meters=meters,
    )


async def first_look(services: Services) -> None:
    """Raises `DatabaseRefused`: no retry would help, so the service does not start. A database that is down makes it not
    ready, not dead: it may be back before the next push."""
    settings = services.settings
    auth.tell_admitted(settings)
    try:
        found = await preflight.look(services.database)
    except DatabaseRefused:
        raise
    except DatabaseUnavailable as error:
        log.warning("the database is not there yet", database=settings.database, reason=str(error))
    else:
        preflight.tell_revision(found)
        preflight.tell_budget(settings, found)
    log.info("serving", worker=settings.worker, revision=settings.revision)
