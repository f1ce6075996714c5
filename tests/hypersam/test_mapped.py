from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hypersam.checkpoint import read_checkpoint
from hypersam.mapped import MappedFile

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="pages are let go of on Linux alone")


def mapped_bytes() -> int:
    """Bytes of files in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@pytest.mark.parametrize("container", ["pth", "safetensors"])
def test_pages_that_were_read_are_let_go_of_and_can_be_read_again(tmp_path: Path, container: str) -> None:
    weight = torch.randn(8 << 20)
    path = tmp_path / f"a.{container}"
    torch.save({"w": weight}, path) if container == "pth" else save_file({"w": weight}, path)
    read = read_checkpoint(path).tensors["w"]
    file = MappedFile([path], [read])
    assert torch.equal(read, weight)
    before = mapped_bytes()
    file.release()
    assert before - mapped_bytes() > 0.9 * weight.nbytes
    assert torch.equal(read, weight)


def test_a_file_that_is_not_mapped_has_nothing_to_let_go_of(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(5)}, path, _use_new_zipfile_serialization=False)
    read = read_checkpoint(path).tensors["w"]
    MappedFile([path], [read]).release()
    assert torch.equal(read, torch.ones(5))


def test_what_others_have_mapped_is_left_alone(tmp_path: Path) -> None:
    """Not another reader's mapping of the same file, which may be gone, and its addresses a stranger's, by then."""
    path = tmp_path / "a.pth"
    torch.save({"w": torch.zeros(1 << 16), "small": torch.ones(3)}, path)
    others = read_checkpoint(path).tensors["w"]
    mine = read_checkpoint(path).tensors
    file = MappedFile([path], mine.values())
    others[:] = 7  # in the process's own copy of the page
    file.release()
    assert torch.equal(others, torch.full((1 << 16,), 7.0))
    assert torch.equal(mine["small"], torch.ones(3))


def test_the_mapping_lives_as_long_as_its_pages_are_let_go_of(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    torch.save({"w": torch.zeros(1 << 16)}, path)
    file = MappedFile([path], read_checkpoint(path).tensors.values())
    gc.collect()
    assert str(path) in Path("/proc/self/maps").read_text()
    file.release()
    del file
    gc.collect()
    assert str(path) not in Path("/proc/self/maps").read_text()
