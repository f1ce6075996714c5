"""Entropy-coded weights, compressed convolutions and int8 operands against the decoded weight in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.codec import BirkhoffConfig, BirkhoffTensor, Coded, LatticeTensor, decode, encode, lattice, orbit
from kernels.hyperlinear import HyperConv2d, HyperLinear, allow_int8, cpu, cpu_int8, threads
from kernels.hyperlinear import stream as stream_product

# Relative RMS against float64 with the decoded weight.
BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
INT8 = 0.02


def weights(out_features: int, columns: int) -> Tensor:
    torch.manual_seed(out_features * 1000 + columns)
    weight = torch.randn(out_features, columns) * 0.03
    weight.view(-1)[::97] *= 40  # beyond int8
    weight[out_features // 2] = 0
    return weight


def coded(kind: str, out_features: int, columns: int) -> Coded:
    weight = weights(out_features, columns)
    if kind == "lattice":
        return lattice.encode(weight, 0.004, columns=columns)
    if kind == "birkhoff":
        made = encode(weight, BirkhoffConfig(min_elements=1, raw_above=10.0), by_row=True)
        assert isinstance(made, BirkhoffTensor)
        return made
    return orbit.encode(weight, int(kind[-2]), columns=columns, rotate=kind.endswith("r"))


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    assert got.isfinite().all()
    return float((got.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize(("rows", "columns", "joined"), [(3, 7, 1), (64, 96, 2), (700, 255, 1), (1000, 384, 1)])
def test_streams(rows: int, columns: int, joined: int, dtype: torch.dtype) -> None:
    """Several segments, blocks of any number of them, rows joined in the stream, escapes, a row of zeros."""
    encoded = lattice.encode(weights(rows, columns), 0.004, columns=columns * joined)
    weight, bias, x = decode(encoded), torch.randn(rows), torch.randn(2, 5, columns).to(dtype)
    made = HyperLinear.from_encoded(encoded, bias, stream=True)
    assert torch.equal(made.dense(), weight)
    expected = F.linear(x.double(), weight.double(), bias.double())
    got = made(x)
    assert got.dtype == dtype
    assert error(got, expected) <= BOUNDS[dtype]
    names = ("words", "states", "classes", "escapes", "starts", "columns", "step", "beta")
    held = stream_product.Stream(**{name: getattr(made, name) for name in names})
    assert error(stream_product.linear(x, held, bias, scratch_bytes=1), expected) <= BOUNDS[dtype]
    assert made(x[:0]).shape == (0, 5, rows)
    assert made.resident_bytes() <= encoded.nbytes + 16 * (len(held.states) + 1) + bias.nbytes


def test_a_stream_is_smaller_than_levels() -> None:
    encoded = coded("lattice", 1000, 384)
    small, large = (HyperLinear.from_encoded(encoded, None, stream=s).resident_bytes() for s in (True, False))
    assert small < 0.85 * large


def test_streams_that_do_not_decode_are_refused() -> None:
    encoded = coded("lattice", 700, 255)
    assert isinstance(encoded, LatticeTensor)
    data = encoded.data.clone()
    data[len(data) // 2 : len(data) // 2 + 64] ^= 0x55
    damaged = LatticeTensor(
        encoded.shape, encoded.dtype, encoded.columns, encoded.step, encoded.offset, encoded.beta, data
    )
    with pytest.raises(ValueError, match=r"segment \d does not decode|escapes"):
        HyperLinear.from_encoded(damaged, None, stream=True)
    shifted = lattice.encode(weights(9, 20), 0.004, columns=20, offset=1.0)
    with pytest.raises(ValueError, match="offset"):
        HyperLinear.from_encoded(shifted, None, stream=True)


def test_streams_as_operators() -> None:
    made = HyperLinear.from_encoded(coded("lattice", 40, 384), torch.randn(40), stream=True)
    x = torch.randn(2, 5, 384)
    assert torch.equal(torch.compile(made, backend="eager", fullgraph=True)(x), made(x))
    assert made.to("meta")(x.to("meta")).shape == (2, 5, 40)
    with pytest.raises(ValueError, match="384 columns"):
        HyperLinear.from_encoded(coded("lattice", 40, 384), None, stream=True)(torch.randn(2, 383))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lattice", "stream", "orbit 4-", "orbit 4r"])
@pytest.mark.parametrize(("shape", "size"), [((40, 3, 8, 8), (33, 25)), ((16, 130, 1, 1), (5, 7))])
def test_convolutions(shape: tuple[int, ...], size: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    columns = shape[1] * shape[2] * shape[3]
    if kind.endswith("r") and columns % 4:
        pytest.skip("rows without a factor 4 are not rotated")
    weight = weights(shape[0], columns).view(shape)
    encoded: Coded
    if kind in ("lattice", "stream"):
        encoded = lattice.encode(weight, 0.004, columns=columns)
    else:
        encoded = orbit.encode(weight, 4, columns=columns, rotate=kind.endswith("r"))
    bias, x = torch.randn(shape[0]), torch.randn(2, shape[1], *size).to(dtype)
    conv = nn.Conv2d(shape[1], shape[0], shape[2:], stride=shape[2:])
    assert HyperConv2d.fits(conv)
    made = HyperConv2d.from_encoded(encoded, bias, (shape[2], shape[3]), stream=kind == "stream")
    assert not list(made.parameters())
    expected = F.conv2d(x.double(), decode(encoded).double(), bias.double(), stride=shape[2:])
    assert made(x).dtype == dtype
    assert error(made(x), expected) <= BOUNDS[dtype]


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 2, 2, 1), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 2, 2, dilation=2)],
)
def test_other_convolutions_do_not_fit(conv: nn.Conv2d) -> None:
    assert not HyperConv2d.fits(conv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["lattice", "birkhoff", "orbit 4-", "orbit 5r"])
@pytest.mark.parametrize("rows", [64, 65, 1500])
def test_int8_operands(rows: int, kind: str, dtype: torch.dtype) -> None:
    encoded = coded(kind, 50, 132)
    bias, x = torch.randn(50), torch.randn(rows, 132).to(dtype)
    x[0], x[1, 0] = 0, 300  # a token of zeros, and one with an outlier
    made = HyperLinear.from_encoded(encoded, bias)
    expected = F.linear(x.double(), decode(encoded).double(), bias.double())
    plain = made(x)
    allow_int8(nn.Sequential(made))
    got = made(x)
    assert got.dtype == dtype
    if not cpu_int8.worth_it(x):
        pytest.skip("this CPU has no dot products of int8 numbers")
    assert not torch.equal(got, plain)
    assert error(got[2:], expected[2:]) < (INT8 if kind != "birkhoff" else 3 * INT8)
    assert error(got[:1], expected[:1]) < 0.01
    # Few tokens go the other way, whatever is allowed.
    assert torch.equal(made(x[:5]), HyperLinear.from_encoded(encoded, bias)(x[:5]))


def test_operands_in_fp32_where_the_cpu_has_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 132).bfloat16()
    for kind in ("lattice", "birkhoff", "orbit 4r", "orbit 4-"):
        encoded = coded(kind, 50, 132)
        made = HyperLinear.from_encoded(encoded, None)
        expected = F.linear(x.double(), decode(encoded).double())
        errors = []
        for native in (False, True):
            monkeypatch.setattr(cpu, "native_bf16", lambda native=native: native)
            errors.append(error(made(x), expected))
        assert errors[0] < 0.004  # one rounding of the result
        assert errors[0] < errors[1] < 0.008


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "out_features"), [(200, 50), (50, 50), (50, 200)])
def test_a_rotation_is_undone_on_either_side(tokens: int, out_features: int, dtype: torch.dtype) -> None:
    """On the weight where it has fewer rows than there are tokens, else on the activations."""
    encoded = coded("orbit 4r", out_features, 132)
    x, bias = torch.randn(tokens, 132).to(dtype), torch.randn(out_features)
    expected = F.linear(x.double(), decode(encoded).double(), bias.double())
    assert error(HyperLinear.from_encoded(encoded, bias)(x), expected) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lattice", "stream", "birkhoff", "orbit 3r", "orbit 5-"])
def test_the_weight_itself_as_a_factor(kind: str, dtype: torch.dtype) -> None:
    encoded = coded("lattice" if kind == "stream" else kind, 60, 132)
    x = torch.randn(2, 7, 60).to(dtype)
    made = HyperLinear.from_encoded(encoded, torch.randn(60), stream=kind == "stream")
    got = made.transposed(x)
    assert got.dtype == dtype
    assert error(got, x.double() @ decode(encoded).double()) <= BOUNDS[dtype]
    assert made.transposed(x[:, :0]).shape == (2, 0, 132)


@pytest.mark.parametrize("rows", [1, 2, 3, 1000])
def test_rows_are_shared_out_once_each(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen = torch.zeros(rows)

    def work(first: int, last: int) -> None:
        seen[first:last] += 1

    threads.over_rows(work, rows, 1 << 20)
    assert bool((seen == 1).all())
