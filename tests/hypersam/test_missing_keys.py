"""A checkpoint that lost a key is told which: what is left is not taken for a smaller network or another family."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.random_sam import layout
from hypersam.errors import LayoutMismatch
from hypersam.sam import registry
from hypersam.sam.detect import Detected, detect
from hypersam.sam.families.shapes import MAX_DEPTH
from hypersam.sam.family import Family

LAYOUTS = ("sam_b", "hq_b", "hq_tiny", "sam21_t", "mobile_and_tinysam", "edge", "eff_ti")
"""One of every family."""
BLOCKS = {
    "sam_b": "image_encoder.blocks.{}.norm1.bias",
    "sam21_t": "image_encoder.trunk.blocks.{}.norm1.bias",
    "mobile_and_tinysam": "image_encoder.layers.2.blocks.{}.attn.norm.bias",
    "edge": "image_encoder.features.{}.channel_mixer.m.0.bn.bias",
    "eff_ti": "mask_decoder.transformer.layers.{}.norm1.bias",
}


@pytest.fixture(autouse=True)
def _built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without a key has the sizes of the whole one: networks without storage, and their keys, are made once."""
    on_meta = Family.on_meta

    def kept(family: Family, config: Any) -> Any:
        made = on_meta(family, config)
        state = made.state_dict()
        monkeypatch.setattr(made, "state_dict", lambda: state, raising=False)
        return made

    monkeypatch.setattr(Family, "on_meta", lru_cache(maxsize=8)(kept))


def title_of(found: Detected) -> str:
    return registry.family_row(found.family).title


def refusal(tensors: dict[str, Tensor]) -> str:
    with pytest.raises(LayoutMismatch) as caught:
        detect(tensors)
    return str(caught.value)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_key_that_is_missing_is_named_and_no_other(name: str) -> None:
    whole = layout(name)
    found = detect(whole)
    needed = [key for key in whole if not found.described.carries(key)]
    assert len(needed) > 200
    for key in needed:
        said = refusal({k: v for k, v in whole.items() if k != key})
        # By the check of all keys, or where a size is read off this one.
        listed = said.endswith(f"({title_of(found)}); missing: {key}")
        assert listed or said.endswith(f"checkpoints need {key!r}, which is missing"), said


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("number", [MAX_DEPTH, 10**9, 10**300])
def test_numbers_in_keys_ask_for_no_more_than_a_deep_network(name: str, number: int) -> None:
    key = BLOCKS[name].format(number)
    said = refusal(layout(name) | {key: torch.empty(8, device="meta")})
    assert repr(key) in said
    assert f"at most {MAX_DEPTH}" in said


def test_a_block_that_is_lost_whole_is_missing_key_by_key() -> None:
    lost = [key for key in layout("eff_ti") if key.startswith("image_encoder.blocks.5.")]
    said = refusal({k: v for k, v in layout("eff_ti").items() if k not in lost})
    assert all(key in said for key in lost[:8])
    assert said.endswith(f"and {len(lost) - 8} more")


@pytest.mark.parametrize("number", ["01", "00", "1_0", "²"])
def test_numbers_spelt_otherwise_are_unexpected_keys(number: str) -> None:
    key = f"image_encoder.blocks.{number}.norm1.bias"
    assert f"unexpected: {key}" in refusal(layout("sam_b") | {key: torch.empty(768, device="meta")})


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_strange_key_makes_no_other_family_of_it(name: str) -> None:
    whole = layout(name)
    found = detect(whole)
    for other in LAYOUTS:
        strange = {k: v for k, v in layout(other).items() if k not in whole}
        for key in list(strange)[:: max(1, len(strange) // 6)]:
            if found.described.carries(key):
                continue
            said = refusal(whole | {key: strange[key]})
            assert f"({title_of(found)})" in said or "of a SAM 2 do not show" in said, (key, said)


def test_sam_2_1_is_told_by_any_key_of_its_own() -> None:
    for key in ("no_obj_embed_spatial", "obj_ptr_tpos_proj.weight"):
        assert detect({k: v for k, v in layout("sam21_t").items() if k != key}).variant == "sam2.1_hiera_tiny"
