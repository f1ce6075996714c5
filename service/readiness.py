"""What of the service works right now, asked often and answered cheaply.

Each part is asked in a thread of its own within ``PATIENCE``, and an answer is kept for ``KEPT``. A part that hangs,
such as a network disk, is not asked a second time while the first question waits: it costs one thread and no more.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis
from anyio import CapacityLimiter, Lock, create_task_group, move_on_after, to_thread

from hypersam.doctor import probe_connection
from hypersam.engine import Engine
from hypersam.errors import HypersamError
from hypersam.jobs import JobBoard
from hypersam.settings import Settings
from hypersam.store import ArtifactStore

log = logging.getLogger(__name__)

KEPT = 1.0  # seconds
PATIENCE = 3.0  # seconds; Redis's own time-outs are shorter


@dataclass(frozen=True)
class Report:
    """The state of each part: ``ok``, or what is wrong with it. Counts are None where Redis did not tell."""

    engine: str
    redis: str
    store: str
    workers: int | None
    jobs_waiting: int | None
    readable: bool

    @property
    def segment(self) -> bool:
        """Whether masks can be asked for: by the engine, of models that can be read. Redis has no part in that."""
        return self.engine == "ok" and self.readable

    @property
    def compress(self) -> bool:
        """Whether a checkpoint is taken in. Without a worker its job waits for one."""
        return self.engine != "closing" and self.redis == "ok" and self.store == "ok"

    def as_dict(self) -> dict[str, Any]:
        """Return the body of ``GET /readyz``."""
        whole = self.segment and self.compress and bool(self.workers)
        return {
            "status": "ok" if whole else "degraded" if self.segment else "not ready",
            "ready": self.segment,
            "can": {"segment": self.segment, "compress": self.compress},
            "engine": self.engine,
            "redis": self.redis,
            "store": self.store,
            "workers": self.workers,
            "jobs_waiting": self.jobs_waiting,
        }


class Readiness:
    """Asks the parts of one application."""

    def __init__(self, settings: Settings, store: ArtifactStore, engine: Engine) -> None:
        connection = probe_connection(settings)
        self._board = None if connection is None else JobBoard(connection, store, settings)
        self._store = store
        self._engine = engine
        self._one_at_a_time = Lock()
        self._limits = {"redis": CapacityLimiter(1), "store": CapacityLimiter(1)}
        self._report: Report | None = None
        self._asked = float("-inf")

    async def report(self) -> Report:
        """Return what is known and no older than ``KEPT``."""
        async with self._one_at_a_time:
            if self._report is None or time.monotonic() - self._asked >= KEPT:
                self._report = await self._ask()
                self._asked = time.monotonic()
        return self._report

    def close(self) -> None:
        """Close the connection to Redis."""
        if self._board is not None:
            self._board.connection.close()

    async def _ask(self) -> Report:
        answers: dict[str, Any] = {
            "redis": (f"did not answer within {PATIENCE:.0f} s", None, None),
            "store": (f"did not answer within {PATIENCE:.0f} s", False),
        }

        async def ask(part: str, question: Callable[[], Any]) -> None:
            with move_on_after(PATIENCE):
                answers[part] = await to_thread.run_sync(question, limiter=self._limits[part], abandon_on_cancel=True)

        async with create_task_group() as group:
            group.start_soon(ask, "redis", self._ask_redis)
            group.start_soon(ask, "store", self._ask_store)
        (redis_state, workers, waiting), (store_state, readable) = answers["redis"], answers["store"]
        return Report(self._engine.state(), redis_state, store_state, workers, waiting, readable)

    def _ask_redis(self) -> tuple[str, int | None, int | None]:
        if self._board is None:
            return "is not configured", None, None
        try:
            workers, waiting = self._board.workers(), self._board.waiting()
        except (redis.RedisError, OSError) as error:
            log.warning("redis: %s", error)
            return "does not answer", None, None
        try:
            self._board.connection.set("hypersam:ready", 1, ex=60)
        except (redis.RedisError, OSError) as error:  # its memory or its disk is full, or it is a replica
            log.warning("redis: %s", error)
            return "takes no writes", workers, waiting
        return "ok", workers, waiting

    def _ask_store(self) -> tuple[str, bool]:
        try:
            with os.scandir(self._store.registrations) as entries:
                next(entries, None)
        except OSError as error:
            log.warning("store: %s", error)
            return "cannot be read", False
        try:
            self._store.check()
        except (OSError, HypersamError) as error:
            log.warning("store: %s", error)
            return "cannot be written", True
        return "ok", True
