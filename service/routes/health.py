"""Liveness, readiness, metrics."""

from __future__ import annotations

import logging
from typing import Any

import redis
from anyio import to_thread
from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from hypersam.errors import HypersamError
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
async def readyz(state: StateDep) -> Response:
    """Tell whether Redis answers and the data folder can be written, and how many workers are alive.

    503 unless both hold. Zero workers is no failure: models are served without any, jobs wait.
    """
    report = await to_thread.run_sync(_report, state)
    return JSONResponse(report, 200 if report["ready"] else 503)


@router.get("/metrics", include_in_schema=False)
async def metrics(state: StateDep) -> Response:
    """Everything counted, in Prometheus's text format."""
    return Response(await to_thread.run_sync(_metrics, state), media_type=CONTENT_TYPE_LATEST)


def _report(state: State) -> dict[str, Any]:
    report: dict[str, Any] = {"redis": "ok", "store": "ok", "workers": None, "jobs_waiting": None}
    try:
        state.redis.ping()
        report["workers"], report["jobs_waiting"] = state.jobs.workers(), state.jobs.waiting()
    except redis.RedisError as error:
        log.warning("redis: %s", error)
        report["redis"] = "does not answer"
    try:
        state.store.check()
    except (OSError, HypersamError) as error:
        log.warning("store: %s", error)
        report["store"] = "cannot be written"
    report["ready"] = report["redis"] == "ok" and report["store"] == "ok"
    return report


def _metrics(state: State) -> bytes:
    waiting: int | None = None
    workers: int | None = None
    try:
        waiting, workers = state.jobs.waiting(), state.jobs.workers()
    except redis.RedisError as error:
        log.warning("redis: %s", error)
    return state.metrics.text(state.engine.stats(), waiting, workers)
