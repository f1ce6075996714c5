"""All masks of a picture, against segment-anything's own generator on the same dense weights."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import Sam

from hypersam.engine import Engine, Everything, Grid, ModelFile
from hypersam.sam.detect import detect
from hypersam.settings import Settings
from tests.models import ModelSize, official_sam, save_checkpoint

SIZE = ModelSize(image=128, patch=8, dim=48, depth=2, heads=2, window=4, global_blocks=(1,), prompt_dim=32)


@pytest.fixture(scope="module")
def scene() -> np.ndarray:
    data = (files("hypersam") / "assets" / "scenes" / "scene_0.png").read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB").resize((180, 130)))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFile, Sam]:
    """The engine serves an ordinary checkpoint as well, so both sides compute with the same weights."""
    path = save_checkpoint(tmp_path_factory.mktemp("dense") / "dense.pth", SIZE)
    assert detect(official_sam(SIZE).state_dict(), name="dense.pth").variant == "sam_vit"
    return ModelFile("dense", path, "d" * 64), official_sam(SIZE)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    made = Engine(Settings(data_dir=tmp_path, device="cpu"))
    yield made
    made.close()


def ask(engine: Engine, file: ModelFile, image: np.ndarray | None, grid: Grid, image_id: str | None = None) -> Everything:
    return asyncio.run(engine.everything(file, image, grid, image_id=image_id))


def thresholds(engine: Engine, file: ModelFile, image: np.ndarray, side: int) -> tuple[float, float]:
    """Medians of a random model's scores, so that each filter both keeps and drops."""
    loose = Grid(side, pred_iou_thresh=-100, stability_score_thresh=-1, box_nms_thresh=1.0)
    found = ask(engine, file, image, loose).masks
    assert len(found) == 3 * side * side
    return float(np.median([m.score for m in found])), float(np.median([m.stability for m in found]))


def test_the_masks_are_those_of_the_original(engine: Engine, dense: tuple[ModelFile, Sam], scene: np.ndarray) -> None:
    file, sam = dense
    iou, stability = thresholds(engine, file, scene, 9)
    for nms in (0.95, 0.7):
        theirs = SamAutomaticMaskGenerator(
            sam, points_per_side=9, points_per_batch=17, pred_iou_thresh=iou, stability_score_thresh=stability,
            box_nms_thresh=nms, output_mode="binary_mask",
        )  # fmt: skip
        with torch.inference_mode():
            wanted = theirs.generate(scene)
        answer = ask(engine, file, scene, Grid(9, iou, stability, box_nms_thresh=nms))
        assert (answer.width, answer.height) == (180, 130)
        mine = answer.masks
        assert len(wanted) >= 3
        assert len(mine) == len(wanted)
        for a, b in zip(mine, wanted, strict=True):
            assert (a.mask != b["segmentation"]).mean() < 1e-3
            assert a.score == pytest.approx(b["predicted_iou"], abs=1e-5)
            assert a.stability == pytest.approx(b["stability_score"], abs=1e-3)
            assert a.point == pytest.approx(b["point_coords"][0])
            assert a.area == pytest.approx(b["area"], abs=20)
            x, y, w, h = b["bbox"]
            if a.area:
                assert a.bbox == pytest.approx((x, y, w + 1, h + 1), abs=2)


def test_nothing_passes(engine: Engine, dense: tuple[ModelFile, Sam], scene: np.ndarray) -> None:
    answer = ask(engine, dense[0], scene, Grid(4, pred_iou_thresh=1e9))
    assert answer.masks == ()
    again = ask(engine, dense[0], None, Grid(4, pred_iou_thresh=1e9), answer.image_id)
    assert (answer.lookup, again.lookup) == ("miss", "hit")


def test_a_grid_leaves_when_its_caller_does(engine: Engine, dense: tuple[ModelFile, Sam], scene: np.ndarray) -> None:
    async def leave() -> None:
        task = asyncio.create_task(engine.everything(dense[0], scene, Grid(64)))
        while not engine.stats()["lookups"]:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    stats = engine.stats()
    assert (stats["waiting"], stats["queued"]["decode"], stats["abandoned"]) == (0, 0, 1)
