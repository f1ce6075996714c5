"""The key lists of the official checkpoints, as their projects' code makes them: what each is recognised as.

``benchmarks/layouts`` has a file for each, key to dtype and shape.
"""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import random_sam
from benchmarks.random_sam import layout
from hypersam.errors import LayoutMismatch
from hypersam.sam.detect import detect
from hypersam.sam.registry import VARIANTS

# Layout: the family, and the variants it may be.
EXPECTED = {
    "sam_b": ("sam_vit", ["sam_vit_b"]),
    "sam_l": ("sam_vit", ["sam_vit_l"]),
    "sam_h": ("sam_vit", ["sam_vit_h", "mobile_sam_v2"]),
    "hq_tiny": ("sam_hq_tiny_vit", ["sam_hq_vit_tiny"]),
    "hq_b": ("sam_hq_vit", ["sam_hq_vit_b"]),
    "hq_l": ("sam_hq_vit", ["sam_hq_vit_l"]),
    "hq_h": ("sam_hq_vit", ["sam_hq_vit_h"]),
    "sam2_t": ("sam2_hiera", ["sam2_hiera_tiny"]),
    "sam2_s": ("sam2_hiera", ["sam2_hiera_small"]),
    "sam2_bp": ("sam2_hiera", ["sam2_hiera_base_plus"]),
    "sam2_l": ("sam2_hiera", ["sam2_hiera_large"]),
    "sam21_t": ("sam2_hiera", ["sam2.1_hiera_tiny"]),
    "sam21_s": ("sam2_hiera", ["sam2.1_hiera_small"]),
    "sam21_bp": ("sam2_hiera", ["sam2.1_hiera_base_plus"]),
    "sam21_l": ("sam2_hiera", ["sam2.1_hiera_large"]),
    "edge": ("edge_sam", ["edge_sam", "edge_sam_3x"]),
    "eff_ti": ("efficient_sam", ["efficient_sam_ti"]),
    "eff_s": ("efficient_sam", ["efficient_sam_s"]),
    "mobile_and_tinysam": ("sam_tiny_vit", ["mobile_sam", "tiny_sam"]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_official_layout_is_recognised(name: str) -> None:
    found = detect(layout(name))
    family, candidates = EXPECTED[name]
    assert (found.family, list(found.candidates)) == (family, candidates)
    assert found.decided_by == ("shapes" if len(candidates) == 1 else "order")
    assert found.config == type(found.config).from_dict(json.loads(json.dumps(found.config.as_dict())))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_key_too_few_or_too_many_is_named(name: str) -> None:
    tensors = layout(name)
    victim = next(key for key in tensors if key.endswith("mask_decoder.transformer.norm_final_attn.bias"))
    with pytest.raises(LayoutMismatch, match=f"missing: {victim}"):
        detect({k: v for k, v in tensors.items() if k != victim})
    with pytest.raises(LayoutMismatch, match=r"unexpected: image_encoder\.surplus"):
        detect(tensors | {"image_encoder.surplus": torch.empty(3, device="meta")})


@pytest.mark.parametrize(
    ("layout_name", "file", "variant"),
    [
        ("mobile_and_tinysam", "mobile_sam.pt", "mobile_sam"),
        ("mobile_and_tinysam", "tinysam_42.3.pth", "tiny_sam"),
        ("sam_h", "sam_vit_h_4b8939.pth", "sam_vit_h"),
        ("sam_h", "MobileSAMv2-ViT-H.pth", "mobile_sam_v2"),
    ],
)
def test_a_name_decides_between_equals(layout_name: str, file: str, variant: str) -> None:
    found = detect(layout(layout_name), name=file)
    assert (found.variant, found.decided_by) == (variant, "name")


@pytest.mark.parametrize(("layout_name", "variant"), [("sam_h", "sam_vit_h"), ("mobile_and_tinysam", "mobile_sam")])
def test_a_hash_decides_against_a_name_and_the_caller_against_both(layout_name: str, variant: str) -> None:
    official = next(row for row in VARIANTS if row.id == variant)
    other = next(row for row in VARIANTS if random_sam.LAYOUT_OF[row.id] == layout_name and row.id != variant)
    found = detect(layout(layout_name), name=other.file)
    assert (found.variant, found.decided_by) == (other.id, "name")
    told = found.told(sha256=official.sha256, name=other.file)
    assert (told.variant, told.decided_by) == (variant, "sha256")
    assert told.candidates == found.candidates
    asked = detect(layout(layout_name), variant=other.id, name=official.file).told(sha256=official.sha256)
    assert (asked.variant, asked.decided_by) == (other.id, "caller")


@pytest.mark.parametrize("name", ["sam2_t", "sam21_s", "sam2_bp", "sam21_l"])
def test_without_the_memory_nothing_tells_sam_2_from_2_1_but_the_caller_and_the_name(name: str) -> None:
    whole = detect(layout(name))
    pictures = {key: t for key, t in layout(name).items() if not whole.described.carries(key)}
    size = whole.variant.split("_hiera_")[1]
    found = detect(pictures)
    assert found.candidates == (f"sam2_hiera_{size}", f"sam2.1_hiera_{size}")
    assert found.decided_by == "order"
    for variant in found.candidates:
        assert detect(pictures, variant=variant).decided_by == "caller"
        named = detect(pictures, name=f"my_{variant}.safetensors")
        assert (named.variant, named.decided_by) == (variant, "name")
