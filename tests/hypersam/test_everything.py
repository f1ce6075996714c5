"""All masks of a picture, against segment-anything's own generator on the same dense weights."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam

from hypersam.engine import Engine, Everything, Found, Grid, ModelFile, Prompt, decoding, everything
from hypersam.sam.detect import detect
from hypersam.sam.model import Embedding, SamModel
from hypersam.settings import Settings
from tests.models import ModelSize, official_sam

ASSETS = files("hypersam") / "assets"


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    with Image.open(io.BytesIO((ASSETS / "scenes" / "scene_0.png").read_bytes())) as image:
        return np.asarray(image.convert("RGB"))[:180, :]


@pytest.fixture(scope="module")
def dense() -> tuple[ModelFile, Sam]:
    """The carried small SAM, as the engine serves its checkpoint and in segment-anything's own classes."""
    path = Path(str(ASSETS / "small_sam.pth"))
    state = torch.load(path, weights_only=True)
    config = detect(state, name=path.name).config
    size = ModelSize(
        image=config.image_size, patch=config.patch, dim=config.embed_dim, depth=config.depth, heads=config.heads,
        window=max(config.windows), prompt_dim=config.decoder.dim,
        global_blocks=tuple(i for i, window in enumerate(config.windows) if not window),
    )  # fmt: skip
    sam = official_sam(size, mlp_dim=config.decoder.mlp_dim, iou_hidden=config.decoder.iou_hidden)
    sam.load_state_dict(state)
    return ModelFile("dense", path, "d" * 64), sam


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = Engine(Settings(data_dir=tmp_path, device="cpu"))
    yield made
    made.close()


def ask(
    engine: Engine, file: ModelFile, image: np.ndarray | None, grid: Grid, image_id: str | None = None
) -> Everything:
    return asyncio.run(engine.everything(file, image, grid, image_id=image_id))


def test_the_masks_are_those_of_the_original(engine: Engine, dense: tuple[ModelFile, Sam], scene: np.ndarray) -> None:
    file, sam = dense
    for iou, stability, nms in ((0.01, 0.01, 0.95), (0.3, 0.5, 0.7), (0.5, 0.3, 0.4)):
        theirs = SamAutomaticMaskGenerator(
            sam, points_per_side=7, points_per_batch=17, pred_iou_thresh=iou, stability_score_thresh=stability,
            box_nms_thresh=nms, output_mode="binary_mask",
        )  # fmt: skip
        with torch.inference_mode():
            wanted = theirs.generate(scene)
        answer = ask(engine, file, scene, Grid(7, iou, stability, box_nms_thresh=nms))
        assert (answer.width, answer.height) == (scene.shape[1], scene.shape[0])
        assert len(wanted) >= 3
        # A score within rounding of a threshold, or a box's IoU of the suppression's, may fall to either side.
        pairs = [(a, b) for b in wanted for a in answer.masks if same(a, b)]
        odd = max(1, len(wanted) // 50)
        assert len(wanted) - len(pairs) <= odd
        assert len(answer.masks) - len(pairs) <= odd
        for mine, other in pairs:
            assert mine.score == pytest.approx(other["predicted_iou"], abs=1e-4)
            assert mine.stability == pytest.approx(other["stability_score"], abs=2e-3)
            assert mine.area == pytest.approx(other["area"], abs=10)
            x, y, w, h = other["bbox"]  # theirs has the width to the last pixel, COCO's is one more
            assert mine.bbox == pytest.approx((x, y, w + 1, h + 1), abs=1)
        assert [m.score for m in answer.masks] == sorted((m.score for m in answer.masks), reverse=True)


def same(mine: Found, other: dict[str, Any]) -> bool:
    """The same mask found by the same click."""
    there = mine.point == pytest.approx(other["point_coords"][0])
    return there and bool((mine.mask != other["segmentation"]).mean() < 2e-4)


def test_nothing_passes(engine: Engine, dense: tuple[ModelFile, Sam], scene: np.ndarray) -> None:
    answer = ask(engine, dense[0], scene, Grid(4, pred_iou_thresh=1e9))
    assert answer.masks == ()
    again = ask(engine, dense[0], None, Grid(4, pred_iou_thresh=1e9), answer.image_id)
    assert (answer.lookup, again.lookup) == ("miss", "hit")


@pytest.mark.parametrize("masks", [1, 2, 5])
def test_masks_in_small_parts(
    engine: Engine, dense: tuple[ModelFile, Sam], scene: np.ndarray, masks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(7, 0.3, 0.5)
    whole = ask(engine, dense[0], scene, grid)
    assert len(whole.masks) > 5
    monkeypatch.setattr(everything, "PIXELS_AT_ONCE", masks * scene.shape[0] * scene.shape[1])
    parts = ask(engine, dense[0], scene, grid)
    assert [(m.point, m.rle, m.bbox) for m in parts.masks] == [(m.point, m.rle, m.bbox) for m in whole.masks]


def test_one_mask_that_passes(engine: Engine, dense: tuple[ModelFile, Sam], scene: np.ndarray) -> None:
    every = ask(engine, dense[0], scene, Grid(7, 0.3, 0.5))
    best = every.masks[0]
    found = ask(engine, dense[0], scene, Grid(7, (best.score + every.masks[1].score) / 2, 0.5)).masks
    assert [(m.point, m.rle) for m in found] == [(best.point, best.rle)]


@pytest.mark.parametrize("everything_there_is", [True, False])
def test_masks_are_no_longer_made_when_the_caller_leaves(
    engine: Engine, dense: tuple[ModelFile, Sam], scene: np.ndarray, everything_there_is: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    upscale, made = SamModel.upscale, threading.Semaphore(0)
    count = 0

    def slow(model: SamModel, low_res: torch.Tensor, embedding: Embedding) -> torch.Tensor:
        nonlocal count
        count += 1
        made.release()
        time.sleep(0.05)
        return upscale(model, low_res, embedding)

    for module in (everything, decoding):
        monkeypatch.setattr(module, "PIXELS_AT_ONCE", 1)
    monkeypatch.setattr(SamModel, "upscale", slow)

    async def leave() -> None:
        if everything_there_is:
            work = engine.everything(dense[0], scene, Grid(8, -1e9, -1))
        else:
            prompts = [Prompt(points=((float(n), 5.0),), labels=(1,)) for n in range(60)]
            work = engine.segment(dense[0], scene, prompts, multimask=True)
        task = asyncio.create_task(work)
        await asyncio.to_thread(made.acquire)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    engine.close()  # what still runs ends
    assert count <= 3


def test_a_grid_leaves_when_its_caller_does(engine: Engine, dense: tuple[ModelFile, Sam], scene: np.ndarray) -> None:
    async def leave() -> None:
        task = asyncio.create_task(engine.everything(dense[0], scene, Grid(64)))
        while not engine.stats()["lookups"]:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    # Its next step is dropped by the thread that comes to it, which may be at work on the last one still.
    deadline = time.monotonic() + 30
    while (stats := engine.stats())["queued"]["decode"] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (stats["waiting"], stats["queued"]["decode"], stats["abandoned"]) == (0, 0, 1)
