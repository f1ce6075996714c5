"""Linear layers on the project's own codecs: the same numbers as the decoded weight gives, and no dense copy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.codec import Coded, HalfTensor, decode, lattice, orbit
from kernels.hyperlinear import HyperLinear
from kernels.hyperlinear import lattice as lattice_product
from kernels.hyperlinear import orbit as orbit_product

SHAPES = [(1, 4), (3, 7), (17, 33), (64, 64), (65, 130), (100, 255), (40, 384)]
# Relative RMS and largest error over the largest output, against float64.
BOUNDS = {torch.float32: (1e-6, 1e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (8e-3, 2e-2)}


def coded(kind: str, out_features: int, in_features: int) -> Coded:
    torch.manual_seed(out_features * 1000 + in_features)
    weight = torch.randn(out_features, in_features) * 0.03
    # Some that no level of int8 reaches.
    weight.view(-1)[::97] *= 40
    if kind == "lattice":
        return lattice.encode(weight, 0.004, columns=in_features)
    return orbit.encode(weight, int(kind[-2]), columns=in_features, rotate=kind.endswith("r"))


def expect_close(got: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> None:
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.shape == expected.shape
    assert got.dtype == x.dtype
    assert got.isfinite().all()
    rms, largest = BOUNDS[x.dtype]
    error = got.double() - expected
    assert float(error.square().mean().sqrt()) <= rms * float(expected.square().mean().sqrt())
    assert float(error.abs().max()) <= largest * float(expected.abs().max())


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("kind", ["lattice", "orbit 3-", "orbit 4-", "orbit 4r", "orbit 5r", "orbit 6-"])
def test_products(kind: str, out_features: int, in_features: int, dtype: torch.dtype) -> None:
    encoded = coded(kind, out_features, in_features)
    weight = decode(encoded)
    bias = torch.randn(out_features)
    made = HyperLinear.from_encoded(encoded, bias)
    assert torch.equal(made.dense(), weight)
    for rows in (1, 5):
        x = torch.randn(rows, in_features).to(dtype)
        expect_close(made(x), weight, bias, x)
        expect_close(HyperLinear.from_encoded(encoded, None)(x), weight, None, x)
        # Not contiguous, and with more dimensions.
        wide = torch.randn(2, in_features, rows).to(dtype).transpose(1, 2)
        expect_close(made(wide), weight, bias, wide)
    assert made(torch.empty(0, 3, in_features, dtype=dtype)).shape == (0, 3, out_features)


@pytest.mark.parametrize("scratch", [1, 4000, 1 << 20])
@pytest.mark.parametrize("kind", ["lattice", "orbit 4-"])
def test_any_block_of_rows_gives_the_same(kind: str, scratch: int) -> None:
    """Corrections and outliers fall into the blocks that they belong to."""
    encoded = coded(kind, 65, 130)
    made, x = HyperLinear.from_encoded(encoded, None), torch.randn(3, 130)
    if kind == "lattice":
        assert made.index.numel() > 20
        got = lattice_product.linear(x, made.levels, made.step, made.index, made.values, None, scratch_bytes=scratch)
    else:
        assert made.index.numel() > 20
        names = ("codes", "bits", "table", "scales", "block", "signs", "index", "values")
        weight = orbit_product.Weight(**{name: getattr(made, name) for name in names})
        got = orbit_product.linear(x, weight, None, scratch_bytes=scratch)
    expect_close(got, decode(encoded), None, x)


def test_what_stays_in_memory() -> None:
    layer = HyperLinear.from_encoded(coded("lattice", 64, 640), None)
    assert layer.resident_bytes() <= 64 * 640 * 1.15
    layer = HyperLinear.from_encoded(coded("orbit 4r", 64, 640), None)
    assert layer.resident_bytes() <= 64 * 640 * 0.53 + 1000


@pytest.mark.parametrize("kind", ["lattice", "orbit 5-"])
def test_casting_a_model_leaves_the_weights(kind: str) -> None:
    made = HyperLinear.from_encoded(coded(kind, 17, 33), torch.randn(17))
    before = made.dense()
    nn.Sequential(made).half()
    assert torch.equal(made.dense(), before)


@pytest.mark.parametrize("kind", ["lattice", "orbit 4-", "orbit 4r"])
def test_as_operators(kind: str) -> None:
    made = HyperLinear.from_encoded(coded(kind, 40, 384), torch.randn(40))
    x = torch.randn(2, 5, 384)
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), made(x))
    meta = made.to("meta")(x.to("meta"))
    assert meta.shape == (2, 5, 40)


def test_other_widths_and_dtypes_are_refused() -> None:
    made = HyperLinear.from_encoded(coded("lattice", 17, 33), None)
    with pytest.raises(ValueError, match="33 columns"):
        made(torch.randn(2, 34))
    with pytest.raises(TypeError, match="floating"):
        made(torch.ones(2, 33, dtype=torch.int64))
    half = HalfTensor.of(torch.randn(3, 4))
    assert half is not None
    with pytest.raises(ValueError, match="HalfTensor"):
        HyperLinear.from_encoded(half, None)
