"""A model that is published as two files, as MobileSAMv2 is: an image encoder, and a decoder in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hypersam
from hypersam.checkpoint import read_checkpoint
from hypersam.errors import CheckpointError, UnknownFamily
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


def test_a_name_that_the_path_does_not_tell_decides_between_equals(tmp_path: Path) -> None:
    # The service keeps uploads under their digests.
    torch.save(official_sam(seed=3).state_dict(), tmp_path / "0123abcd")
    plain = hypersam.plan(tmp_path / "0123abcd", file_name="anything.pth", options={"policy": "equal_error"})
    assert plain.variant == "sam_vit"
