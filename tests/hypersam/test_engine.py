"""The engine: prompts, cache, bounds, and the event loop staying free."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import hypersam
from hypersam.compression import compress
from hypersam.engine import Engine, ModelFile, Prompt, bounding_box, image_id_of
from hypersam.errors import Overloaded, PromptError, UnknownImage, UnknownModel
from hypersam.settings import Settings
from tests.models import TINY, ModelSize, save_checkpoint

POINT = Prompt(points=((20.0, 30.0),), labels=(1,))
BOX = Prompt(box=(5.0, 6.0, 40.0, 41.0))


def picture(seed: int = 0, h: int = 50, w: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    folder = tmp_path_factory.mktemp("engine")
    report = compress(save_checkpoint(folder / "a.pth"), folder / "a.hsam")
    return ModelFile("a", folder / "a.hsam", report.artifact_sha256)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(Settings(data_dir=tmp_path, device="cpu"))
    yield engine
    engine.close()


def test_answers_are_those_of_the_predictor(engine: Engine, model: ModelFile) -> None:
    image = picture()
    predictor = hypersam.load(model.path, device="cpu")
    predictor.set_image(image)
    prompts = [POINT, BOX, Prompt(points=POINT.points, labels=(0,), box=BOX.box), POINT]
    answer = engine.segment_sync(model, image, prompts, multimask=True)
    assert (answer.width, answer.height, answer.cached) == (60, 50, False)
    assert [m.prompt for m in answer.masks] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for number, prompt in enumerate(prompts):
        masks, scores, _ = predictor.predict(
            point_coords=np.array(prompt.points) if prompt.points else None,
            point_labels=np.array(prompt.labels) if prompt.points else None,
            box=None if prompt.box is None else np.array(prompt.box),
        )
        mine = [m for m in answer.masks if m.prompt == number]
        order = np.argsort(-scores, kind="stable")
        assert [m.score for m in mine] == pytest.approx(scores[order], abs=1e-5)
        for m, i in zip(mine, order, strict=True):
            assert (m.mask != masks[i]).mean() < 1e-3
            assert m.area == m.mask.sum()
            assert m.bbox == bounding_box(m.mask)


def test_one_mask_without_multimask(engine: Engine, model: ModelFile) -> None:
    assert len(engine.segment_sync(model, picture(), [POINT], multimask=False).masks) == 1


def test_an_embedding_is_made_once(engine: Engine, model: ModelFile) -> None:
    first = engine.segment_sync(model, picture(), [POINT], multimask=True)
    again = engine.segment_sync(model, picture(), [BOX], multimask=True)
    by_id = engine.segment_sync(model, None, [BOX], multimask=True, image_id=first.image_id)
    assert (first.cached, again.cached, by_id.cached) == (False, True, True)
    assert first.image_id == again.image_id == by_id.image_id == image_id_of(picture())
    assert by_id.masks[0].score == again.masks[0].score
    assert engine.stats()["lookups"] == {("a", "miss"): 1, ("a", "hit"): 2}
    with pytest.raises(UnknownImage):
        engine.segment_sync(model, None, [BOX], multimask=True, image_id="0" * 32)
    engine.forget(model.digest)
    with pytest.raises(UnknownImage):
        engine.segment_sync(model, None, [BOX], multimask=True, image_id=first.image_id)


def test_pictures_of_other_shape_or_pixels_have_other_ids() -> None:
    flat = np.zeros((2, 6, 3), np.uint8)
    assert len({image_id_of(flat), image_id_of(flat.reshape(6, 2, 3)), image_id_of(flat + 1)}) == 3


def test_the_caches_stay_within_their_bounds(tmp_path: Path) -> None:
    files = []
    for seed in range(3):
        report = compress(save_checkpoint(tmp_path / f"{seed}.pth", seed=seed), tmp_path / f"{seed}.hsam")
        files.append(ModelFile(str(seed), tmp_path / f"{seed}.hsam", report.artifact_sha256))
    embedding = 4 * TINY.prompt_dim * TINY.grid**2
    engine = Engine(Settings(data_dir=tmp_path, embedding_cache_bytes=2 * embedding, resident_bytes=1))
    try:
        for seed in range(4):
            for file in files:
                engine.segment_sync(file, picture(seed), [POINT], multimask=True)
        stats = engine.stats()
        assert stats["resident_models"] == 1
        assert stats["embeddings"] == 2
        assert stats["embedding_bytes"] == 2 * embedding
        assert stats["model_loads"] == 12
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (Prompt(), "points"),
        (Prompt(points=((1.0, 1.0),), labels=()), "labels"),
        (Prompt(points=((1.0, 1.0),), labels=(2,)), "label"),
        (Prompt(points=((61.0, 1.0),), labels=(1,)), "outside"),
        (Prompt(points=((-0.5, 1.0),), labels=(1,)), "outside"),
        (Prompt(points=((float("nan"), 1.0),), labels=(1,)), "outside"),
        (Prompt(box=(10.0, 10.0, 5.0, 20.0)), "x0 < x1"),
        (Prompt(box=(0.0, 0.0, 61.0, 20.0)), "inside"),
        (Prompt(box=(0.0, 0.0, 10.0, float("inf"))), "inside"),
        (Prompt(mask_input=np.zeros((4, 4), np.float32)), "logits"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(engine: Engine, model: ModelFile, prompt: Prompt, said: str) -> None:
    with pytest.raises(PromptError, match=said):
        engine.segment_sync(model, picture(), [prompt], multimask=True)


def test_a_model_deleted_meanwhile_is_unknown(engine: Engine, tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match="deleted"):
        engine.segment_sync(ModelFile("gone", tmp_path / "gone.hsam", "0" * 64), picture(), [POINT], multimask=True)


def test_masks_of_a_request_are_bounded(engine: Engine, model: ModelFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hypersam.engine.engine.MASK_BYTES", 2 * 3 * 50 * 60)
    assert len(engine.segment_sync(model, picture(), [POINT, BOX], multimask=True).masks) == 6
    with pytest.raises(PromptError, match="fewer prompts"):
        engine.segment_sync(model, picture(), [POINT, BOX, BOX], multimask=True)


def test_points_on_the_edges_are_inside(engine: Engine, model: ModelFile) -> None:
    corners = Prompt(points=((0.0, 0.0), (60.0, 50.0)), labels=(1, 0), box=(0.0, 0.0, 60.0, 50.0))
    assert engine.segment_sync(model, picture(), [corners], multimask=True).masks


def test_the_event_loop_stays_free_while_an_encoder_runs(tmp_path: Path) -> None:
    slow = ModelSize(image=256, patch=8, dim=128, depth=6, heads=4, window=8, global_blocks=(1, 3, 5), prompt_dim=64)
    report = compress(save_checkpoint(tmp_path / "slow.pth", slow), tmp_path / "slow.hsam")
    file = ModelFile("slow", tmp_path / "slow.hsam", report.artifact_sha256)
    engine = Engine(Settings(data_dir=tmp_path, device="cpu"))

    async def watch() -> tuple[float, int]:
        began = time.perf_counter()
        running = asyncio.gather(*(engine.segment(file, picture(seed), [POINT], multimask=True) for seed in range(3)))
        ticks = 0
        while not running.done():
            await asyncio.sleep(0.005)
            ticks += 1
        await running
        return time.perf_counter() - began, ticks

    try:
        took, ticks = asyncio.run(watch())
    finally:
        engine.close()
    assert ticks > 10 * took  # at a blocked loop there would be a handful


def test_more_than_may_wait_is_refused(tmp_path: Path, model: ModelFile) -> None:
    engine = Engine(Settings(data_dir=tmp_path, device="cpu", max_waiting=2))

    async def crowd() -> list[object]:
        asked = (engine.segment(model, picture(n), [POINT], multimask=True) for n in range(5))
        return list(await asyncio.gather(*asked, return_exceptions=True))

    try:
        answers = asyncio.run(crowd())
        assert sum(isinstance(a, Overloaded) for a in answers) == 3
        assert engine.segment_sync(model, picture(), [POINT], multimask=True).masks
    finally:
        engine.close()
