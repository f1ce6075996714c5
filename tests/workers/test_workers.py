"""Real workers that are killed, cancelled and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis as redis_package

from hypersam.codecs import CODEC_VERSION
from hypersam.embedded_redis import EmbeddedRedis
from hypersam.errors import NameTaken, Overloaded, UnknownJob, UnknownUpload
from hypersam.job_spec import JobSpec, JobState
from hypersam.jobs import JobBoard, JobView, connect
from hypersam.options import check_options
from hypersam.settings import Settings
from hypersam.store import ArtifactStore
from tests.models import save_checkpoint
from tests.service.running import WorkerProcess
from workers import lost


class Bench:
    """A Redis, a store and a board, and workers on request."""

    def __init__(self, settings: Settings, server: EmbeddedRedis) -> None:
        self.server = server
        self.settings = settings
        self.store = ArtifactStore(settings.data_dir)
        self.redis = connect(settings)
        self.board = JobBoard(self.redis, self.store, settings)
        self.stack = contextlib.ExitStack()

    def worker(self) -> WorkerProcess:
        worker = WorkerProcess(self.settings)
        self.stack.callback(worker.stop)
        return worker

    def submit(self, checkpoint: bytes, name: str = "m", side: float = 0.1) -> JobView:
        upload = self.store.new_upload(1 << 30)
        upload.write(checkpoint)
        try:
            return self.board.submit(spec(upload.finish(), name, side), upload.commit)
        finally:
            upload.discard()

    def wait(self, job_id: str, done: Callable[[JobView], bool], timeout: float = 60) -> JobView:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            view = self.board.get(job_id)
            if done(view):
                return view
            time.sleep(0.02)
        raise AssertionError(f"waited in vain: {view}")


def spec(digest: str, name: str = "m", side: float = 0.1) -> JobSpec:
    options = json.loads(json.dumps(check_options("birkhoff", {"side": side})))
    return JobSpec(name=name, source_sha256=digest, codec="birkhoff", codec_version=CODEC_VERSION, options=options)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with EmbeddedRedis(tmp_path / "data") as server:
        settings = Settings(
            data_dir=tmp_path / "data", redis_url=server.url, worker_heartbeat=1, device="cpu", max_waiting_jobs=2
        )
        made = Bench(settings, server)
        with made.stack:
            yield made
        made.redis.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny.pth").read_bytes()


def horse_of(worker: WorkerProcess) -> psutil.Process:
    """The process of the job that the worker runs."""
    children = psutil.Process(worker.process.pid).children()
    assert len(children) == 1
    return children[0]


def started(view: JobView) -> bool:
    return view.attempt == 1


def final(view: JobView) -> bool:
    return view.state.final


def test_a_killed_workers_job_is_done_by_another(bench: Bench, checkpoint: bytes) -> None:
    first, job = bench.worker(), bench.submit(checkpoint)
    assert job.state is JobState.QUEUED
    bench.wait(job.id, started)
    horse = horse_of(first)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    with contextlib.suppress(psutil.NoSuchProcess):
        horse.wait(5)  # it must not live on beside its successor
    assert not horse.is_running()
    assert bench.board.get(job.id).state is JobState.RUNNING  # nobody could report
    bench.worker()
    done = bench.wait(job.id, final)
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 2)
    assert bench.store.model("m").request == job.id
    assert not list(bench.store.work.iterdir())
    assert not list(bench.store.uploads.iterdir())  # no longer needed


def test_a_clock_that_jumps_forward_takes_no_job_for_lost(bench: Bench, checkpoint: bytes) -> None:
    """What RQ has noted for the running job is long past then, and an idle worker looks every second."""
    bench.worker()
    bench.worker()
    job = bench.submit(checkpoint)
    bench.wait(job.id, lambda view: view.state is JobState.RUNNING)
    registry = bench.board.queue.started_job_registry
    while not bench.board.get(job.id).state.final:
        for entry in bench.redis.zrange(registry.key, 0, -1):
            bench.redis.zadd(registry.key, {entry: 1.0}, xx=True)
        time.sleep(0.1)
    done = bench.board.get(job.id)
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 1)


def test_lost_jobs_are_found_whatever_the_dead_left(bench: Bench, checkpoint: bytes) -> None:
    """Its clock was an hour ahead, it died with the lock on the queue's upkeep, and had just taken another job."""
    first, job = bench.worker(), bench.submit(checkpoint, "a")
    bench.wait(job.id, started)
    first.process.send_signal(signal.SIGKILL)
    first.process.wait()
    queue = bench.board.queue
    [entry] = bench.redis.zrange(queue.started_job_registry.key, 0, -1)
    bench.redis.zadd(queue.started_job_registry.key, {entry: time.time() + 3600})
    bench.redis.set(queue.registry_cleaning_key, 1, ex=899)
    other = bench.submit(checkpoint, "b")
    assert bench.redis.lmove(queue.key, queue.intermediate_queue.key, "LEFT", "RIGHT") == other.id.encode()
    bench.worker()
    deadline = time.monotonic() + 10
    while bench.redis.ttl(queue.registry_cleaning_key) > lost.LOCK_SECONDS:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    bench.redis.delete(queue.registry_cleaning_key)  # not to wait that long here
    assert bench.wait(other.id, final).state is JobState.SUCCEEDED
    done = bench.wait(job.id, final)
    assert (done.state, done.attempt) == (JobState.SUCCEEDED, 2)


