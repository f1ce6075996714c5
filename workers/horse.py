"""``python -m workers.horse``: the process of one job, started by CompressWorker and by nobody else."""

from __future__ import annotations

import os
import signal
import sys

from rq import Queue
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer

from hypersam.embedded_redis import die_with_parent
from hypersam.jobs import connect
from hypersam.settings import Settings
from workers.worker import CompressWorker


def main() -> None:
    """Rebuild the worker's view of the job from Redis and run it. Ends the process."""
    # If the worker is killed nobody can report on this job: another worker will retry it from the start.
    die_with_parent(signal.SIGKILL)
    if os.getppid() != int(os.environ["HORSE_PARENT"]):
        sys.exit(1)
    settings = Settings()
    connection = connect(settings)
    key = CompressWorker.redis_worker_namespace_prefix + os.environ["RQ_WORKER_ID"]
    worker = CompressWorker.find_by_key(key, connection=connection, serializer=JSONSerializer)
    if worker is None:
        sys.exit(1)
    worker.job_monitoring_interval = settings.worker_heartbeat
    job = Job.fetch(os.environ["RQ_JOB_ID"], connection=connection, serializer=JSONSerializer)
    queue = Queue(os.environ["RQ_QUEUE"], connection=connection, serializer=JSONSerializer)
    execution = Execution.fetch(os.environ["RQ_EXECUTION_ID"], job.id, connection=connection)
    worker.execution = execution
    worker.main_work_horse(job, queue)


if __name__ == "__main__":
    main()
