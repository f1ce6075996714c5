"""SAM-HQ, SAM-HQ-Tiny and MobileSAM against their projects' own code: same weights, picture and prompts."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
from torch import nn

from hypersam.sam.detect import detect
from tests.oracles.official import compare, loaded, ours, package


@pytest.mark.parametrize(
    ("window", "depth", "global_blocks"),
    # The last has windows as large as the picture, whose global blocks only its depth tells.
    [(7, 3, (1,)), (7, 3, (0, 2)), (20, 12, (2, 5, 8, 11))],
)
def test_sam_hq_with_a_vit(window: int, depth: int, global_blocks: tuple[int, ...]) -> None:
    hq = package("segment_anything_hq")
    parts = importlib.import_module("segment_anything_hq.modeling")
    hq_decoder = importlib.import_module("segment_anything_hq.modeling.mask_decoder_hq")
    official = parts.Sam(
        parts.ImageEncoderViT(
            img_size=160, patch_size=8, embed_dim=40, depth=depth, num_heads=5, mlp_ratio=4, out_chans=64,
            qkv_bias=True, use_rel_pos=True, window_size=window, global_attn_indexes=global_blocks,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        ),
        parts.PromptEncoder(64, (20, 20), (160, 160), 16),
        hq_decoder.MaskDecoderHQ(
            transformer_dim=64, transformer=parts.TwoWayTransformer(2, 64, 8, 128), iou_head_hidden_dim=64, vit_dim=40
        ),
    )  # fmt: skip
    state = loaded(official, seed=4)
    compare(hq.SamPredictor(official), ours(detect(state), state))


def test_sam_hq_tiny() -> None:
    hq = package("segment_anything_hq")
    official = hq.sam_model_registry["vit_tiny"]()
    state = loaded(official, seed=5)
    compare(hq.SamPredictor(official), ours(detect(state), state))


def test_mobile_sam() -> None:
    mobile = package("mobile_sam")
    official = mobile.sam_model_registry["vit_t"]()
    state = loaded(official, seed=6)
    compare(mobile.SamPredictor(official), ours(detect(state), state))


@pytest.mark.parametrize(
    ("ratio", "expand", "windows"), [(2.5, 3.5, (7, 7, 14, 7)), (1.3, 4.0, (7, 8, 16, 7))]
)  # fmt: skip
def test_tiny_vit_of_other_sizes(ratio: float, expand: float, windows: tuple[int, ...]) -> None:
    mobile = package("mobile_sam")
    parts = importlib.import_module("mobile_sam.modeling")
    official = parts.Sam(
        parts.TinyViT(
            img_size=1024, in_chans=3, num_classes=10, embed_dims=[32, 64, 96, 320], depths=[1, 2, 1, 1],
            num_heads=[1, 2, 3, 10], window_sizes=list(windows), mlp_ratio=ratio, drop_rate=0.0, drop_path_rate=0.0,
            use_checkpoint=False, mbconv_expand_ratio=expand, local_conv_size=3, layer_lr_decay=0.8,
        ),
        parts.PromptEncoder(256, (64, 64), (1024, 1024), 16),
        parts.MaskDecoder(
            transformer_dim=256, num_multimask_outputs=3, transformer=parts.TwoWayTransformer(2, 256, 8, 512)
        ),
    )  # fmt: skip
    state = loaded(official, seed=7)
    compare(mobile.SamPredictor(official), ours(detect(state), state))
