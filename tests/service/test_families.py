"""Every family through POST /segment: what it can be asked is answered, and what it cannot is a 422 that says so.

The table is that of ``docs/families.md``; the models are tiny, with random weights, for pictures of 256 pixels.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from anyio.from_thread import start_blocking_portal

import hypersam
from benchmarks import random_sam
from hypersam.cli.offline import run_segment
from hypersam.errors import UnsupportedPrompt
from hypersam.sam import detect
from hypersam.sam.families import edge_sam, efficient_sam, sam2, tiny_vit
from hypersam.sam.registry import VARIANTS
from hypersam.settings import Settings
from hypersam.store import open_store
from service.app import create_app
from tests.hypersam.test_edge_sam import SHALLOW
from tests.hypersam.test_efficient_sam import SMALL as EFFICIENT
from tests.hypersam.test_sam2 import SMALL as SAM2
from tests.hypersam.test_tiny_vit import NETWORKS
from tests.models import official_sam
from tests.service.running import assert_problem, picture

Ask = Callable[..., httpx.Response]
SIDE = 256
MODELS = {
    "sam": "sam_vit", "sam-hq": "sam_hq_vit", "sam-2": "sam2_hiera", "mobile-sam": "mobile_sam", "tiny-sam": "tiny_sam",
    "sam-hq-tiny": "sam_hq_tiny_vit", "edge-sam": "edge_sam", "efficient-sam": "efficient_sam",
}  # fmt: skip
"""The model's name here, and the variant that it is."""
POINT = {"points": [[30, 20]], "point_labels": [1]}
BACKGROUND = {"points": [[30, 20], [60, 40]], "point_labels": [1, 0]}
SIX = {"points": [[x, 20] for x in range(10, 70, 10)], "point_labels": [1] * 6}
SEVEN = {"points": [[x, 20] for x in range(10, 80, 10)], "point_labels": [1] * 7}
BOX = {"box": [5, 8, 90, 60]}
FEATURES: dict[str, dict[str, Any]] = {
    "a point": POINT, "background points": BACKGROUND, "six points": SIX, "seven points": SEVEN, "a box": BOX,
    "a box and points": BACKGROUND | BOX, "a box and six points inside": SIX | BOX,
    "a mask input": {"mask_input": None},
    "a point and a mask input": POINT | {"mask_input": None},
}  # fmt: skip
REFUSED = {
    "background points": ("EfficientSAM takes no background points", "point_labels"),
    "seven points": ("EfficientSAM takes at most 6 points (a box counts as two), got 7", "points"),
    "a box and points": ("EfficientSAM takes no background points", "point_labels"),
    "a box and six points inside": ("EfficientSAM takes at most 6 points (a box counts as two), got 8", "points"),
    "a mask input": ("EfficientSAM takes no mask input", "mask_input"),
    "a point and a mask input": ("EfficientSAM takes no mask input", "mask_input"),
}
"""Of ``efficient-sam``; every other family takes them all."""
ONE_AND_MANY = {"sam-hq": (1, 1), "sam-hq-tiny": (1, 1), "tiny-sam": (3, 3)}
"""Masks without and with ``multimask``, where it is not 1 and 3."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """The service in this process, without Redis, with a model of every family."""
    folder = tmp_path_factory.mktemp("families")
    settings = Settings(data_dir=folder, redis_url="unix:///nowhere.sock", device="cpu", register_default=False)
    store = open_store(settings)
    networks = NETWORKS | {
        "mobile_sam": NETWORKS["sam_tiny_vit"], "tiny_sam": NETWORKS["sam_tiny_vit"], "sam2_hiera": (sam2.Sam2, SAM2),
        "edge_sam": (edge_sam.EdgeSam, SHALLOW), "efficient_sam": (efficient_sam.EfficientSam, EFFICIENT),
    }  # fmt: skip
    any_size = tuple(replace(row, marks=()) if row.family == "sam_tiny_vit" else row for row in VARIANTS)
    with pytest.MonkeyPatch.context() as patch:
        # What does not show in shapes is that of the published models; here it is small.
        for module, name in ((edge_sam, "_INPUT"), (efficient_sam, "_INPUT"), (tiny_vit, "_IMAGE_SIZE")):
            patch.setattr(module, name, SIDE)
        patch.setattr(sam2, "_IMAGE_SIZE", SAM2.image_size)
        patch.setitem(sam2._PUBLISHED, (SAM2.embed_dim, SAM2.stages), (1, SAM2.global_blocks, SAM2.windows))
        patch.setattr(detect, "VARIANTS", any_size)
        for name, variant in MODELS.items():
            state = official_sam().state_dict() if name == "sam" else random_sam.spread(*networks[variant], seed=1)
            torch.save(state, folder / f"{name}.pth")
            with store.work_dir(name) as work:
                made, options = work / "model.hsam", {"fidelity": False, "nodes": 1}
                report = hypersam.compress(
                    folder / f"{name}.pth", made, codec="birkhoff", variant=variant, options=options
                ).as_dict()
                digest = report["artifact_sha256"]
                store.register(name, made, digest=digest, request=name, source_sha256="0" * 64, report=report)
        with start_blocking_portal() as portal, portal.wrap_async_context_manager(_served(settings)) as client:

            def ask(path: str, body: dict[str, Any] | None = None) -> httpx.Response:
                return portal.call(lambda: client.post(path, json=body) if body else client.get(path))

            yield ask


@asynccontextmanager
async def _served(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(settings)
    async with app.router.lifespan_context(app) as state:

        async def served(scope: Any, receive: Any, send: Any) -> None:
            await app({**scope, "state": dict(state or {})}, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(served), base_url="http://test") as client:
            yield client


def side(ask: Ask, model: str, image: str) -> int:
    """Of a model's mask inputs: that of its low-resolution logits."""
    answer = ask("/segment", {"model": model, "image": image, "format": "npy", **POINT})
    assert answer.status_code == 200, answer.text
    return int(np.load(io.BytesIO(base64.b64decode(answer.json()["masks"][0]["segmentation"]))).shape[-1])


