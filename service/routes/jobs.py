"""The jobs: look, watch, cancel."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
import redis
from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse

from hypersam.errors import UnknownJob
from hypersam.jobs import JobView
from service.deps import State, StateDep
from service.schemas import Job, Jobs

log = logging.getLogger(__name__)

router = APIRouter(prefix="/jobs", tags=["jobs"])

WATCH_EVERY = 0.25  # seconds
# OpenAPI 3.1 has no word for the parts of a stream; its tools read this as one event.
_EVENT = {
    "type": "object",
    "description": "One of the events; lines between them that begin with a colon keep the connection open.",
    "required": ["id", "event", "data"],
    "properties": {
        "id": {"type": "string", "description": "for Last-Event-ID"},
        "event": {"const": "job"},
        "data": {
            "type": "string",
            "description": "the job, as GET /jobs/{job_id} gives it",
            "contentMediaType": "application/json",
            "contentSchema": {"$ref": "#/components/schemas/Job"},
        },
    },
}


@router.get("", response_model=Jobs)
async def list_jobs(state: StateDep, limit: Annotated[int, Query(ge=1, le=1000)] = 100) -> Jobs:
    """List the newest jobs, newest first."""
    views = await to_thread.run_sync(state.jobs.list, limit)
    return Jobs(jobs=[Job.of(view) for view in views])


@router.get("/{job_id}", response_model=Job)
async def get_job(job_id: str, state: StateDep) -> Job:
    """Tell how far a job is."""
    return Job.of(await to_thread.run_sync(state.jobs.get, job_id))


@router.delete("/{job_id}", response_model=Job, responses={204: {"description": "an ended job was forgotten"}})
async def delete_job(job_id: str, state: StateDep) -> Response | Job:
    """Cancel a job that waits or runs (a running one stops within moments); forget one that has ended."""
    view = await to_thread.run_sync(state.jobs.cancel, job_id)
    return Response(status_code=204) if view is None else Job.of(view)


@router.get(
    "/{job_id}/events",
    response_class=EventSourceResponse,
    responses={
        200: {"content": {"text/event-stream": {"schema": _EVENT}}},
        204: {"description": "the last event seen was the last there will be"},
    },
)
async def watch_job(
    job_id: str, request: Request, state: StateDep, last_event_id: Annotated[str | None, Header()] = None
) -> Response:
    """Send the job as server-sent events named ``job``, whenever it changes, until it has ended.

    A client that comes back with Last-Event-ID gets only what it does not know yet; 204 tells it that the
    last event it saw was the last there will be.
    """
    first = await to_thread.run_sync(state.jobs.get, job_id)
    if first.state.final and first.version == last_event_id:
        return Response(status_code=204)
    stopping = anyio.Event()  # set when the service stops: the stream then ends, and is not cut off
    events = _events(request, state, first, last_event_id, stopping)
    return EventSourceResponse(events, ping=15, shutdown_event=stopping, shutdown_grace_period=1)


async def _events(
    request: Request, state: State, view: JobView, seen: str | None, stopping: anyio.Event
) -> AsyncIterator[ServerSentEvent]:
    silent = False
    while True:
        if view.version != seen:
            seen = view.version
            yield ServerSentEvent(Job.of(view).model_dump_json(), event="job", id=seen)
        if view.state.final or await request.is_disconnected():
            return
        with anyio.move_on_after(WATCH_EVERY):
            await stopping.wait()
            return
        try:
            view = await to_thread.run_sync(state.jobs.get, view.id)
            silent = False
        except UnknownJob:  # deleted while it was watched
            return
        except redis.RedisError as error:
            # It comes back, and the job goes on meanwhile. Whoever watches has seen the last that is known.
            if not silent:
                log.warning("redis, while a job is watched: %s", error)
            silent = True