def test_a_job_goes_on_while_redis_is_away(bench: Bench, checkpoint: bytes) -> None:
    """For longer than the time between two signs of life."""
    worker, job = bench.worker(), bench.submit(checkpoint)
    bench.wait(job.id, started)
    horse = horse_of(worker)
    horse.suspend()  # a long job
    bench.server.stop()
    time.sleep(2.5)
    assert worker.process.poll() is None
    bench.server.start()
    horse.resume()
    assert bench.wait(job.id, final).state is JobState.SUCCEEDED
    assert worker.process.poll() is None


def test_a_killed_job_process_is_tried_again_and_then_given_up(bench: Bench, checkpoint: bytes) -> None:
    worker, job = bench.worker(), bench.submit(checkpoint)
    for attempt in range(1, bench.settings.job_retries + 2):
        bench.wait(job.id, lambda view, n=attempt: view.attempt == n)  # type: ignore[misc]
        horse_of(worker).kill()
    done = bench.wait(job.id, final)
    assert done.state is JobState.FAILED
    assert done.error is not None
    assert done.error["code"] == "worker_lost"
    assert bench.store.find("m") is None


def test_a_running_job_is_cancelled(bench: Bench, checkpoint: bytes) -> None:
    bench.worker()
    job = bench.submit(checkpoint)
    bench.wait(job.id, started)
    view = bench.board.cancel(job.id)
    assert view is not None
    assert view.stage == "cancelling"
    done = bench.wait(job.id, final)
    assert (done.state, done.attempt) == (JobState.CANCELLED, 1)
    assert done.error == {"code": "cancelled", "message": "the job was cancelled"}
    assert bench.store.find("m") is None
    assert not list(bench.store.work.iterdir())
    again = bench.submit(checkpoint)  # after a cancellation the same request runs anew
    assert again.id == job.id
    assert bench.wait(job.id, final).state is JobState.SUCCEEDED


def test_a_waiting_job_is_cancelled(bench: Bench, checkpoint: bytes) -> None:
    job = bench.submit(checkpoint)
    view = bench.board.cancel(job.id)
    assert view is not None
    assert view.state is JobState.CANCELLED
    assert bench.board.waiting() == 0
    assert not list(bench.store.uploads.iterdir())
    assert bench.board.cancel(job.id) is None  # ended: forgotten
    with pytest.raises(UnknownJob):
        bench.board.get(job.id)


