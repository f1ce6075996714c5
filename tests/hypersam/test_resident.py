"""How a model's weights lie in memory is chosen when it is loaded, and changes no answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hypersam.compression import compress
from hypersam.engine import Engine, ModelFile, Prompt
from hypersam.errors import InvalidOption
from hypersam.loading import load, load_model
from hypersam.sam.model import SamModel
from hypersam.settings import Settings
from kernels.hyperlinear import HyperConv2d
from kernels.hyperlinear.module import LatticeLinear, StreamLinear
from tests.models import ModelSize, save_checkpoint

# Large enough for its patch embedding to stay compressed.
SIZE = ModelSize(image=64, patch=8, dim=96, depth=2, heads=2, window=5, global_blocks=(1,), prompt_dim=64)
PICTURE = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("resident")
    source = save_checkpoint(made / "a.pth", SIZE)
    for codec in ("lattice", "orbit"):
        compress(source, made / f"{codec}.hsam", codec=codec, options={"fidelity": False})
    return made


def kinds(model: SamModel) -> set[type]:
    return {type(m) for m in model.network.modules()}


def embedding(model: SamModel) -> torch.Tensor:
    return model.embed(PICTURE).features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streams_answer_as_levels_do(folder: Path, dtype: torch.dtype) -> None:
    path = folder / "lattice.hsam"
    levels = load_model(path, device="cpu", dtype=dtype, resident="levels")
    streams = load_model(path, device="cpu", dtype=dtype, resident="stream")
    assert LatticeLinear in kinds(levels)
    assert StreamLinear not in kinds(levels)
    assert StreamLinear in kinds(streams)
    assert LatticeLinear not in kinds(streams)
    assert streams.resident_bytes() < levels.resident_bytes()
    # Weights are the same bits; blocks of other sizes may be summed in another order.
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(embedding(streams), embedding(levels), rtol=tolerance, atol=tolerance)


def test_memory_decides_where_nothing_is_said(folder: Path) -> None:
    path = folder / "lattice.hsam"
    assert StreamLinear in kinds(load(path, device="cpu", memory=100_000).model)
    assert StreamLinear not in kinds(load(path, device="cpu", memory=1 << 30).model)
    assert StreamLinear not in kinds(load(path, device="cpu").model)


def test_the_engine_goes_by_its_setting(folder: Path, tmp_path: Path) -> None:
    held, scores = {}, {}
    for resident in ("levels", "stream"):
        engine = Engine(Settings(data_dir=tmp_path, device="cpu", resident=resident))
        try:
            file = ModelFile("a", folder / "lattice.hsam", resident)
            answer = engine.segment_sync(file, PICTURE, [Prompt(points=((20.0, 30.0),), labels=(1,))], multimask=True)
            held[resident] = engine.stats()["resident_bytes"]
            scores[resident] = [mask.score for mask in answer.masks]
        finally:
            engine.close()
    assert held["stream"] < held["levels"]
    assert scores["stream"] == pytest.approx(scores["levels"], rel=1e-4)


def test_streams_need_a_cpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InvalidOption, match="on the CPU only"):
        load_model(folder / "lattice.hsam", device="cuda:0", resident="stream")


@pytest.mark.parametrize("codec", ["lattice", "orbit"])
def test_convolutions_stay_compressed(folder: Path, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / f"{codec}.hsam"
    coded = load_model(path, device="cpu")
    monkeypatch.setattr("hypersam.loading.LEAST_CONVOLUTION", 1 << 40)
    decoded = load_model(path, device="cpu")
    assert HyperConv2d in kinds(coded)
    assert HyperConv2d not in kinds(decoded)
    assert coded.resident_bytes() < decoded.resident_bytes()
    torch.testing.assert_close(embedding(coded), embedding(decoded), rtol=1e-4, atol=1e-5)
