"""SAM-HQ, SAM-HQ-Tiny and MobileSAM against their projects' own code: same weights, picture and prompts.

The packages are in the extra ``oracles``; a test whose package is missing is skipped.
"""

from __future__ import annotations

import importlib
import warnings
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import random_sam
from hypersam.sam.detect import detect
from hypersam.sam.model import SamModel
from hypersam.sam.network import sharing
from hypersam.sam.predictor import SamPredictor
from tests.hypersam.test_sam_vit import relative

IMAGE = np.random.default_rng(7).integers(0, 256, (70, 101, 3), dtype=np.uint8)


def package(name: str) -> ModuleType:
    with warnings.catch_warnings():
        # Deprecations and double registrations of its own.
        warnings.simplefilter("ignore")
        pytest.importorskip(name, reason=f"{name} is not installed (extra: oracles)", exc_type=ImportError)
        return importlib.import_module(name)


def compare(theirs: Any, state: dict[str, torch.Tensor], *, tolerance: float = 1e-4) -> None:
    found = detect(state)
    network = sharing(found.described.network, found.config, state)
    model = SamModel(network, variant=found.variant, device=torch.device("cpu"), dtype=torch.float32)
    mine = SamPredictor(model)
    theirs.set_image(IMAGE)
    mine.set_image(IMAGE)
    assert relative(mine.get_image_embedding().numpy(), theirs.get_image_embedding().numpy()) < tolerance
    points, labels = np.array([[30.0, 20.0], [90.0, 60.0], [50.5, 31.0]]), np.array([1, 0, 1])
    box = np.array([11.0, 9.0, 88.0, 61.0])
    side = model.low_res
    mask = np.random.default_rng(1).normal(0, 5, (1, side, side)).astype(np.float32)
    for prompt in (
        {"point_coords": points[:1], "point_labels": labels[:1]},
        {"point_coords": points, "point_labels": labels},
        {"box": box},
        {"point_coords": points, "point_labels": labels, "box": box},
        {"point_coords": points[:1], "point_labels": labels[:1], "mask_input": mask},
    ):
        for multimask in (True, False):
            want = theirs.predict(**prompt, multimask_output=multimask, return_logits=True)
            got = mine.predict(**prompt, multimask_output=multimask, return_logits=True)
            for w, g in zip(want, got, strict=True):
                assert g.shape == w.shape
                assert relative(g, np.asarray(w)) < tolerance


def loaded(official: nn.Module, *, seed: int) -> dict[str, torch.Tensor]:
    """Fill the official model with weights spread like trained ones."""
    state = random_sam.spread_like(official, seed=seed)
    official.load_state_dict(state, strict=True)
    # TinyViT keeps its biases as they were when it was last switched to inference.
    official.train()
    official.eval().requires_grad_(False)
    return state


def test_sam_hq_with_a_vit() -> None:
    hq = package("segment_anything_hq")
    parts = importlib.import_module("segment_anything_hq.modeling")
    hq_decoder = importlib.import_module("segment_anything_hq.modeling.mask_decoder_hq")
    official = parts.Sam(
        parts.ImageEncoderViT(
            img_size=160, patch_size=8, embed_dim=40, depth=3, num_heads=5, mlp_ratio=4, out_chans=64, qkv_bias=True,
            use_rel_pos=True, window_size=7, global_attn_indexes=(1,), norm_layer=partial(nn.LayerNorm, eps=1e-6),
        ),
        parts.PromptEncoder(64, (20, 20), (160, 160), 16),
        hq_decoder.MaskDecoderHQ(
            transformer_dim=64, transformer=parts.TwoWayTransformer(2, 64, 8, 128), iou_head_hidden_dim=64, vit_dim=40
        ),
    )  # fmt: skip
    state = loaded(official, seed=4)
    compare(hq.SamPredictor(official), state)


def test_sam_hq_tiny() -> None:
    hq = package("segment_anything_hq")
    official = hq.sam_model_registry["vit_tiny"]()
    compare(hq.SamPredictor(official), loaded(official, seed=5))


def test_mobile_sam() -> None:
    mobile = package("mobile_sam")
    official = mobile.sam_model_registry["vit_t"]()
    compare(mobile.SamPredictor(official), loaded(official, seed=6))
