"""SAM 2 and SAM 2.1 against the official code: same weights, picture and prompts."""

from __future__ import annotations

import importlib
import os

import pytest
import torch

from hypersam.sam.detect import detect
from hypersam.sam.families import sam2
from hypersam.sam.families.sam2 import stability
from hypersam.sam.network import Prompts
from hypersam.sam.predictor import SamPredictor
from tests.oracles.official import Prompt, compare, loaded, ours, package

TINY, SMALL = "sam2/sam2_hiera_t", "sam2.1/sam2.1_hiera_s"
BASE, LARGE = "sam2.1/sam2.1_hiera_b+", "sam2/sam2_hiera_l"
# The larger two with fewer blocks: the same widths, heads, windows and position tables in a quarter of the time.
SHORT = (1, 2, 4, 1)
whole = pytest.mark.skipif("ALL_SIZES" not in os.environ, reason="the large ones whole take minutes (ALL_SIZES=1)")


# Deprecations in what it is built with.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "variant", "stages"),
    [
        (TINY, "sam2_hiera_tiny", None),
        (BASE, "sam2_hiera", SHORT),
        (LARGE, "sam2_hiera", SHORT),
        pytest.param(SMALL, "sam2.1_hiera_small", None, marks=whole),
        pytest.param(BASE, "sam2.1_hiera_base_plus", None, marks=whole),
        pytest.param(LARGE, "sam2_hiera_large", None, marks=whole),
    ],
)
def test_the_image_predictor(
    config: str, variant: str, stages: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    package("sam2.build_sam")
    build = importlib.import_module("sam2.build_sam").build_sam2
    official_predictor = importlib.import_module("sam2.sam2_image_predictor").SAM2ImagePredictor
    overrides = []
    if stages:
        dim = {BASE: 112, LARGE: 144}[config]
        # Heads and windows do not show in shapes; this size is made one of the known ones.
        windows = {BASE: (8, 4, 14, 7), LARGE: (8, 4, 16, 8)}[config]
        monkeypatch.setitem(sam2._PUBLISHED, (dim, stages), (2, (4, 6), windows))
        overrides = [f"++model.image_encoder.trunk.stages={list(stages)}",
                     "++model.image_encoder.trunk.global_att_blocks=[4,6]"]  # fmt: skip
    official = build(f"configs/{config}.yaml", device="cpu", hydra_overrides_extra=overrides)
    state = loaded(official, seed=8)
    found = detect(state)
    assert (found.variant, found.decided_by) == (variant, "shapes")
    mine = ours(found, state)
    # The rule that takes the single mask or the best of three may be met to the last bit, once in a while.
    assert compare(official_predictor(official), mine, tie=lambda prompt: _near_the_threshold(mine, prompt)) <= 1


def _near_the_threshold(predictor: SamPredictor, prompt: Prompt) -> bool:
    model, embedding = predictor.model, predictor.embedding

    def scaled(values: torch.Tensor) -> torch.Tensor:
        return model.scale_coordinates(values, embedding)

    given = {name: torch.from_numpy(values) for name, values in prompt.items()}
    points = boxes = None
    if "point_coords" in given:
        points = scaled(given["point_coords"])[None], given["point_labels"][None]
    if "box" in given:
        boxes = scaled(given["box"].reshape(2, 2)).reshape(1, 4)
    masks = given["mask_input"][None] if "mask_input" in given else None
    with torch.inference_mode():
        every, _ = model.network.every_mask(embedding.parts, Prompts(points, boxes, masks))
    return abs(float(stability(every[:, :1])) - 0.98) < 1e-3
