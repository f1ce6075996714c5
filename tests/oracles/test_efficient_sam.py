"""EfficientSAM beside the official code: the same weights, the same picture, the same prompts.

The official repository (github.com/yformer/EfficientSAM) is on no package index: put its folder on PYTHONPATH.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.random_sam import spread_like
from hypersam.sam.detect import detect
from hypersam.sam.model import SamModel
from hypersam.sam.predictor import SamPredictor

official = pytest.importorskip(
    "efficient_sam.efficient_sam", reason="the official EfficientSAM repository is not on PYTHONPATH"
)

POINT = {"point_coords": np.array([[60.0, 20.0]]), "point_labels": np.array([1])}
POINTS = {"point_coords": np.array([[60.0, 20.0], [81.5, 40.25], [5.0, 77.0]]), "point_labels": np.array([1, 1, 1])}
OUTSIDE = {"point_coords": np.array([[-4.0, 30.0], [60.0, 20.0]]), "point_labels": np.array([1, 1])}
BOX = {"box": np.array([5.0, 8.0, 120.0, 70.0])}


def relative(got: np.ndarray, want: torch.Tensor) -> float:
    return float((torch.from_numpy(got) - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(("variant", "width"), [("efficient_sam_ti", 192), ("efficient_sam_s", 384)])
def test_logits_and_scores_match_the_official_code(variant: str, width: int) -> None:
    theirs = official.build_efficient_sam(encoder_patch_embed_dim=width, encoder_num_heads=width // 64).eval()
    detected = detect(theirs.state_dict())
    assert detected.variant == variant
    network = detected.described.on_meta(detected.config)
    state = spread_like(network, seed=4)
    theirs.load_state_dict(state, strict=True)
    network.load_state_dict(state, strict=True, assign=True)
    mine = SamPredictor(SamModel(network, variant=variant, device=torch.device("cpu"), dtype=torch.float32))
    image = np.random.default_rng(0).integers(0, 256, (90, 140, 3), dtype=np.uint8)
    mine.set_image(image)
    with torch.inference_mode():
        embedding = theirs.get_image_embeddings(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
        assert relative(mine.get_image_embedding().numpy(), embedding) < 1e-4
        for prompt in (POINT, POINTS, OUTSIDE, BOX, POINT | BOX, POINTS | BOX):
            points = torch.from_numpy(np.array(prompt.get("point_coords", np.zeros((0, 2))))).float()
            labels = torch.from_numpy(np.array(prompt.get("point_labels", np.zeros(0)))).float()
            if "box" in prompt:
                points = torch.cat([points, torch.from_numpy(prompt["box"]).float().view(2, 2)])
                labels = torch.cat([labels, torch.tensor([2.0, 3.0])])
            for multimask in (True, False):
                got = mine.predict(**prompt, multimask_output=multimask, return_logits=True)
                for size, answer in (((90, 140), got[0]), ((-1, -1), got[2])):
                    masks, iou = theirs.predict_masks(
                        embedding, points[None, None], labels[None, None], multimask, 90, 140, *size
                    )
                    assert answer.shape == masks[0, 0].shape
                    assert relative(answer, masks[0, 0]) < 1e-4
                assert relative(got[1], iou[0, 0]) < 1e-4
