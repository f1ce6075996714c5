"""The engine under load: joined work, bounds, callers who leave, models that come and go, memory that runs out."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypersam.compression import compress
from hypersam.engine import Engine, Grid, ModelFile, Prompt, Segmentation
from hypersam.engine.cache import EmbeddingCache
from hypersam.engine.device import on_a_cpu
from hypersam.engine.everything import Candidates, promising
from hypersam.errors import Overloaded, PromptError, Unavailable, UnknownImage
from hypersam.sam.model import Embedding, SamModel
from hypersam.settings import Settings
from tests.models import ModelSize, save_checkpoint

POINT = Prompt(points=((20.0, 30.0),), labels=(1,))
BOX = Prompt(box=(5.0, 6.0, 40.0, 41.0))
MEDIUM = ModelSize(image=128, patch=8, dim=64, depth=3, heads=2, window=4, global_blocks=(1,), prompt_dim=32)


def picture(seed: int = 0, h: int = 50, w: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def make(folder: Path, name: str, seed: int = 0, size: ModelSize = MEDIUM) -> ModelFile:
    checkpoint = save_checkpoint(folder / f"{name}.pth", size, seed=seed)
    report = compress(checkpoint, folder / f"{name}.hsam", codec="birkhoff", options={"fidelity": False})
    return ModelFile(name, folder / f"{name}.hsam", report.artifact_sha256)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelFile, ModelFile]:
    folder = tmp_path_factory.mktemp("models")
    return make(folder, "a"), make(folder, "b", seed=1)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def made(**options: Any) -> Engine:
        engines.append(Engine(Settings(data_dir=tmp_path, device="cpu", **options)))
        return engines[-1]

    yield made
    for engine in engines:
        engine.close()


class Gate:
    """Holds the device's thread in its next encoder call until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        self.sizes: list[int] = []
        encode = SamModel.embed_batch

        def held(model: SamModel, pictures: Sequence[Any]) -> list[Embedding]:
            self.sizes.append(len(pictures))
            self.reached.set()
            assert self._open.wait(30)
            return encode(model, pictures)

        monkeypatch.setattr(SamModel, "embed_batch", held)

    def open(self) -> None:
        self._open.set()


async def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


