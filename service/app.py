"""The application: ``create_app(settings)`` and nothing at import time."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import TypedDict

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from hypersam import doctor
from hypersam.engine import Engine
from hypersam.jobs import JobBoard, connect
from hypersam.settings import Settings
from hypersam.store import open_store
from service import errors, page
from service.deps import State
from service.guard import Guard, secured
from service.last_resort import LastResort
from service.metrics import MeasureRequests, Metrics
from service.openapi import document_of
from service.readiness import Readiness
from service.request_ids import RequestIds
from service.routes import compress, health, jobs, label_studio, models, osam, segment, variants
from service.schemas import Problem
from service.slow import BodyPace

PICTURES_AT_ONCE = 2  # being decoded: each may take hundreds of MB, and a core
_DESCRIPTION = "Compress Segment Anything checkpoints and serve them from their compressed weights."
_LATER = {
    "Retry-After": {
        "description": "with 429 and 503: seconds after which to try again",
        "schema": {"type": "integer", "minimum": 1},
    }
}


class _Lifespan(TypedDict):
    hypersam: State


def create_app(settings: Settings) -> FastAPI:
    """Return the service for these settings. Redis and the engine are opened when it starts, not here.

    Raises BadSettings for a file of keys that cannot be used.
    """
    metrics = Metrics()
    # Here, not in a middleware, which is made at the first event: without the keys that it is to have nothing starts.
    keys = settings.keys()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[_Lifespan]:
        store = await to_thread.run_sync(open_store, settings)
        connection = connect(settings)
        engine = Engine(settings)
        board = JobBoard(connection, store, settings)
        pictures = CapacityLimiter(PICTURES_AT_ONCE)
        readiness = Readiness(settings, store, engine)
        try:
            doctor.log_at_start(settings, "service")
            await to_thread.run_sync(board.sweep)
            yield {"hypersam": State(settings, connection, store, board, engine, metrics, readiness, pictures)}
        finally:
            await to_thread.run_sync(engine.close)
            await to_thread.run_sync(connection.close)
            readiness.close()

    app = FastAPI(
        title="hypersam",
        version=_version(),
        description=_DESCRIPTION,
        docs_url=None,  # the framework's own pages load scripts from other hosts; service.page has one that does not
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,  # such a redirect would lead to whatever host the client named
        responses={status: {"model": Problem, "headers": _LATER} for status in ("4XX", "5XX")},
    )
    app.openapi = lambda: document_of(app, secured(keys))  # type: ignore[method-assign]
    errors.install(app)
    app.add_middleware(Guard, keys=keys, rate_limit=settings.rate_limit)
    app.add_middleware(LastResort)
    app.add_middleware(MeasureRequests, metrics=metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=[
                "Authorization",
                "X-API-Key",
                "Content-Type",
                "Last-Event-ID",
                "X-Request-ID",
                "Range",
                "If-Range",
                "If-None-Match",
            ],
            expose_headers=[
                "Location",
                "Retry-After",
                "Server-Timing",
                "X-Image-Id",
                "X-Request-Id",
                "ETag",
                "Accept-Ranges",
                "Content-Range",
                "Content-Disposition",
            ],
        )
    app.add_middleware(BodyPace, settings=settings)
    app.add_middleware(RequestIds)  # around the others: what they log has its id
    for module in (compress, jobs, models, segment, osam, label_studio, variants, health):
        app.include_router(module.router)
    page.install(app)
    return app


def _version() -> str:
    try:
        return version("hypersam")
    except PackageNotFoundError:  # run from a folder that is not installed
        return "0"