@pytest.mark.parametrize("model", MODELS)
def test_a_family_is_asked_what_it_can_be_asked(models: Ask, model: str) -> None:
    image = base64.b64encode(picture(96, 64)).decode()
    logits = np.random.default_rng(1).normal(0, 5, (side(models, model, image),) * 2).tolist()
    for feature, asked in FEATURES.items():
        prompt = asked | ({"mask_input": logits} if "mask_input" in asked else {})
        for multimask, count in zip((False, True), ONE_AND_MANY.get(model, (1, 3)), strict=True):
            body = {"model": model, "image": image, "multimask": multimask, "prompts": [prompt]}
            response = models("/segment", body)
            if model == "efficient-sam" and feature in REFUSED:
                says, field = REFUSED[feature]
                problem = assert_problem(response, 422, "unsupported_prompt")
                assert says in problem["detail"]
                assert problem["errors"][0]["loc"] == ["prompts", "0", field]
            else:
                assert response.status_code == 200, (feature, response.text)
                assert len(response.json()["masks"]) == count, feature


@pytest.mark.parametrize("said", ["background points", "seven points"])
def test_the_command_says_the_same(models: Ask, said: str, tmp_path: Path) -> None:
    artifact, image = tmp_path / "efficient.hsam", tmp_path / "a.png"
    artifact.write_bytes(models("/models/efficient-sam/artifact").content)
    image.write_bytes(picture(96, 64))
    pairs = zip(FEATURES[said]["points"], FEATURES[said]["point_labels"], strict=True)
    points = [f"{x},{y},{label}" for (x, y), label in pairs]
    with pytest.raises(UnsupportedPrompt, match=re.escape(REFUSED[said][0])):
        run_segment(artifact, image, points, None, None, True, "cpu", True)
