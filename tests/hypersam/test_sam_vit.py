"""Our SAM against segment-anything's own classes: the same weights, the same picture, the same prompts."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from segment_anything import SamPredictor as OfficialPredictor
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn

from hypersam.sam.detect import detect
from hypersam.sam.families.sam_vit import SamViT, SamViTConfig
from hypersam.sam.model import SamModel
from hypersam.sam.predictor import SamPredictor
from tests.models import TINY, ModelSize, official_sam

SIZES = [
    TINY,
    # A grid of 20 that the window of 7 does not divide, patches of 8, five heads.
    ModelSize(image=160, patch=8, dim=40, depth=3, heads=5, window=7, global_blocks=(1,), prompt_dim=64),
]
PICTURES = [(97, 140), (300, 200), (160, 160), (33, 500)]


def ours(official: Sam) -> SamPredictor:
    state = official.state_dict()
    detected = detect(state)
    with torch.device("meta"):
        network = SamViT(detected.config)
    network.load_state_dict(state, strict=True, assign=True)
    model = SamModel(network, variant=detected.variant, device=torch.device("cpu"), dtype=torch.float32)
    return SamPredictor(model)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", PICTURES)
def test_logits_and_scores_match_the_official_code(size: ModelSize, shape: tuple[int, int]) -> None:
    official = official_sam(size, seed=1)
    theirs, mine = OfficialPredictor(official), ours(official)
    rng = np.random.default_rng(shape[0])
    image = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs.set_image(image)
    mine.set_image(image)
    assert relative(mine.get_image_embedding().numpy(), theirs.get_image_embedding().numpy()) < 1e-4
    h, w = shape
    points, labels = np.array([[w * 0.3, h * 0.6], [w * 0.9, h * 0.1]]), np.array([1, 0])
    box = np.array([w * 0.1, h * 0.2, w * 0.7, h * 0.9])
    side = 4 * size.grid
    mask = rng.normal(0, 5, (1, side, side)).astype(np.float32)
    for prompt in (
        {"point_coords": points[:1], "point_labels": labels[:1]},
        {"point_coords": points, "point_labels": labels},
        {"box": box},
        {"point_coords": points, "point_labels": labels, "box": box},
        {"point_coords": points, "point_labels": labels, "mask_input": mask},
        {"mask_input": mask},
    ):
        for multimask in (True, False):
            want = theirs.predict(**prompt, multimask_output=multimask, return_logits=True)
            got = mine.predict(**prompt, multimask_output=multimask, return_logits=True)
            for w_, g in zip(want, got, strict=True):
                assert g.shape == w_.shape
                assert relative(g, w_) < 1e-4


def test_a_bounded_bias_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    big = ModelSize(image=192, patch=8, dim=32, depth=2, heads=2, window=6, global_blocks=(0, 1), prompt_dim=32)
    encoder = ours(official_sam(big, seed=2)).model.network.image_encoder
    x = torch.randn(2, 3, 192, 192)
    with torch.inference_mode():
        whole = encoder(x)
        monkeypatch.setattr("hypersam.sam.families.attention._SCORE_BYTES", 1)
        by_row = encoder(x)
    torch.testing.assert_close(by_row, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_the_configuration_is_read_off_the_shapes(size: ModelSize) -> None:
    config = detect(official_sam(size).state_dict()).config
    assert config.image_size == size.image
    assert config.heads == size.heads
    assert [i for i, w in enumerate(config.windows) if not w] == list(size.global_blocks)
    assert SamViTConfig.from_dict(config.as_dict()) == config


@pytest.mark.parametrize(
    ("variant", "dim", "depth", "heads", "everywhere"),
    [
        ("sam_vit_b", 768, 12, 12, (2, 5, 8, 11)),
        ("sam_vit_l", 1024, 24, 16, (5, 11, 17, 23)),
        ("sam_vit_h", 1280, 32, 16, (7, 15, 23, 31)),
    ],
)
def test_the_published_sizes_are_recognised(
    variant: str, dim: int, depth: int, heads: int, everywhere: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        official = Sam(
            ImageEncoderViT(
                img_size=1024, patch_size=16, embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=4, out_chans=256,
                qkv_bias=True, use_rel_pos=True, window_size=14, global_attn_indexes=everywhere,
                norm_layer=partial(nn.LayerNorm, eps=1e-6),
            ),
            PromptEncoder(256, (64, 64), (1024, 1024), 16),
            MaskDecoder(transformer_dim=256, transformer=TwoWayTransformer(2, 256, 8, 2048)),
        )  # fmt: skip
    detected = detect(official.state_dict())
    assert detected.variant == variant
    assert [i for i, w in enumerate(detected.config.windows) if not w] == list(everywhere)