def test_a_worker_told_to_stop_ends_at_once_when_idle(bench: Bench) -> None:
    worker = bench.worker()
    deadline = time.monotonic() + 10
    while bench.board.workers() != 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert bench.board.workers() == 1
    began = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - began < 5
    assert bench.board.workers() == 0


def test_the_worker_never_touches_the_gpu(bench: Bench, checkpoint: bytes) -> None:
    worker = bench.worker()
    bench.wait(bench.submit(checkpoint).id, final)
    maps = Path(f"/proc/{worker.process.pid}/maps").read_text()
    assert "libcuda.so" not in maps
    assert "/dev/nvidia" not in maps


def test_a_claimed_name(bench: Bench, checkpoint: bytes) -> None:
    first = bench.submit(checkpoint)
    assert bench.submit(checkpoint).id == first.id
    with pytest.raises(NameTaken):
        bench.submit(checkpoint, side=0.2)
    assert bench.board.cancel(first.id) is not None
    assert bench.submit(checkpoint, side=0.2).state is JobState.QUEUED  # the claim went with the job


def test_more_jobs_than_may_wait(bench: Bench, checkpoint: bytes) -> None:
    bench.submit(checkpoint, "a")
    bench.submit(checkpoint, "b")
    with pytest.raises(Overloaded):
        bench.submit(checkpoint, "c")
    assert [view.name for view in bench.board.list()] == ["b", "a"]


def test_an_upload_stays_while_another_job_wants_it(bench: Bench, checkpoint: bytes) -> None:
    first, second = bench.submit(checkpoint, "a"), bench.submit(checkpoint, "b")
    bench.board.cancel(first.id)
    assert bench.store.upload(second.source_sha256).is_file()
    bench.board.cancel(second.id)
    with pytest.raises(UnknownUpload):
        bench.store.upload(second.source_sha256)


def test_sweeping_spares_what_waiting_jobs_need(bench: Bench, checkpoint: bytes) -> None:
    waiting = bench.submit(checkpoint, "a")
    unwanted = bench.store.new_upload(10)
    unwanted.write(b"old")
    unwanted.finish()
    long_ago = time.time() - 10 * bench.settings.upload_retention
    for path in (bench.store.upload(waiting.source_sha256), unwanted.commit()):
        os.utime(path, (long_ago, long_ago))
    JobBoard(bench.redis, bench.store, bench.settings.model_copy(update={"keep_uploads": True})).sweep()
    assert len(list(bench.store.uploads.iterdir())) == 2
    nowhere = bench.settings.model_copy(update={"redis_url": "unix:///nowhere.sock"})
    with contextlib.closing(connect(nowhere)) as connection:
        JobBoard(connection, bench.store, nowhere).sweep()  # cannot know, deletes nothing
    assert len(list(bench.store.uploads.iterdir())) == 2
    bench.board.sweep()
    assert [path.name for path in bench.store.uploads.iterdir()] == [waiting.source_sha256]


def test_a_job_makes_its_upload_young(bench: Bench, checkpoint: bytes) -> None:
    upload = bench.store.new_upload(1 << 30)
    upload.write(checkpoint)
    path = bench.store.uploads / upload.finish()
    upload.commit()
    os.utime(path, (1, 1))
    bench.board.submit(spec(upload.digest), lambda: bench.store.upload(upload.digest))
    assert path.stat().st_mtime > time.time() - 100


def test_jobs_are_json_in_redis(bench: Bench, checkpoint: bytes) -> None:
    job = bench.submit(checkpoint)
    raw = redis_package.Redis.from_url(str(bench.settings.redis_url))
    held = raw.hgetall(f"rq:job:{job.id}")
    raw.close()
    import zlib

    assert json.loads(zlib.decompress(held[b"data"]))[0] == "workers.tasks.compress_checkpoint"
