"""A file's name decides which of two equal variants it is: so it is part of the request, and told in the answer."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch

from benchmarks import random_sam
from hypersam.job_spec import JobSpec, JobState
from hypersam.jobs import JobView
from hypersam.sam.registry import VARIANTS
from hypersam.store import ModelRecord
from service.schemas import Job, Model
from tests.service.running import Api, assert_problem

AS_IT_IS = {"options": '{"min_elements": 1099511627776}'}  # no tensor has as many, so none is encoded


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """MobileSAM or TinySAM in half precision, which is small enough to be sent here."""
    buffer = io.BytesIO()
    state = random_sam.state_dict("mobile_sam")
    torch.save({k: t.half() if t.is_floating_point() else t for k, t in state.items()}, buffer)
    return buffer.getvalue()


def test_a_name_that_decides_is_part_of_the_request(api: Api, twins: bytes) -> None:
    first = api.compress(twins, "checkpoint.pth", name="twin", **AS_IT_IS).json()
    assert api.compress(twins, "download (1).pt", name="twin", **AS_IT_IS).json()["id"] == first["id"]
    assert_problem(api.compress(twins, "tinysam_42.3.pth", name="twin", **AS_IT_IS), 409, "name_taken")
    guessed = api.wait_job(first["id"])
    assert guessed["state"] == "succeeded", (guessed, api.output())
    assert (guessed["result"]["variant"], guessed["result"]["decided_by"]) == ("mobile_sam", "order")
    assert "--variant tiny_sam" in guessed["result"]["notices"][0]

    other = api.compress(twins, "tinysam_42.3.pth", **AS_IT_IS).json()
    named = api.wait_job(other["id"])
    assert (named["result"]["variant"], named["result"]["decided_by"]) == ("tiny_sam", "name")
    assert not [notice for notice in named["result"]["notices"] if "guess" in notice]
    assert_problem(api.compress(twins, "mobile_sam.pt", name="tinysam_42.3", **AS_IT_IS), 409, "name_taken")
    reports = {row["id"]: row["report"]["decided_by"] for row in api.http.get("/models").json()["models"]}
    assert (reports["twin"], reports["tinysam_42.3"]) == ("order", "name")
    assert api.http.get("/models/twin").json()["report"]["decided_by"] == "order"


def spec(file_name: str | None, **given: str) -> JobSpec:
    digest = given.pop("source_sha256", "0" * 64)
    return JobSpec("m", digest, "lattice", "1", file_name=file_name, **given)  # type: ignore[arg-type]


def test_the_key_holds_what_a_name_decides_and_no_more() -> None:
    plain = spec(None).key
    assert plain == "c2bc8b84b4ede884626056e6214cf5d1"  # models that are registered already keep their requests
    assert {spec(name).key for name in ("", "checkpoint.pth", "model (2).pt")} == {plain}
    assert spec("mobile_sam.pt").key == spec("MobileSAM-copy.pth").key != plain
    assert len({spec(name).key for name in ("mobile_sam.pt", "tinysam.pth", "edge_sam.pth", "edge_sam_3x.pth")}) == 4
    # Where the caller or the hash decides the name does not.
    assert spec("tinysam.pth", variant="tiny_sam").key == spec("mobile_sam.pt", variant="tiny_sam").key
    known = next(row.sha256 for row in VARIANTS if row.id == "mobile_sam")
    assert known is not None
    assert spec("tinysam.pth", source_sha256=known).key == spec(None, source_sha256=known).key
    assert spec(None, decoder_name="a.pt").key == plain


def test_results_and_registrations_of_older_versions_are_read() -> None:
    old = {"variant": "mobile_sam", "tensors": []}
    view = JobView(
        "0" * 32,
        JobState.SUCCEEDED,
        "m",
        "lattice",
        "0" * 64,
        1.0,
        "succeeded",
        None,
        1,
        old,
        None,
        None,
        None,
        None,
        2,
    )
    assert Job.of(view).result == {"decided_by": "", **old}
    assert Job.of(replace(view, result=None)).result is None
    record = ModelRecord("m", "0" * 64, 1, "0" * 32, "0" * 64, "2026-01-01T00:00:00+00:00", old)
    assert Model.of(record, tensors=True).report == {"decided_by": "", **old}
    assert Model.of(record, tensors=False).report == {"decided_by": "", "variant": "mobile_sam"}
