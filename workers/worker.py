"""The RQ worker: it waits, starts one fresh process a job, watches it, and never touches a GPU itself."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import sys
import time

import redis
from rq import Queue
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer
from rq.worker import SpawnWorker

from hypersam.jobs import COMPRESS_QUEUE, JobBoard, connect
from hypersam.settings import Settings
from hypersam.store import open_at_start
from workers.lost import LostJobs

log = logging.getLogger(__name__)


class CompressWorker(SpawnWorker):
    """An RQ worker whose job process is ``python -m workers.horse``.

    RQ's own spawn puts the connection, password and all, on the command line, where every user of the
    machine can read it; here the settings travel in the environment. Signs of life are frequent, so that the
    job of a worker that was killed is taken up by another one in seconds, not minutes.
    """

    def __init__(self, queues: list[Queue] | list[str], name: str | None = None, **options: object) -> None:
        super().__init__(queues, name, **options)  # type: ignore[arg-type]
        self.environment: dict[str, str] = {}
        self._lost: LostJobs | None = None
        self._looked_after = -math.inf

    def fork_work_horse(self, job: Job, queue: Queue) -> None:
        """Start the process that runs ``job``."""
        assert self.execution is not None
        environment = {
            **os.environ,
            **self.environment,
            "RQ_WORKER_ID": self.name,
            "RQ_JOB_ID": job.id,
            "RQ_EXECUTION_ID": self.execution.id,
            "RQ_QUEUE": queue.name,
            "HORSE_PARENT": str(os.getpid()),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        command = [sys.executable, "-m", "workers.horse"]
        # A process group of its own, so that stopping the job stops all that it started.
        self._horse_pid = os.posix_spawn(sys.executable, command, environment, setpgroup=0)

    def kill_horse(self, sig: signal.Signals = signal.SIGKILL) -> None:
        """Kill the job's process. Without one this must do nothing: process 0 would be our own group."""
        if self._horse_pid:
            super().kill_horse(sig)

    def get_heartbeat_ttl(self, job: Job, working_time: float = 0.0) -> int:
        """Return the seconds of silence after which a job counts as lost."""
        return 3 * int(self.job_monitoring_interval)

    def maintain_heartbeats(self, job: Job, execution: Execution) -> None:
        """Give a sign of life. While Redis is away the job goes on: it may be back before the job has ended."""
        try:
            super().maintain_heartbeats(job, execution)
        except (redis.ConnectionError, redis.TimeoutError) as error:
            log.warning("no sign of life of job %s could be given: %s", job.id, error)

    @property
    def should_run_maintenance_tasks(self) -> bool:
        """Whether the queue is to be looked after again, whatever the time of day does."""
        return time.monotonic() - self._looked_after > self.maintenance_interval

    def clean_registries(self) -> None:
        """Find the jobs that are lost, and do what RQ does besides."""
        if self._lost is None:
            self._lost = LostJobs(self.connection, 3 * self.job_monitoring_interval)
        for queue in self.queues:
            self._lost.mark(queue)
        super().clean_registries()  # type: ignore[no-untyped-call]
        self._looked_after = time.monotonic()


def build_worker(settings: Settings) -> CompressWorker:
    """Return a worker for these settings; its ``work()`` blocks until a signal stops it."""
    connection = connect(settings)
    beat = settings.worker_heartbeat
    worker = CompressWorker(
        [Queue(COMPRESS_QUEUE, connection=connection, serializer=JSONSerializer)],
        connection=connection,
        serializer=JSONSerializer,
        job_monitoring_interval=beat,
        maintenance_interval=beat,
        worker_ttl=15 + beat,  # RQ waits 15 s less than this for a job, then gives a sign of life
        log_job_description=True,
    )
    worker.environment = settings.environment()
    return worker


def run(settings: Settings) -> None:
    """Sweep what dead jobs left, then work until a signal comes."""
    with contextlib.closing(connect(settings)) as connection:
        JobBoard(connection, open_at_start(settings), settings).sweep()
    build_worker(settings).work(logging_level=settings.log_level.upper())
