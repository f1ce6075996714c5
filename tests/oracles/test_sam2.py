"""SAM 2 and SAM 2.1 against the official code: same weights, picture and prompts.

The package is in the extra ``oracles``; without it the tests are skipped.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from hypersam.sam.detect import detect
from hypersam.sam.families.sam2 import stability
from hypersam.sam.model import SamModel
from hypersam.sam.network import Prompts, sharing
from hypersam.sam.predictor import SamPredictor
from tests.hypersam.test_sam_vit import relative
from tests.oracles.test_sam_hq_and_tiny_vit import IMAGE, loaded, package


# Deprecations in what it is built with.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "variant"),
    [
        ("sam2/sam2_hiera_t", "sam2_hiera_tiny"),
        ("sam2/sam2_hiera_s", "sam2_hiera_small"),
        ("sam2.1/sam2.1_hiera_b+", "sam2.1_hiera_base_plus"),
        ("sam2.1/sam2.1_hiera_l", "sam2.1_hiera_large"),
    ],
)
def test_the_image_predictor(config: str, variant: str) -> None:
    package("sam2.build_sam")
    build = importlib.import_module("sam2.build_sam").build_sam2
    official_predictor = importlib.import_module("sam2.sam2_image_predictor").SAM2ImagePredictor
    official = build(f"configs/{config}.yaml", device="cpu")
    state = loaded(official, seed=8)
    found = detect(state)
    assert (found.variant, found.decided_by) == (variant, "shapes")
    network = sharing(found.described.network, found.config, state)
    model = SamModel(network, variant=variant, device=torch.device("cpu"), dtype=torch.float32)
    theirs, mine = official_predictor(official), SamPredictor(model)
    theirs.set_image(IMAGE)
    mine.set_image(IMAGE)
    assert relative(mine.get_image_embedding().numpy(), theirs.get_image_embedding().numpy()) < 1e-4
    points, labels = np.array([[30.0, 20.0], [90.0, 60.0], [50.5, 31.0]]), np.array([1, 0, 1])
    box = np.array([11.0, 9.0, 88.0, 61.0])
    mask = np.random.default_rng(1).normal(0, 5, (1, 256, 256)).astype(np.float32)
    ties = 0
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
            same = [relative(g, np.asarray(w)) < 1e-4 for w, g in zip(want, got, strict=True)]
            if not all(same) and not multimask and _near_the_threshold(model, mine, prompt):
                ties += 1
                continue
            assert all(same)
            assert [g.shape for g in got] == [w.shape for w in want]
    # The rule that takes the single mask or the best of three may be met to the last bit, once in a while.
    assert ties <= 1


def _near_the_threshold(model: SamModel, predictor: SamPredictor, prompt: dict[str, np.ndarray]) -> bool:
    embedding = predictor.embedding
    assert embedding is not None

    def scaled(values: np.ndarray) -> torch.Tensor:
        return model.scale_coordinates(torch.from_numpy(values), embedding)

    points = None
    if "point_coords" in prompt:
        points = scaled(prompt["point_coords"])[None], torch.from_numpy(prompt["point_labels"])[None]
    boxes = scaled(prompt["box"].reshape(2, 2)).reshape(1, 4) if "box" in prompt else None
    masks = torch.from_numpy(prompt["mask_input"])[None] if "mask_input" in prompt else None
    with torch.inference_mode():
        every, _ = model.network.every_mask(embedding.parts, Prompts(points, boxes, masks))
    return abs(float(stability(every[:, :1])) - 0.98) < 1e-3