@pytest.mark.parametrize(("settings", "batches"), [({"max_batch": 4}, {1: 2, 4: 1}), ({}, {1: 1, 5: 1})])
def test_pictures_that_wait_are_encoded_together(
    settings: dict[str, int], batches: dict[int, int], start: Callable[..., Engine],
    files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    file, other = files
    alone = [start().segment_sync(file, picture(n), [POINT], multimask=False).masks[0] for n in range(6)]
    engine, gate = start(**settings), Gate(monkeypatch)

    async def crowd() -> list[Segmentation]:
        first = asyncio.create_task(engine.segment(file, picture(0), [POINT], multimask=False))
        await asyncio.to_thread(gate.reached.wait)
        rest = [asyncio.create_task(engine.segment(file, picture(n), [POINT], multimask=False)) for n in range(1, 6)]
        stranger = asyncio.create_task(engine.segment(other, picture(0), [POINT], multimask=False))
        await until(lambda: engine.stats()["queued"]["encode"] == 6)
        assert engine.stats()["queues"] == {
            ("encode", "a"): 5, ("encode", "b"): 1, ("decode", "a"): 0, ("decode", "b"): 0,
        }  # fmt: skip
        gate.open()
        answers = await asyncio.gather(first, *rest)
        await stranger
        return answers

    answers = asyncio.run(crowd())
    # The first, as many of the other five as a batch holds, the rest; another model's on its own.
    assert engine.stats()["batches"] == {("a", size): count for size, count in batches.items()} | {("b", 1): 1}
    assert len(gate.sizes) == sum(batches.values()) + 1
    for mine, (answer) in zip(alone, answers, strict=True):
        assert answer.masks[0].score == pytest.approx(mine.score, abs=1e-4)
        assert (answer.masks[0].mask != mine.mask).mean() < 5e-3


def test_one_embedding_however_many_ask(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = start(), Gate(monkeypatch)

    async def crowd() -> list[Segmentation]:
        asked = [asyncio.create_task(engine.segment(files[0], picture(), [POINT], multimask=True)) for _ in range(8)]
        await asyncio.to_thread(gate.reached.wait)
        await asyncio.sleep(0.1)
        gate.open()
        return await asyncio.gather(*asked)

    answers = asyncio.run(crowd())
    assert gate.sizes == [1]
    assert sorted(a.lookup for a in answers) == ["joined"] * 7 + ["miss"]
    assert len({a.masks[0].score for a in answers}) == 1


def test_prompts_on_one_picture_are_decoded_together(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    prompts = [Prompt(points=((5.0 * n + 3, 20.0),), labels=(1,)) for n in range(6)]
    wanted = engine.segment_sync(files[0], picture(), prompts, multimask=False).masks
    calls: list[int] = []
    decode = SamModel.decode

    def counted(model: SamModel, embedding: Embedding, points: Any, *rest: Any, **named: Any) -> Any:
        calls.append(len(points[0]))
        return decode(model, embedding, points, *rest, **named)

    gate = Gate(monkeypatch)
    monkeypatch.setattr(SamModel, "decode", counted)

    async def crowd() -> list[Segmentation]:
        busy = asyncio.create_task(engine.segment(files[0], picture(1), [POINT], multimask=False))
        await asyncio.to_thread(gate.reached.wait)
        asked = [asyncio.create_task(engine.segment(files[0], picture(), [p], multimask=False)) for p in prompts]
        await until(lambda: engine.stats()["queued"]["decode"] == 6)
        gate.open()
        await busy
        return await asyncio.gather(*asked)

    answers = asyncio.run(crowd())
    assert sorted(calls) == [1, 6]
    # The first six in one call, the lone one of the busy picture, and six requests' in one call again.
    assert engine.stats()["decodes"] == {("a", 6): 2, ("a", 1): 1}
    for answer, mask in zip(answers, wanted, strict=True):
        assert np.array_equal(answer.masks[0].mask, mask.mask)


def test_a_prompt_to_blame_fails_alone(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of prompts that were joined, one that the model refuses leaves the others their masks."""
    engine = start()
    engine.segment_sync(files[0], picture(), [POINT], multimask=True)
    gate = Gate(monkeypatch)
    decode = SamModel.decode

    def picky(model: SamModel, embedding: Embedding, points: Any, boxes: Any, *rest: Any, **named: Any) -> Any:
        if boxes is not None:
            raise PromptError("this model takes no box")
        return decode(model, embedding, points, boxes, *rest, **named)

    monkeypatch.setattr(SamModel, "decode", picky)

    async def crowd() -> list[Any]:
        busy = asyncio.create_task(engine.segment(files[0], picture(1), [POINT], multimask=True))
        await asyncio.to_thread(gate.reached.wait)
        asked = [asyncio.create_task(engine.segment(files[0], picture(), [p], multimask=True)) for p in (POINT, BOX)]
        await until(lambda: engine.stats()["queued"]["decode"] == 2)
        gate.open()
        await busy
        return list(await asyncio.gather(*asked, return_exceptions=True))

    good, bad = asyncio.run(crowd())
    assert len(good.masks) == 3
    assert isinstance(bad, PromptError)


def test_who_hangs_up_costs_nothing_more(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = start(max_batch=1), Gate(monkeypatch)

    async def crowd() -> Segmentation:
        first = asyncio.create_task(engine.segment(files[0], picture(0), [POINT], multimask=True))
        await asyncio.to_thread(gate.reached.wait)
        leaving = [asyncio.create_task(engine.segment(files[0], picture(n), [POINT], multimask=True)) for n in (1, 2)]
        shared = [asyncio.create_task(engine.segment(files[0], picture(3), [POINT], multimask=True)) for _ in range(2)]
        await until(lambda: engine.stats()["queued"]["encode"] == 3)
        for task in (*leaving, shared[0]):
            task.cancel()
        await asyncio.wait((*leaving, shared[0]))
        assert engine.stats()["waiting"] == 2
        gate.open()
        await first
        return await shared[1]

    answer = asyncio.run(crowd())
    assert len(answer.masks) == 3  # whoever stays gets an answer, though the one who began it left
    assert gate.sizes == [1, 1]  # the first and the shared one: those of the two who left were never encoded
    assert engine.stats()["abandoned"] == 3
    assert engine.segment_sync(files[0], picture(1), [POINT], multimask=True).lookup == "miss"


def test_a_load_holds_up_no_other_model(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hypersam.engine import residency

    engine = start()
    engine.segment_sync(files[0], picture(), [POINT], multimask=True)
    loading, go_on = threading.Event(), threading.Event()
    load = residency.load_model
    loads: list[Path] = []

    def slow(path: Path, **options: Any) -> SamModel:
        loads.append(path)
        loading.set()
        assert go_on.wait(30)
        return load(path, **options)

    monkeypatch.setattr(residency, "load_model", slow)

    async def crowd() -> list[Segmentation]:
        new = [asyncio.create_task(engine.segment(files[1], picture(), [POINT], multimask=True)) for _ in range(3)]
        await asyncio.to_thread(loading.wait)
        meanwhile = await engine.segment(files[0], picture(1), [POINT], multimask=True)
        assert not any(task.done() for task in new)
        go_on.set()
        return [meanwhile, *await asyncio.gather(*new)]

    assert all(len(answer.masks) == 3 for answer in asyncio.run(crowd()))
    assert loads == [files[1].path]


def test_more_than_may_wait_is_told_when_to_come_back(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = start(max_waiting=2), Gate(monkeypatch)

    async def crowd() -> list[Any]:
        inside = [asyncio.create_task(engine.segment(files[0], picture(n), [POINT], multimask=True)) for n in (0, 1)]
        await asyncio.to_thread(gate.reached.wait)
        with pytest.raises(Overloaded) as refused:
            engine.check_room()
        assert 1 <= refused.value.retry_after <= 60
        with pytest.raises(Overloaded):
            await engine.segment(files[0], picture(2), [POINT], multimask=True)
        gate.open()
        return await asyncio.gather(*inside)

    assert len(asyncio.run(crowd())) == 2
    assert engine.stats()["rejected"] == 2
    engine.check_room()


def test_what_runs_ends_and_what_comes_is_refused_at_the_close(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = start(max_batch=1), Gate(monkeypatch)

    async def crowd() -> list[Any]:
        asked = [asyncio.create_task(engine.segment(files[0], picture(n), [POINT], multimask=True)) for n in (0, 1)]
        await asyncio.to_thread(gate.reached.wait)
        await until(lambda: engine.stats()["queued"]["encode"] == 1)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await asyncio.sleep(0.05)
        gate.open()
        await closing
        return list(await asyncio.gather(*asked, return_exceptions=True))

    assert all(isinstance(answer, Unavailable) for answer in asyncio.run(crowd()))
    assert gate.sizes == [1]
    with pytest.raises(Unavailable):
        engine.segment_sync(files[0], picture(), [POINT], multimask=True)


def embedding(kib: int) -> Embedding:
    return Embedding((torch.zeros(1, 256 * kib),), (1, 1), (1, 1))


def test_embeddings_leave_by_age_and_by_bytes() -> None:
    clock = [0.0]
    cache = EmbeddingCache(3 << 10, 60, now=lambda: clock[0])
    for name in "abc":
        cache.put(("m", name), embedding(1))
        clock[0] += 10
    assert cache.get(("m", "a")) is not None  # at 30 s: good until 90
    cache.put(("m", "d"), embedding(1))  # the oldest in use leaves: b
    assert cache.get(("m", "b")) is None
    assert cache.by_model() == {"m": (3, 3 << 10)}
    cache.put(("m", "too large"), embedding(4))
    assert cache.by_model() == {"m": (3, 3 << 10)}
    clock[0] = 85
    assert cache.get(("m", "c")) is None  # 20 + 60
    assert cache.by_model() == {"m": (2, 2 << 10)}
    clock[0] = 200
    assert cache.by_model() == {}
    cache.put(("m", "a"), embedding(3))
    cache.put(("m", "a"), embedding(2))  # in its place
    cache.put(("n", "a"), embedding(1))
    cache.forget("m")
    assert cache.by_model() == {"n": (1, 1 << 10)}


class Shortage:
    """A device that holds ``room`` pictures an encoder call, and ``prompts`` a decoder call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, room: int, prompts: int = 1000) -> None:
        self.sizes: list[int] = []
        encode, decode = SamModel.embed_batch, SamModel.decode

        def embed_batch(model: SamModel, pictures: Sequence[Any]) -> list[Embedding]:
            self.sizes.append(len(pictures))
            if len(pictures) > room:
                raise torch.OutOfMemoryError("the test's device holds no more")
            return encode(model, pictures)

        def small_decode(model: SamModel, made: Embedding, points: Any, *rest: Any, **named: Any) -> Any:
            if len(points[0]) > prompts:
                raise torch.OutOfMemoryError("the test's device holds no more")
            return decode(model, made, points, *rest, **named)

        monkeypatch.setattr(SamModel, "embed_batch", embed_batch)
        monkeypatch.setattr(SamModel, "decode", small_decode)


@pytest.mark.parametrize(("side", "pictures"), [(64, 8), (256, 8), (512, 4), (1000, 1), (1024, 1), (2048, 1)])
def test_small_pictures_are_batched_on_a_cpu(side: int, pictures: int) -> None:
    assert on_a_cpu(side) == pictures


def test_a_batch_too_large_for_the_memory_is_halved(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, gate = start(max_batch=8), Gate(monkeypatch)
    short = Shortage(monkeypatch, room=2)

    async def crowd() -> list[Segmentation]:
        first = asyncio.create_task(engine.segment(files[0], picture(0), [POINT], multimask=True))
        await asyncio.to_thread(gate.reached.wait)
        rest = [asyncio.create_task(engine.segment(files[0], picture(n), [POINT], multimask=True)) for n in range(1, 8)]
        await until(lambda: engine.stats()["queued"]["encode"] == 7)
        gate.open()
        return await asyncio.gather(first, *rest)

    assert all(len(answer.masks) == 3 for answer in asyncio.run(crowd()))
    assert short.sizes == [1, 7, 3, 1, 2, 4, 2, 2]
    assert engine.stats()["memory_shortages"] == 3


def test_memory_that_stays_short_moves_others_out(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    held = engine.segment_sync(files[1], picture(), [POINT], multimask=True)
    Shortage(monkeypatch, room=0)
    with pytest.raises(Unavailable, match="not enough memory"):  # this device is the CPU: nowhere to go
        engine.segment_sync(files[0], picture(), [POINT], multimask=True)
    stats = engine.stats()
    assert list(stats["models"]) == ["a"]
    assert stats["embedding_bytes"] == 0
    monkeypatch.undo()
    assert engine.segment_sync(files[0], picture(), [POINT], multimask=True).masks
    with pytest.raises(UnknownImage):
        engine.segment_sync(files[1], None, [POINT], multimask=True, image_id=held.image_id)


def test_prompts_too_many_for_the_memory_are_decoded_one_by_one(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    prompts = [Prompt(points=((5.0 * n + 3, 20.0),), labels=(1,)) for n in range(6)]
    wanted = engine.segment_sync(files[0], picture(), prompts, multimask=False).masks
    Shortage(monkeypatch, room=8, prompts=1)
    found = engine.segment_sync(files[0], picture(), prompts, multimask=False).masks
    for a, b in zip(found, wanted, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-5)
        assert (a.mask != b.mask).mean() < 1e-3


def test_no_memory_to_load_evicts_and_tries_again(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hypersam.engine import residency

    engine = start()
    engine.segment_sync(files[1], picture(), [POINT], multimask=True)
    load = residency.load_model
    tries: list[int] = []

    def short(path: Path, **options: Any) -> SamModel:
        tries.append(engine.stats()["resident_models"])
        if engine.stats()["resident_models"]:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return load(path, **options)

    monkeypatch.setattr(residency, "load_model", short)
    assert engine.segment_sync(files[0], picture(), [POINT], multimask=True).masks
    assert tries == [1, 0]


def test_more_pictures_than_places_when_nobody_else_waits(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile]
) -> None:
    engine = start(max_waiting=3)
    with engine.admit(5):
        assert engine.stats()["waiting"] == 5
        with pytest.raises(Overloaded):
            engine.segment_sync(files[0], picture(), [POINT], multimask=True)
        assert asyncio.run(engine.segment(files[0], picture(), [POINT], multimask=True, admitted=True)).masks
    with engine.admit(), pytest.raises(Overloaded), engine.admit(3):
        pass
    with engine.admit(), engine.admit(2):
        pass
    # How long it takes till a place is free is learnt from requests that wait for each other, and from no idle time.
    before = engine._pace
    engine._answered_at -= 3600
    for _ in range(3):
        with engine.admit(5):
            pass
    assert engine._pace == before
    with engine.admit(), engine.admit(2):
        time.sleep(0.4)
    assert 0.9 * before < engine._pace < 0.9 * before + 0.1
    assert engine.stats()["waiting"] == 0


def test_masks_too_large_for_the_device_are_made_on_the_cpu(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, grid = start(), Grid(2, pred_iou_thresh=-1e9, stability_score_thresh=0)
    wanted = engine.segment_sync(files[0], picture(), [POINT], multimask=True)
    everything = asyncio.run(engine.everything(files[0], picture(), grid))
    upscale = SamModel.upscale
    refused: list[int] = []

    def small(model: SamModel, low_res: torch.Tensor, made: Embedding) -> torch.Tensor:
        if len(refused) < left:
            refused.append(1)
            raise torch.OutOfMemoryError("the test's device holds no more")
        return upscale(model, low_res, made)

    monkeypatch.setattr(SamModel, "upscale", small)
    left = 1
    found = engine.segment_sync(files[0], picture(), [POINT], multimask=True)
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(found.masks, wanted.masks, strict=True))
    left = 2
    again = asyncio.run(engine.everything(files[0], picture(), grid))
    assert [each.rle for each in again.masks] == [each.rle for each in everything.masks]
    assert engine.stats()["memory_shortages"] == 2
    refused_too: list[int] = []

    def smaller(*given: Any) -> Candidates:
        if not refused_too:
            refused_too.append(1)
            raise torch.OutOfMemoryError("nor this")
        return promising(*given)

    monkeypatch.setattr("hypersam.engine.engine.promising", smaller)
    again = asyncio.run(engine.everything(files[0], picture(), grid))
    assert [each.rle for each in again.masks] == [each.rle for each in everything.masks]
    assert engine.stats()["memory_shortages"] == 3
    left = 4
    with pytest.raises(Unavailable, match="not enough memory"):
        engine.segment_sync(files[0], picture(), [POINT], multimask=True)


def test_the_model_used_last_stays(start: Callable[..., Engine], tmp_path: Path) -> None:
    models = [make(tmp_path, name, seed) for seed, name in enumerate("abc")]
    engine = start()
    for model in models:
        engine.segment_sync(model, picture(), [POINT], multimask=False)
    held = {name: model["resident_bytes"] for name, model in engine.stats()["models"].items()}
    engine = start(resident_bytes=held["a"] + max(held["b"], held["c"]))
    for number in (0, 1, 0, 2):
        engine.segment_sync(models[number], picture(), [POINT], multimask=False)
    assert [name for name, model in engine.stats()["models"].items() if model["resident_bytes"]] == ["a", "c"]
    engine.segment_sync(models[0], picture(), [POINT], multimask=False)
    assert engine.stats()["model_loads"] == 3


def test_a_model_that_the_device_cannot_run_moves_to_the_cpu(
    start: Callable[..., Engine], files: tuple[ModelFile, ModelFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is the CPU by another name, and has memory to hold models and none to run them."""
    wanted = start().segment_sync(files[0], picture(), [POINT], multimask=True)
    device = torch.device("cpu", 0)
    assert device != torch.device("cpu")
    monkeypatch.setattr("hypersam.engine.engine.resolve_device", lambda name: device)
    encode, decode = SamModel.embed_batch, SamModel.decode

    def embed_batch(model: SamModel, pictures: Sequence[Any]) -> list[Embedding]:
        if model.device == device:
            raise torch.OutOfMemoryError("the test's device holds no more")
        return encode(model, pictures)

    def failing_decode(model: SamModel, *rest: Any, **named: Any) -> Any:
        if model.device == device:
            raise torch.OutOfMemoryError("the test's device holds no more")
        return decode(model, *rest, **named)

    monkeypatch.setattr(SamModel, "embed_batch", embed_batch)
    engine = start()
    found = engine.segment_sync(files[0], picture(), [POINT], multimask=True)
    assert engine.stats()["memory_shortages"] == 2
    engine.segment_sync(files[0], picture(1), [POINT], multimask=True)
    assert engine.stats()["memory_shortages"] == 2  # it stays there
    monkeypatch.setattr(SamModel, "embed_batch", encode)
    monkeypatch.setattr(SamModel, "decode", failing_decode)
    engine = start()
    again = engine.segment_sync(files[0], picture(), [POINT], multimask=True)
    for masks in (found.masks, again.masks):
        assert all(np.array_equal(a.mask, b.mask) for a, b in zip(masks, wanted.masks, strict=True))
    assert engine.stats()["memory_shortages"] == 2
