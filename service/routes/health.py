"""Liveness, readiness, metrics."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

import redis
from anyio import to_thread
from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from service.deps import State, StateDep
from service.schemas import Readiness

router = APIRouter(tags=["health"])
log = logging.getLogger(__name__)


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Say that the process answers; asks nothing else."""
    return {"status": "ok"}


@router.get(
    "/readyz",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "not ready; the same report"}},
)
async def readyz(
    state: StateDep,
    need: Annotated[Literal["segment", "compress"], Query(description="which work 200 stands for")] = "segment",
) -> Response:
    """Tell what works: the engine, Redis, the data folder, and how many workers are alive.

    200 as long as masks can be asked for, 503 otherwise. Without Redis, room or workers the status is `degraded`:
    models are served, while a request to compress is refused, or waits for a worker. With `need=compress` 503 tells
    that checkpoints are not taken in. An answer is up to a second old.
    """
    report = await state.readiness.report()
    return JSONResponse(report.as_dict(), 200 if getattr(report, need) else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(state: StateDep) -> Response:
    """Everything counted, in Prometheus's text format."""
    return Response(await to_thread.run_sync(_metrics, state), media_type=CONTENT_TYPE_LATEST)


def _metrics(state: State) -> bytes:
    waiting: int | None = None
    workers: int | None = None
    try:
        waiting, workers = state.jobs.waiting(), state.jobs.workers()
    except redis.RedisError as error:
        log.warning("redis: %s", error)
    return state.metrics.text(state.engine.stats(), waiting, workers)
