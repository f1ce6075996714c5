"""Compression jobs: what identifies one, how it is queued, watched, cancelled and forgotten.

The service and the workers meet here. RQ holds the truth about a job's life; ``job.meta`` holds what the
worker tells about its progress. Functions are named by strings, so that this module imports no worker.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from redis import Redis, RedisError
from redis.exceptions import LockError
from rq import Queue, Retry, worker_registration
from rq.exceptions import DuplicateJobError, InvalidJobOperation, NoSuchJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.utils import utcparse

from hypersam.errors import BadSettings, NameTaken, Overloaded, Unavailable, UnknownJob
from hypersam.job_spec import JobSpec, JobState
from hypersam.settings import Settings
from hypersam.store import ArtifactStore

log = logging.getLogger(__name__)

COMPRESS_QUEUE = "hypersam-compress"
COMPRESS_FUNCTION = "workers.tasks.compress_checkpoint"
_PREFIX = "hypersam:"
_NAMES = _PREFIX + "names"  # hash: model name -> id of the job that claims it
_INDEX = _PREFIX + "jobs"  # sorted set: job ids by the time they were asked for
_LOCK = _PREFIX + "lock"
_LOST = ("Work-horse terminated unexpectedly", "AbandonedJobError", "stuck in intermediate queue")


@dataclass(frozen=True)
class JobView:
    """What can be told about a job. Times are ISO 8601 in UTC, ``eta_s`` is seconds."""

    id: str
    state: JobState
    name: str
    codec: str
    source_sha256: str
    progress: float
    stage: str
    eta_s: float | None
    attempt: int
    result: Mapping[str, Any] | None
    error: Mapping[str, str] | None
    created_at: str | None
    started_at: str | None
    ended_at: str | None
    sequence: int  # grows with every report of the worker

    @property
    def version(self) -> str:
        """Differs whenever something that a watcher wants to know has changed."""
        return f"{self.attempt}-{self.sequence}-{self.state}"


_STATES = {
    JobStatus.STARTED: JobState.RUNNING,
    JobStatus.FINISHED: JobState.SUCCEEDED,
    JobStatus.FAILED: JobState.FAILED,
    JobStatus.STOPPED: JobState.CANCELLED,
    JobStatus.CANCELED: JobState.CANCELLED,
}


def connect(settings: Settings) -> Redis:
    """Return a client for the Redis of these settings. Nothing is sent yet."""
    if settings.redis_url is None:
        raise Unavailable("no Redis: give HYPERSAM_REDIS_URL, or run `hypersam serve`, which starts one")
    return client_of(settings.redis_url, socket_connect_timeout=2, socket_timeout=10, health_check_interval=30)


def client_of(url: str, **options: Any) -> Redis:
    """Return a client for an address. Raises BadSettings, which repeats nothing of it: it may hold a password."""
    try:
        client: Redis = Redis.from_url(url, **options)
    except ValueError:  # tells what it took for a port: with an unescaped / in a password, the password's beginning
        raise BadSettings(
            "HYPERSAM_REDIS_URL is no redis://, rediss:// or unix:// address; in a password / is written %2F, # %23, "
            "? %3F and @ %40"
        ) from None
    return client


class JobBoard:
    """Submit, watch and cancel jobs. Blocks on Redis and the disk: call it from a thread."""

    def __init__(self, connection: Redis, store: ArtifactStore, settings: Settings) -> None:
        self.connection = connection
        self.store = store
        self.settings = settings
        self.queue = self.queue_of(connection)

    def submit(self, spec: JobSpec, take_upload: Callable[[], object]) -> JobView:
        """Queue ``spec`` unless it is queued, running or done already; return the job either way.

        ``take_upload`` is called before a new job is queued and puts the upload where the worker looks for
        it. Raises ``NameTaken`` when the name stands for, or is claimed by, another request.
        """
        with self._exclusive():
            made = spec.dry_run or self._name_is_free(spec)
            job = self._fetch(spec.key)
            if job is not None:
                view = self._view(job)
                if not view.state.final or (view.state is JobState.SUCCEEDED and made):
                    return view
                job.delete()
            if self.queue.count >= self.settings.max_waiting_jobs:
                raise Overloaded(f"{self.queue.count} jobs wait already; try again later")
            take_upload()
            for digest in spec.uploads:
                self.store.touch_upload(digest)
            self.connection.delete(self._cancel_key(spec.key), self._attempts_key(spec.key))
            if not spec.dry_run:
                self.connection.hset(_NAMES, spec.name, spec.key)
            for digest in spec.uploads:
                self.connection.sadd(self._users_key(digest), spec.key)
            try:
                job = self.queue.enqueue(
                    COMPRESS_FUNCTION,
                    args=(asdict(spec),),
                    job_id=spec.key,
                    unique=True,
                    description=f"{'plan' if spec.dry_run else 'compress'} {spec.name}",
                    job_timeout=self.settings.job_timeout,
                    result_ttl=self.settings.job_retention,
                    failure_ttl=self.settings.job_retention,
                    retry=Retry(max=self.settings.job_retries) if self.settings.job_retries else None,
                    meta={"spec": asdict(spec)},
                )
            except DuplicateJobError:  # only after the lock ran out in a very slow moment
                job = Job.fetch(spec.key, connection=self.connection, serializer=JSONSerializer)
            assert job.created_at is not None
            self.connection.zadd(_INDEX, {spec.key: job.created_at.timestamp()})
            return self._view(job)

    def _name_is_free(self, spec: JobSpec) -> bool:
        """Whether the very model is there already; raises ``NameTaken`` where its name stands for another."""
        record = self.store.find(spec.name)
        if record is not None and record.request != spec.key:
            raise NameTaken(
                f"the name {spec.name!r} belongs to a model made from other content, with other options or of a file "
                "whose name says that it is another variant; delete that model or choose another name"
            )
        claim: Any = self.connection.hget(_NAMES, spec.name)
        if claim is not None and claim.decode() != spec.key and self._active(claim.decode()):
            raise NameTaken(f"job {claim.decode()} is making another model of the name {spec.name!r}")
        return record is not None

    def get(self, job_id: str) -> JobView:
        """Return one job, or raise ``UnknownJob``."""
        job = self._fetch(job_id)
        if job is None:
            raise UnknownJob(f"no job has the id {job_id[:64]!r}")
        return self._view(job)

    def list(self, limit: int = 100) -> list[JobView]:
        """Return the newest jobs that are still known, newest first."""
        entries: Any = self.connection.zrevrange(_INDEX, 0, max(limit, 1) - 1)
        ids = [entry.decode() for entry in entries]
        jobs = Job.fetch_many(ids, connection=self.connection, serializer=JSONSerializer)
        gone = [job_id for job_id, job in zip(ids, jobs, strict=True) if job is None]
        if gone:
            self.connection.zrem(_INDEX, *gone)
        return [self._view(job) for job in jobs if job is not None]

    def cancel(self, job_id: str) -> JobView | None:
        """Cancel an active job and return it; forget one that has ended and return None."""
        job = self._fetch(job_id)
        if job is None:
            raise UnknownJob(f"no job has the id {job_id[:64]!r}")
        state = self._view(job).state
        if state.final:
            job.delete()
            self.connection.zrem(_INDEX, job_id)
            return None
        # The flag also stops a job that a worker takes up in this very moment.
        self.connection.set(self._cancel_key(job_id), 1, ex=self.settings.job_timeout)
        if state is JobState.QUEUED:
            with contextlib.suppress(InvalidJobOperation):
                job.cancel()
            self.release(JobSpec(**job.args[0]))
        view = self.get(job_id)
        return view if view.state.final else replace(view, stage="cancelling")

    def begin(self, job_id: str) -> int:
        """Count one more attempt at a job and return its number. RQ's own record forgets it on a retry."""
        key = self._attempts_key(job_id)
        attempt: Any = self.connection.incr(key)
        self.connection.expire(key, self.settings.job_retention)
        return int(attempt)

    def cancel_requested(self, job_id: str) -> bool:
        """Whether somebody wants the job to stop."""
        return bool(self.connection.exists(self._cancel_key(job_id)))

    def release(self, spec: JobSpec) -> None:
        """Say that a job is through with its upload, which goes unless another job wants it."""
        if self.settings.keep_uploads:
            return
        with self._exclusive():
            for digest in spec.uploads:
                users = self._users_key(digest)
                self.connection.srem(users, spec.key)
                members: Any = self.connection.smembers(users)
                if not any(self._active(member.decode()) for member in members):
                    self.connection.delete(users)
                    self.store.remove_upload(digest)

    def sweep(self) -> None:
        """Delete what nobody wants from the store: old uploads that no job needs, what dead jobs left.

        With ``keep_uploads``, and while Redis cannot tell which are needed, every whole upload stays.
        """
        age = self.settings.upload_retention
        if self.settings.keep_uploads:
            self.store.sweep(age)
            return
        try:
            with self._exclusive():  # so that no job refers to an upload between the question and the deletion
                self.store.sweep(age, self._wanted_uploads())
        except (RedisError, Unavailable) as error:
            log.warning("old uploads stay for now, the queue does not tell which are needed: %s", error)
            self.store.sweep(age)

    def _wanted_uploads(self) -> set[str]:
        """Return the sha256 of each upload that a job which has not ended refers to."""
        entries: Any = self.connection.zrange(_INDEX, 0, -1)
        ids = [entry.decode() for entry in entries]
        jobs = Job.fetch_many(ids, connection=self.connection, serializer=JSONSerializer)
        return {
            str(job.meta.get("spec", {}).get(field) or "")
            for field in ("source_sha256", "decoder_sha256")
            for job in jobs
            if job is not None and not _STATES.get(job.get_status(refresh=False), JobState.QUEUED).final
        }

    def waiting(self) -> int:
        """How many jobs are queued."""
        return int(self.queue.count)

    def workers(self) -> int:
        """How many workers listen to the queue and have given a sign of life lately."""
        return self.alive_workers(self.queue, self.settings)

    @staticmethod
    def queue_of(connection: Redis) -> Queue:
        """Return the queue that workers listen to."""
        return Queue(COMPRESS_QUEUE, connection=connection, serializer=JSONSerializer)

    @staticmethod
    def alive_workers(queue: Queue, settings: Settings, host: str | None = None) -> int:
        """Count as ``workers`` does, without a store; of one host only if its name is given."""
        now, late = datetime.now(UTC).timestamp(), 3 * settings.worker_heartbeat + 5
        # Not by Worker.all(), which would raise the time-outs of this connection to minutes.
        keys = worker_registration.get_keys(queue=queue)
        rows: list[Any] = [queue.connection.hmget(key, "last_heartbeat", "hostname") for key in keys]
        return sum(
            abs(now - utcparse(beat.decode()).timestamp()) < late and host in (None, (name or b"").decode())
            for beat, name in rows
            if beat is not None
        )

    def _fetch(self, job_id: str) -> Job | None:
        try:
            return Job.fetch(job_id, connection=self.connection, serializer=JSONSerializer)
        except (NoSuchJobError, ValueError, TypeError):
            return None

    def _active(self, job_id: str) -> bool:
        job = self._fetch(job_id)
        return job is not None and not self._view(job).state.final

    def _view(self, job: Job) -> JobView:
        meta = job.meta
        state = _STATES.get(job.get_status(refresh=False), JobState.QUEUED)
        error: Mapping[str, str] | None = None
        if state is JobState.FAILED:
            error = meta.get("error") or _unexplained(job)
            if error.get("code") == "cancelled":
                state = JobState.CANCELLED
        if state is JobState.CANCELLED:
            error = {"code": "cancelled", "message": "the job was cancelled"}
        running = state is JobState.RUNNING
        spec = meta.get("spec", {})
        told = float(meta.get("progress", 0.0))
        progress = {JobState.SUCCEEDED: 1.0, JobState.QUEUED: 0.0}.get(state, told)
        return JobView(
            id=job.id,
            state=state,
            name=spec.get("name", ""),
            codec=spec.get("codec", ""),
            source_sha256=spec.get("source_sha256", ""),
            progress=progress,
            stage=meta.get("stage", "starting") if running else str(state),
            eta_s=meta.get("eta_s") if running else None,
            attempt=int(meta.get("attempt", 0)),
            result=job.return_value() if state is JobState.SUCCEEDED else None,
            error=error,
            created_at=_iso(job.created_at),
            started_at=_iso(job.started_at),
            ended_at=_iso(job.ended_at),
            sequence=int(meta.get("sequence", 0)),
        )

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One process at a time decides about names, jobs and uploads."""
        lock = self.connection.lock(_LOCK, timeout=60, blocking_timeout=30)
        if not lock.acquire():
            raise Unavailable("the queue is busy; try again")
        try:
            yield
        finally:
            with contextlib.suppress(LockError):
                lock.release()

    @staticmethod
    def _cancel_key(job_id: str) -> str:
        return f"{_PREFIX}cancel:{job_id}"

    @staticmethod
    def _attempts_key(job_id: str) -> str:
        return f"{_PREFIX}attempts:{job_id}"

    @staticmethod
    def _users_key(digest: str) -> str:
        return f"{_PREFIX}upload:{digest}"


def _iso(moment: Any) -> str | None:
    return None if moment is None else moment.isoformat(timespec="milliseconds")


def _unexplained(job: Job) -> Mapping[str, str]:
    """Describe a failure about which the job itself could say nothing."""
    result = job.latest_result()
    text = (result.exc_string if result is not None else None) or ""
    if any(sign in text for sign in _LOST):
        return {
            "code": "worker_lost",
            "message": "the worker died while it ran the job, each time it was tried",
        }
    return {"code": "internal_error", "message": "the job failed for a reason that is in the worker's log"}
