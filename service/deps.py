"""What a request's handler needs: one State an application, made and closed by its lifespan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

from anyio import CapacityLimiter
from fastapi import Depends, Request
from redis import Redis

from hypersam.engine import Engine
from hypersam.jobs import JobBoard
from hypersam.settings import Settings
from hypersam.store import ArtifactStore
from service.metrics import Metrics
from service.readiness import Readiness


@dataclass(frozen=True)
class State:
    """Everything that lives as long as the application."""

    settings: Settings
    redis: Redis
    store: ArtifactStore
    jobs: JobBoard
    engine: Engine
    metrics: Metrics
    readiness: Readiness
    pictures: CapacityLimiter  # for the threads that take a picture apart


async def state_of(request: Request) -> State:
    """Return the application's state. A coroutine, since plain functions are called on a thread, request by request."""
    return cast(State, request.state.hypersam)


StateDep = Annotated[State, Depends(state_of)]
