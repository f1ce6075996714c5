"""The jobs. They are thin: take the upload, call the library, register what it made."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import redis
from redis import Redis
from rq import get_current_job
from rq.job import Job
from rq.timeouts import JobTimeoutException

from hypersam.errors import HypersamError, JobCancelled, StoreFull, StoreUnavailable
from hypersam.job_spec import JobSpec
from hypersam.jobs import JobBoard, connect
from hypersam.settings import Settings
from hypersam.store import NO_ROOM, ArtifactStore, ModelRecord, open_store

log = logging.getLogger(__name__)

UNTOLD = 1.0  # seconds without a try to report, after Redis was away
REPORT_EVERY = 0.25  # seconds between two writes of a job's progress
_STAGES = {
    "reading": (0.0, 0.05), "measuring": (0.05, 0.3), "planning": (0.3, 0.4), "encoding": (0.4, 0.75),
    "comparing": (0.75, 0.93), "writing": (0.93, 0.96), "verifying": (0.96, 1.0),
}  # fmt: skip


class ProgressLike(Protocol):
    """What hypersam.compression tells: ``done`` of ``total`` bytes of a stage."""

    @property
    def stage(self) -> str:
        """Its name."""

    @property
    def done(self) -> int:
        """Bytes done."""

    @property
    def total(self) -> int:
        """Bytes in all."""


class JobReporter:
    """Writes progress into the job, not more often than needed, and stops the job if somebody asks for it."""

    def __init__(
        self, job: Job, cancelled: Callable[[], bool], *, attempt: int = 1, every: float = REPORT_EVERY
    ) -> None:
        self._job = job
        self._cancelled = cancelled
        self._every = every
        self._began = time.monotonic()
        self._last = float("-inf")
        self._stage = ""
        self._progress = 0.0
        meta = job.meta
        meta.update(attempt=attempt, sequence=0, progress=0.0, stage="starting", eta_s=None, error=None)
        self.save()

    def __call__(self, progress: ProgressLike) -> None:
        """Take one report. Raises ``JobCancelled``."""
        now = time.monotonic()
        if (progress.stage == self._stage or now < self._last) and now - self._last < self._every:
            return
        try:
            if self._cancelled():
                raise JobCancelled("the job was cancelled")
        except (redis.ConnectionError, redis.TimeoutError) as error:
            log.warning("the job goes on untold: %s", error)  # Redis may be back before it has ended
            self._last = time.monotonic() + UNTOLD
            return
        self._last, self._stage = now, progress.stage
        low, high = _STAGES.get(progress.stage, (self._progress, self._progress))
        share = progress.done / progress.total if progress.total else 1.0
        self._progress = max(self._progress, low + (high - low) * min(max(share, 0.0), 1.0))
        elapsed = now - self._began
        known = self._progress > 0.07  # before that the rate is not the encoder's
        eta = round(elapsed / self._progress * (1 - self._progress), 1) if known else None
        self._job.meta.update(stage=progress.stage, progress=round(self._progress, 4), eta_s=eta)
        with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
            self.save()

    def fail(self, code: str, message: str) -> None:
        """Note why the job fails. Failures that another try would repeat are not retried."""
        self._job.retries_left = 0
        self.note(code, message)

    def note(self, code: str, message: str) -> None:
        """Note why the job fails if no other try does better."""
        self._job.meta["error"] = {"code": code, "message": message}
        self.save()

    def save(self) -> None:
        """Write what is known to Redis."""
        self._job.meta["sequence"] = int(self._job.meta.get("sequence", 0)) + 1
        self._job.save_meta()  # type: ignore[no-untyped-call]


def compress_checkpoint(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compress an upload and register the model, or plan it: the function that RQ calls, in a process of its own.

    ``request`` is a JobSpec as a dict. Returns what ``GET /jobs/{id}`` gives as ``result``.
    """
    settings = Settings()
    job = get_current_job()
    if job is None:
        raise RuntimeError("not called by a worker")
    return run(JobSpec(**request), job, settings, connect(settings))


def run(spec: JobSpec, job: Job, settings: Settings, connection: Redis) -> dict[str, Any]:
    """Do the work of ``compress_checkpoint`` with everything it needs given."""
    store = open_store(settings)
    board = JobBoard(connection, store, settings)
    reporter = JobReporter(job, lambda: board.cancel_requested(job.id), attempt=board.begin(job.id))
    needed = False
    try:
        if board.cancel_requested(job.id):
            raise JobCancelled("the job was cancelled")
        if spec.dry_run:
            return _plan(spec, settings, store, reporter)
        record = store.find(spec.name)
        if record is None or record.request != spec.key:
            record = _compress(spec, job.id, settings, store, reporter)
    except StoreUnavailable as error:  # RQ tries again, so the upload stays; at the last, it may be asked for anew
        reporter.note(error.code, str(error))
        needed = True
        raise
    except HypersamError as error:
        reporter.fail(error.code, str(error))
        raise
    except JobTimeoutException:
        reporter.fail("job_timeout", f"the job took longer than {settings.job_timeout} s")
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            reporter.fail(StoreFull.code, "no room in the data folder for the compressed model")
            raise
        log.exception("job %s failed", job.id)
        reporter.fail("internal_error", "the job failed for a reason that is in the worker's log")
        raise
    finally:
        if not needed:
            try:
                board.release(spec)
            except StoreUnavailable as error:  # the job has its outcome; the sweep takes the upload later
                log.warning("the upload of %s stays for now: %s", job.id, error)
    return _result(record)


def _compress(
    spec: JobSpec, job_id: str, settings: Settings, store: ArtifactStore, reporter: JobReporter
) -> ModelRecord:
    from hypersam.compression import compress  # here, because the worker that waits for jobs never loads torch

    source, decoder = _uploads(spec, store)
    with store.work_dir(job_id) as folder:
        target = folder / "model.hsam"
        report = compress(
            source, target, decoder=decoder, file_name=spec.file_name, decoder_name=spec.decoder_name,
            codec=spec.codec, variant=spec.variant, options=spec.options, device=settings.device, progress=reporter,
        )  # fmt: skip
        return store.register(
            spec.name, target, digest=report.artifact_sha256, request=spec.key, source_sha256=spec.source_sha256,
            report=report.as_dict(),
        )  # fmt: skip


def _plan(spec: JobSpec, settings: Settings, store: ArtifactStore, reporter: JobReporter) -> dict[str, Any]:
    from hypersam.compression import plan

    source, decoder = _uploads(spec, store)
    return plan(
        source, decoder=decoder, file_name=spec.file_name, decoder_name=spec.decoder_name,
        codec=spec.codec, variant=spec.variant, options=spec.options, device=settings.device, progress=reporter,
    ).as_dict()  # fmt: skip


def _uploads(spec: JobSpec, store: ArtifactStore) -> tuple[Path, Path | None]:
    return store.upload(spec.source_sha256), store.upload(spec.decoder_sha256) if spec.decoder_sha256 else None


def _result(record: ModelRecord) -> dict[str, Any]:
    figures = {key: value for key, value in record.report.items() if key != "tensors"}
    return {"model": record.name, "url": f"/models/{record.name}", "bytes": record.bytes, **figures}
