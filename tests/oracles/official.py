"""What the tests against other projects' networks share: their packages, weights for them, and the comparison.

The packages are in the extra ``oracles``, and `make oracles` makes an environment with them. Without them the tests
are skipped, unless ``REQUIRE_ORACLES`` is set: then a package that does not import fails its tests.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks import random_sam
from hypersam.sam.detect import Detected
from hypersam.sam.model import SamModel
from hypersam.sam.network import sharing
from hypersam.sam.predictor import SamPredictor
from tests.hypersam.test_sam_vit import relative

IMAGE = np.random.default_rng(7).integers(0, 256, (70, 101, 3), dtype=np.uint8)
TOLERANCE = 1e-4
Prompt = Mapping[str, NDArray[Any]]


def package(name: str) -> ModuleType:
    with warnings.catch_warnings():
        # Deprecations and double registrations of its own.
        warnings.simplefilter("ignore")
        if not os.environ.get("REQUIRE_ORACLES"):
            pytest.importorskip(name, reason=f"{name} is not installed (make oracles)", exc_type=ImportError)
        return importlib.import_module(name)


def loaded(official: nn.Module, *, seed: int) -> dict[str, torch.Tensor]:
    """Fill the official model with weights spread like trained ones."""
    state = random_sam.spread_like(official, seed=seed)
    official.load_state_dict(state, strict=True)
    # TinyViT keeps its biases as they were when it was last switched to inference.
    official.train()
    official.eval().requires_grad_(False)
    return state


def ours(found: Detected, state: Mapping[str, torch.Tensor]) -> SamPredictor:
    network = sharing(found.described.network, found.config, state)
    return SamPredictor(SamModel(network, variant=found.variant, device=torch.device("cpu"), dtype=torch.float32))


def prompts(side: int) -> list[Prompt]:
    """A point, several with background, a box, a box and points, a point and a mask, a mask alone."""
    points, labels = np.array([[30.0, 20.0], [90.0, 60.0], [50.5, 31.0]]), np.array([1, 0, 1])
    point = {"point_coords": points[:1], "point_labels": labels[:1]}
    several = {"point_coords": points, "point_labels": labels}
    box = {"box": np.array([11.0, 9.0, 88.0, 61.0])}
    mask = {"mask_input": np.random.default_rng(1).normal(0, 5, (1, side, side)).astype(np.float32)}
    return [point, several, box, several | box, point | mask, mask]


def compare(theirs: Any, mine: SamPredictor, *, tie: Callable[[Prompt], bool] = lambda _: False) -> int:
    """Hold every answer against the official predictor's; the number of single masks that ``tie`` excuses."""
    theirs.set_image(IMAGE)
    mine.set_image(IMAGE)
    assert relative(mine.get_image_embedding().numpy(), theirs.get_image_embedding().numpy()) < TOLERANCE
    ties = 0
    for prompt in prompts(mine.model.low_res):
        for multimask in (True, False):
            want = theirs.predict(**prompt, multimask_output=multimask, return_logits=True)
            got = mine.predict(**prompt, multimask_output=multimask, return_logits=True)
            assert [g.shape for g in got] == [w.shape for w in want]
            errors = [relative(g, np.asarray(w)) for g, w in zip(got, want, strict=True)]
            if max(errors) >= TOLERANCE and not multimask and tie(prompt):
                ties += 1
                continue
            assert max(errors) < TOLERANCE, f"{sorted(prompt)}, multimask {multimask}: masks, scores, logits {errors}"
    return ties
