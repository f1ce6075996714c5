"""A model that is published as two files, as MobileSAMv2 is: an image encoder, and a decoder in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hypersam
from benchmarks import random_sam
from benchmarks.random_sam import layout
from hypersam.checkpoint import read_checkpoint
from hypersam.cli.offline import describe
from hypersam.errors import CheckpointError, InvalidOption, UnknownFamily
from hypersam.sam.detect import detect
from tests.models import official_sam


def halves(folder: Path, *, prefixed: bool = False) -> tuple[Path, Path]:
    state = official_sam(seed=3).state_dict()
    encoder = {k: v for k, v in state.items() if k.startswith("image_encoder.")}
    if not prefixed:
        encoder = {k.removeprefix("image_encoder."): v for k, v in encoder.items()}
    parts = {
        "PromtEncoder": {k.removeprefix("prompt_encoder."): v for k, v in state.items() if k.startswith("prompt_")},
        "MaskDecoder": {k.removeprefix("mask_decoder."): v for k, v in state.items() if k.startswith("mask_decoder.")},
    }
    torch.save(encoder, folder / "encoder.pt")
    torch.save(parts, folder / "Prompt_guided_Mask_Decoder.pt")
    return folder / "encoder.pt", folder / "Prompt_guided_Mask_Decoder.pt"


@pytest.mark.parametrize("prefixed", [False, True])
def test_both_together_are_the_whole(tmp_path: Path, prefixed: bool) -> None:
    encoder, decoder = halves(tmp_path, prefixed=prefixed)
    whole = official_sam(seed=3).state_dict()
    read = read_checkpoint(encoder, decoder)
    assert read.tensors.keys() == whole.keys()
    assert all(torch.equal(read.tensors[k], v) for k, v in whole.items())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_each_file_and_each_part_may_have_a_prefix_of_its_own(tmp_path: Path, prefix: str) -> None:
    encoder, decoder = halves(tmp_path)
    torch.save({"state_dict": {f"module.{k}": v for k, v in torch.load(encoder).items()}}, encoder)
    parts = torch.load(decoder)
    parts["MaskDecoder"] = {prefix + k: v for k, v in parts["MaskDecoder"].items()} | {"epoch": 3}
    torch.save({"model": parts}, decoder)
    read = read_checkpoint(encoder, decoder)
    assert read.tensors.keys() == official_sam(seed=3).state_dict().keys()
    assert (read.wrapper, read.prefix, read.passed_over) == ("state_dict", "", ("mask_decoder.epoch",))
    detect(read.tensors)


def test_inspect_tells_of_both(tmp_path: Path) -> None:
    encoder, decoder = halves(tmp_path)
    found = describe(encoder, decoder)
    assert (found["kind"], found["family"]) == ("checkpoint", "sam_vit")
    assert found["bytes"] == encoder.stat().st_size + decoder.stat().st_size
    assert len(found["tensors"]) == len(official_sam(seed=3).state_dict())
    hypersam.compress(encoder, tmp_path / "a.hsam", decoder=decoder, codec="birkhoff", options={"fidelity": False})
    with pytest.raises(InvalidOption, match="has its decoder in it"):
        describe(tmp_path / "a.hsam", decoder)


def test_they_are_compressed_into_one_model(tmp_path: Path) -> None:
    encoder, decoder = halves(tmp_path)
    torch.save(official_sam(seed=3).state_dict(), tmp_path / "whole.pth")
    options = {"policy": "equal_error", "fidelity": False}
    two = hypersam.compress(encoder, tmp_path / "two.hsam", decoder=decoder, options=options)
    one = hypersam.compress(tmp_path / "whole.pth", tmp_path / "one.hsam", options=options)
    assert (two.artifact_bytes, two.sqnr_db) == (one.artifact_bytes, one.sqnr_db)
    assert two.source_bytes == encoder.stat().st_size + decoder.stat().st_size
    assert hypersam.plan(encoder, decoder=decoder, options=options).parameters == one.parameters
    hypersam.load(tmp_path / "two.hsam")


def test_half_a_model_is_told_what_it_lacks(tmp_path: Path) -> None:
    encoder, decoder = halves(tmp_path)
    with pytest.raises(UnknownFamily, match="image encoder alone"):
        detect(read_checkpoint(encoder).tensors)
    with pytest.raises(UnknownFamily, match="decoder alone"):
        detect(read_checkpoint(decoder).tensors)
    with pytest.raises(CheckpointError, match="is no decoder"):
        read_checkpoint(decoder, encoder)
    torch.save(official_sam(seed=3).state_dict(), tmp_path / "whole.pth")
    with pytest.raises(CheckpointError, match="has a decoder of its own"):
        read_checkpoint(tmp_path / "whole.pth", decoder)


@pytest.mark.parametrize(
    ("layout_name", "prefix"),
    [("sam_b", "image_encoder."), ("sam_b", ""), ("hq_b", ""), ("mobile_and_tinysam", ""), ("edge", "")],
)
def test_an_encoder_of_any_family_is_told_what_it_lacks(layout_name: str, prefix: str) -> None:
    whole = layout(layout_name)
    encoder = {prefix + k.removeprefix("image_encoder."): v for k, v in whole.items() if k.startswith("image_encoder.")}
    with pytest.raises(UnknownFamily, match="image encoder alone"):
        detect(encoder)


def test_what_comes_as_two_files_is_what_is_published_so() -> None:
    # The encoder's official name is that of a file of SAM's own.
    found = detect(layout("sam_h"), name="sam_vit_h.pt")
    assert (found.variant, found.decided_by) == ("sam_vit_h", "name")
    told = found.told(sha256="0" * 64, name="sam_vit_h.pt", two_files=True)
    assert (told.variant, told.decided_by) == ("mobile_sam_v2", "files")
    asked = detect(layout("sam_h"), variant="sam_vit_h").told(two_files=True)
    assert (asked.variant, asked.decided_by) == ("sam_vit_h", "caller")
    assert detect(layout("sam_b")).told(two_files=True).variant == "sam_vit_b"


def test_no_tensor_is_lost_where_keys_are_spelt_in_two_ways(tmp_path: Path) -> None:
    encoder, decoder = halves(tmp_path)
    state = torch.load(encoder)
    torch.save(state | {"image_encoder.pos_embed": state["pos_embed"] + 1}, encoder)
    read = read_checkpoint(encoder, decoder)
    assert sum(not key.startswith(("prompt_encoder.", "mask_decoder.")) for key in read.tensors) == len(state) + 1
    with pytest.raises(CheckpointError):
        detect(read.tensors)
    parts = torch.load(decoder)
    torch.save(parts | {"PromptEncoder": parts["PromtEncoder"]}, decoder)
    with pytest.raises(CheckpointError, match="a part twice"):
        read_checkpoint(decoder)


@pytest.mark.parametrize("which", [0, 1])
def test_neither_file_is_replaced_by_the_artifact(tmp_path: Path, which: int) -> None:
    files = halves(tmp_path)
    before = files[which].read_bytes()
    with pytest.raises(InvalidOption, match=f"would replace its source {files[which].name}"):
        hypersam.compress(files[0], files[which], decoder=files[1], options={"policy": "equal_error"})
    assert files[which].read_bytes() == before


@pytest.mark.parametrize(("name", "variant"), [("mobile_sam.pt", "mobile_sam"), ("tinysam_42.3.pth", "tiny_sam")])
def test_a_name_that_the_path_does_not_tell_decides_between_equals(tmp_path: Path, name: str, variant: str) -> None:
    # The service keeps uploads under their digests.
    path = tmp_path / "0123abcd"
    torch.save(random_sam.state_dict("mobile_sam"), path)
    made = hypersam.plan(path, file_name=name, options={"policy": "equal_error", "max_error": 0.5})
    assert made.variant == variant
