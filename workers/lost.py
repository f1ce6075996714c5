"""Which jobs are lost, told without the time of day.

RQ compares times that workers of several hosts wrote. Where a clock jumps forward it takes jobs for lost that run, and
has them run twice; where one jumps back, jobs that are lost wait until it has caught up. Here what counts is that a
sign of life does not change while this process looks, by a clock that never jumps.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from redis import Redis
from rq import Queue
from rq.job import Job
from rq.utils import parse_composite_key

LOCK_SECONDS = 30
"""Longest life of the lock on the upkeep of a queue. RQ's own outlives a worker that dies with it by 15 minutes."""
_PUT_BACK = "if redis.call('lrem', KEYS[1], 1, ARGV[1]) > 0 then redis.call('lpush', KEYS[2], ARGV[1]) end"


class Silence:
    """Remembers signs of life, and since when each is the same."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._since: dict[str, tuple[object, float]] = {}

    def of(self, signs: Mapping[str, object]) -> set[str]:
        """The names whose sign has been the same for at least ``patience`` seconds of looking."""
        now = time.monotonic()
        before = self._since
        self._since = {
            name: before[name] if name in before and before[name][0] == sign else (sign, now)
            for name, sign in signs.items()
        }
        return {name for name, (_, since) in self._since.items() if now - since >= self._patience}


class LostJobs:
    """Looks after a queue before RQ's own upkeep, which then does what it should: call it at every beat."""

    def __init__(self, connection: Redis, patience: float) -> None:
        self._connection = connection
        self._patience = patience
        self._running = Silence(patience)
        self._taken = Silence(patience)

    def mark(self, queue: Queue) -> None:
        """Let RQ see as lost what is lost, and nothing else."""
        lock: int = self._connection.ttl(queue.registry_cleaning_key)
        if lock > LOCK_SECONDS:
            self._connection.expire(queue.registry_cleaning_key, LOCK_SECONDS)
        running = self._mark_running(queue)
        self._put_back(queue, running)

    def _mark_running(self, queue: Queue) -> set[str]:
        registry = queue.started_job_registry
        entries = [entry.decode() for entry in self._connection.zrange(registry.key, 0, -1)]  # type: ignore[union-attr]
        ids = {entry: parse_composite_key(entry)[0] for entry in entries}
        beats = {entry: self._connection.hget(Job.key_for(ids[entry]), "last_heartbeat") for entry in entries}
        lost = self._running.of(beats)
        for entry in entries:
            until = 1.0 if entry in lost else time.time() + self._patience
            self._connection.zadd(registry.key, {entry: until}, xx=True)
        return set(ids.values())

    def _put_back(self, queue: Queue, running: set[str]) -> None:
        """Jobs that a worker took and died before it could say so."""
        key = queue.intermediate_queue.key
        taken = {entry.decode(): True for entry in self._connection.lrange(key, 0, -1)}  # type: ignore[union-attr]
        for job_id in self._taken.of({name: sign for name, sign in taken.items() if name not in running}):
            self._connection.eval(_PUT_BACK, 2, key, queue.key, job_id)
