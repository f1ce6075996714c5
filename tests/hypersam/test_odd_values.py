"""Ordinary checkpoints with values that are not: refused with a code or stored as they are, and always reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import hypersam
from hypersam.errors import HypersamError
from kernels.artifact import open_artifact
from tests.models import official_sam

WEIGHT = "image_encoder.blocks.0.attn.qkv.weight"
BIAS = "image_encoder.blocks.0.mlp.lin1.bias"
PLAIN = {"lattice": {"max_error": 0.05}, "orbit": {"max_error": 0.1}, "birkhoff": {}}
UNMEASURED = {
    "lattice": {"max_error": 0.05, "fidelity": False}, "orbit": {"max_error": 0.1, "fidelity": False},
    "birkhoff": {"fidelity": False},
}  # fmt: skip
CODECS = tuple(PLAIN)


def checkpoint(path: Path, key: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    state = official_sam().state_dict()
    state[key] = change(state[key].clone())
    torch.save(state, path)
    return state


def first(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def code_of(source: Path, codec: str, options: dict[str, object]) -> str:
    with pytest.raises(HypersamError) as caught:
        hypersam.compress(source, source.with_suffix(".hsam"), codec=codec, options=options)
    assert list(source.parent.iterdir()) == [source]
    return caught.value.code


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("key", [WEIGHT, BIAS])
def test_nan_and_infinity_are_refused_or_stored_as_they_are(tmp_path: Path, codec: str, value: float, key: str) -> None:
    source = tmp_path / "a.pth"
    state = checkpoint(source, key, first(value))
    assert code_of(source, codec, PLAIN[codec]) == "not_finite"
    report = hypersam.compress(source, tmp_path / "a.hsam", codec=codec, options=UNMEASURED[codec])
    assert any(key in notice and "NaN" in notice for notice in report.notices)
    assert {t.name: t.encoding for t in report.tensors}[key] == "raw"
    json.dumps(report.as_dict(), allow_nan=False)
    with open_artifact(tmp_path / "a.hsam") as artifact:
        stored = artifact.state_dict()[key]
    assert torch.equal(stored.view(torch.int32), state[key].view(torch.int32))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("change", [lambda t: t.double() * 1e300, lambda t: t.double().fill_(torch.nan)])
def test_what_fp32_does_not_hold_is_not_finite(tmp_path: Path, codec: str, change: Callable[[Tensor], Tensor]) -> None:
    checkpoint(tmp_path / "a.pth", WEIGHT, change)
    assert code_of(tmp_path / "a.pth", codec, PLAIN[codec]) == "not_finite"


@pytest.mark.parametrize("codec", CODECS)
def test_finite_weights_whose_network_overflows(tmp_path: Path, codec: str) -> None:
    checkpoint(tmp_path / "a.pth", WEIGHT, lambda t: t * 1e37)
    assert code_of(tmp_path / "a.pth", codec, PLAIN[codec]) == "not_finite"
    hypersam.compress(tmp_path / "a.pth", tmp_path / "a.hsam", codec=codec, options=UNMEASURED[codec])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("change", [lambda t: t * 1e-40, lambda t: t * 0, lambda t: t.double() * 1e-310])
def test_subnormals_and_zeros_come_through(tmp_path: Path, codec: str, change: Callable[[Tensor], Tensor]) -> None:
    checkpoint(tmp_path / "a.pth", WEIGHT, change)
    report = hypersam.compress(tmp_path / "a.pth", tmp_path / "a.hsam", codec=codec, options=PLAIN[codec])
    assert report.notices == ()
    predictor = hypersam.load(tmp_path / "a.hsam")
    predictor.set_image(np.zeros((40, 50, 3), np.uint8))
    masks, scores, _ = predictor.predict(np.array([[5, 5]]), np.array([1]))
    assert masks.shape[1:] == (40, 50)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.uint16, torch.bool])
@pytest.mark.parametrize("key", [WEIGHT, BIAS])
def test_whole_numbers_where_weights_belong_are_refused(
    tmp_path: Path, codec: str, dtype: torch.dtype, key: str
) -> None:
    checkpoint(tmp_path / "a.pth", key, lambda t: (t * 100).abs().to(dtype))
    assert code_of(tmp_path / "a.pth", codec, PLAIN[codec]) == "layout_mismatch"


@pytest.mark.parametrize(
    ("container", "dtype"),
    [
        ("zip", torch.float64), ("legacy", torch.float64), ("safetensors", torch.float64), ("legacy", torch.float32),
        ("zip", torch.bfloat16), ("safetensors", torch.float16),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("lattice", {"preset": "4x", "policy": "equal_error"}), ("lattice", {"max_error": 0.05}),
        ("orbit", {"preset": "6.5x", "policy": "equal_error"}), ("birkhoff", {}),
    ],
)  # fmt: skip
def test_weights_of_every_dtype_are_those_that_come_back(
    tmp_path: Path, codec: str, options: dict[str, object], container: str, dtype: torch.dtype
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in official_sam().state_dict().items()}
    source = tmp_path / ("a.safetensors" if container == "safetensors" else "a.pth")
    if container == "safetensors":
        save_file(state, source)
    else:
        torch.save(state, source, _use_new_zipfile_serialization=container == "zip")
    report = hypersam.compress(source, tmp_path / "a.hsam", codec=codec, options={"fidelity": False, **options})
    assert report.sqnr_db is not None
    with open_artifact(tmp_path / "a.hsam") as artifact:
        decoded = artifact.state_dict()
    assert {name: (t.dtype, t.shape) for name, t in decoded.items()} == {
        name: (t.dtype, t.shape) for name, t in state.items()
    }
    signal = sum(float(t.double().square().sum()) for t in state.values())
    error = sum(float((t.double() - decoded[name].double()).square().sum()) for name, t in state.items())
    # What is stored as it is counts here too, so that nothing is worse than reported.
    assert 10 * np.log10(signal / error) > report.sqnr_db - 0.5
    for name, t in state.items():
        assert float((t.double() - decoded[name].double()).norm()) <= 0.6 * float(t.double().norm()), name
