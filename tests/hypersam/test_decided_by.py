"""What told a variant from others of its layout: said by every report, and called a guess where it is one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hypersam
from benchmarks import random_sam
from benchmarks.random_sam import layout
from hypersam.cli.offline import describe
from hypersam.sam.detect import detect
from hypersam.sam.registry import VARIANTS, named_by
from kernels import artifact as artifact_format
from tests.models import save_checkpoint

AS_IT_IS = {"min_elements": 1 << 40, "fidelity": False}  # no tensor has as many, so none is encoded


@pytest.fixture(scope="module")
def tiny_vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("twins") / "checkpoint.pth"
    torch.save(random_sam.state_dict("mobile_sam"), path)
    return path


def test_a_guess_is_called_one_in_report_and_artifact(tiny_vit: Path, tmp_path: Path) -> None:
    made = hypersam.compress(tiny_vit, tmp_path / "a.hsam", codec="birkhoff", options=AS_IT_IS)
    told = [made.as_dict(), describe(tmp_path / "a.hsam"), describe(tiny_vit)]
    for each in told:
        assert (each["variant"], each["decided_by"]) == ("mobile_sam", "order")
        guess = [notice for notice in each["notices"] if "guess" in notice]
        assert len(guess) == 1
        for word in ("--variant tiny_sam", "mobile_sam.pt", "tinysam_42.3.pth"):
            assert word in guess[0]


def test_the_command_line_says_that_it_is_a_guess(tiny_vit: Path, tmp_path: Path) -> None:
    as_it_is = ["--codec", "birkhoff", "--option", f"min_elements={1 << 40}", "--no-fidelity"]
    for arguments in (["inspect", tiny_vit], ["compress", tiny_vit, tmp_path / "a.hsam", *as_it_is]):
        command = [sys.executable, "-m", "hypersam", *map(str, arguments)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "note: the variant mobile_sam is a guess" in said
        assert "order" in said


@pytest.mark.parametrize(
    ("given", "variant", "decided_by"),
    [({"file_name": "tinysam_42.3.pth"}, "tiny_sam", "name"), ({"variant": "tiny_sam"}, "tiny_sam", "caller")],
)
def test_what_was_said_is_no_guess(
    tiny_vit: Path, tmp_path: Path, given: dict[str, str], variant: str, decided_by: str
) -> None:
    name, wanted = given.get("file_name"), given.get("variant")
    made = hypersam.compress(
        tiny_vit, tmp_path / "a.hsam", codec="birkhoff", options=AS_IT_IS, file_name=name, variant=wanted
    )
    assert (made.variant, made.decided_by) == (variant, decided_by)
    assert not [notice for notice in made.notices if "guess" in notice]


def test_shapes_decide_where_there_is_one_candidate(tmp_path: Path) -> None:
    made = hypersam.compress(
        save_checkpoint(tmp_path / "a.pth"), tmp_path / "a.hsam", codec="birkhoff", options=AS_IT_IS
    )
    assert (made.decided_by, made.notices) == ("shapes", ())
    assert describe(tmp_path / "a.hsam")["decided_by"] == "shapes"
    planned = hypersam.plan(tmp_path / "a.pth", options={"policy": "equal_error", "fidelity": False})
    assert (planned.decided_by, planned.notices) == ("shapes", ())


@pytest.mark.parametrize("model", [{}, {"candidates": [3, None], "decided_by": "order"}, {"decided_by": [1]}])
def test_artifacts_that_say_it_otherwise_can_be_inspected(tmp_path: Path, model: dict[str, object]) -> None:
    encoded = {"w": artifact_format.RawTensor(torch.ones(2))}
    artifact_format.write(tmp_path / "a.hsam", encoded, codec={}, model={"variant": "x", **model}, source={}, report={})
    found = describe(tmp_path / "a.hsam")
    assert found["decided_by"] == model.get("decided_by", "")


def test_the_names_of_files_mean_the_same_to_the_queue_and_to_the_reader() -> None:
    assert named_by("EdgeSAM-3x.pth")[0].id == "edge_sam_3x"
    assert named_by("checkpoint.pth") == ()
    twins = [row for row in VARIANTS if row.names and not row.id.startswith("sam2")]
    assert len(twins) == 6
    for row in twins:
        assert named_by(row.id)[0] == row
        assert detect(layout(random_sam.LAYOUT_OF[row.id]), name=row.id).variant == row.id
