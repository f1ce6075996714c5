from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import redis

from hypersam.errors import JobCancelled
from workers.tasks import JobReporter


@dataclass(frozen=True)
class Step:
    stage: str
    done: int
    total: int


class FakeJob:
    """The two members of an RQ job that the reporter uses."""

    def __init__(self) -> None:
        self.meta: dict[str, Any] = {}
        self.retries_left: int | None = 2
        self.saved: list[dict[str, Any]] = []

    def save_meta(self) -> None:
        self.saved.append(dict(self.meta))


def test_progress_only_grows_and_covers_the_stages() -> None:
    job = FakeJob()
    report = JobReporter(job, lambda: False, every=0)  # type: ignore[arg-type]
    for stage in ("reading", "encoding", "writing", "verifying"):
        for done in (0, 50, 100):
            report(Step(stage, done, 100))
    shares = [meta["progress"] for meta in job.saved]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert [meta["sequence"] for meta in job.saved] == list(range(1, len(job.saved) + 1))


def test_writes_are_throttled_but_a_new_stage_is_told() -> None:
    job = FakeJob()
    report = JobReporter(job, lambda: False, every=3600)  # type: ignore[arg-type]
    for done in range(1000):
        report(Step("encoding", done, 1000))
    report(Step("writing", 0, 1))
    assert len(job.saved) == 3


def test_a_wish_to_stop_is_heard() -> None:
    report = JobReporter(FakeJob(), lambda: True)  # type: ignore[arg-type]
    with pytest.raises(JobCancelled):
        report(Step("encoding", 1, 2))


def test_a_failure_is_noted_and_not_tried_again() -> None:
    job = FakeJob()
    JobReporter(job, lambda: False).fail("bad_checkpoint", "no")  # type: ignore[arg-type]
    assert job.saved[-1]["error"] == {"code": "bad_checkpoint", "message": "no"}
    assert job.retries_left == 0


def test_reports_that_nobody_takes_do_not_stop_the_job() -> None:
    """A Redis that is away, by a client of it."""
    nowhere = redis.Redis(unix_socket_path="/nowhere.sock")
    job = FakeJob()
    report = JobReporter(job, lambda: bool(nowhere.exists("x")))  # type: ignore[arg-type]
    for done in range(3):
        report(Step("encoding", done, 3))
    assert len(job.saved) == 1
