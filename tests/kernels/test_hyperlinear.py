"""Products with compressed weights: on the CPU, and as an operator."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.codec import BirkhoffConfig, BirkhoffTensor, decode, encode
from kernels.hyperlinear import HyperLinear, cpu, naive

SHAPES = [(1, 10), (3, 7), (5, 4), (17, 33), (64, 64), (65, 130), (100, 255)]
# Relative RMS and largest error over the largest output, against float64 with the weight in x's dtype.
BOUNDS = {torch.float32: (1e-6, 1e-5), torch.float16: (1e-3, 2e-3), torch.bfloat16: (8e-3, 2e-2)}


def layer(out_features: int, in_features: int, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> HyperLinear:
    weight = (torch.randn(out_features, in_features) * 0.04).to(dtype)
    encoded = encode(weight, BirkhoffConfig(min_elements=1, raw_above=1.0), by_row=True)
    assert isinstance(encoded, BirkhoffTensor)
    made = HyperLinear.from_encoded(encoded, torch.randn(out_features) if bias else None)
    assert torch.equal(made.dense(), decode(encoded))
    return made


def expect_close(got: Tensor, made: HyperLinear, x: Tensor) -> None:
    weight = naive.dense(made.indices, made.pairs, made.in_features).double()
    bias = None if made.bias is None else made.bias.double()
    expected = F.linear(x.double(), weight, bias)
    assert got.shape == expected.shape
    assert got.dtype == x.dtype
    assert got.isfinite().all()
    rms, largest = BOUNDS[x.dtype]
    error = got.double() - expected
    assert float(error.square().mean().sqrt()) <= rms * float(expected.square().mean().sqrt())
    assert float(error.abs().max()) <= largest * float(expected.abs().max())


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_cpu(rows: int, out_features: int, in_features: int, bias: bool, dtype: torch.dtype) -> None:
    made = layer(out_features, in_features, bias=bias)
    x = torch.randn(rows, in_features).to(dtype)
    for scratch in (1, 1000, cpu.SCRATCH_BYTES):
        out = torch.full((rows, out_features), torch.nan, dtype=cpu.operand(x))
        expect_close(cpu.linear(x, made.indices, made.pairs, made.bias, out=out, scratch_bytes=scratch), made, x)
        assert out.isfinite().all()
    expect_close(naive.linear(x, made.indices, made.pairs, made.bias), made, x)
    expect_close(made(x), made, x)


def test_triton_is_not_needed_to_import() -> None:
    script = "import sys, kernels.hyperlinear; sys.exit('kernels.hyperlinear.gpu' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0


def test_shapes_of_x() -> None:
    made = layer(20, 13)
    for x in (torch.randn(13), torch.randn(2, 3, 4, 13), torch.randn(13, 6).t(), torch.randn(4, 40)[:, 3:16]):
        expect_close(made(x), made, x)
    for shape in ((0, 13), (3, 0, 13)):
        assert made(torch.randn(shape)).shape == (*shape[:-1], 20)
    with pytest.raises(ValueError, match="does not fit"):
        made(torch.randn(2, 15))
    with pytest.raises(TypeError, match="floating"):
        made(torch.ones(2, 13, dtype=torch.int64))


def test_float64() -> None:
    made = layer(20, 13)
    x = torch.randn(4, 13, dtype=torch.float64)
    assert made.bias is not None
    expected = F.linear(x, made.dense().double(), made.bias.double())
    torch.testing.assert_close(made(x), expected, rtol=1e-13, atol=1e-13)


def test_casting_a_model_leaves_the_weights() -> None:
    made = layer(20, 13)
    before = made.dense()
    made.to(torch.bfloat16).half().double()
    assert torch.equal(made.dense(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense_is_in_the_dtype_of_the_source(dtype: torch.dtype) -> None:
    assert layer(9, 15, dtype=dtype).dense().dtype == dtype


def test_memory() -> None:
    """No dense weight is kept, and a product needs no more than its scratch memory."""
    made = layer(512, 2048)
    dense_bytes = 512 * 2048 * 4
    assert made.resident_bytes() == 512 * 1024 * 2 + made.pairs.numel() * 8 + 512 * 4
    assert made.resident_bytes() < 0.28 * dense_bytes
    assert not list(made.parameters())
    assert not made.state_dict()
    x = torch.randn(1, 2048)
    sizes = largest_allocations(lambda: cpu.linear(x, made.indices, made.pairs, made.bias, scratch_bytes=1 << 16))
    assert max(sizes) <= 1 << 16


def largest_allocations(call: object) -> list[int]:
    """Sizes of the memory that torch asked for during a call, in bytes."""
    from torch.profiler import ProfilerActivity, profile

    assert callable(call)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as taken:
        call()
    return [event.cpu_memory_usage for event in taken.events()]


def test_meta() -> None:
    made = layer(20, 13).to("meta")
    assert made(torch.empty(4, 13, device="meta")).shape == (4, 20)
    assert made(torch.empty(4, 13, device="meta", dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_operator_is_well_formed() -> None:
    made = layer(20, 13)
    for x in (torch.randn(4, 13), torch.randn(2, 3, 13, dtype=torch.bfloat16)):
        torch.library.opcheck(torch.ops.hypersam.birkhoff_linear.default, (x, made.indices, made.pairs, made.bias))
        torch.library.opcheck(torch.ops.hypersam.birkhoff_linear.default, (x, made.indices, made.pairs, None))


def test_compile_in_one_graph() -> None:
    model = nn.Sequential(layer(20, 13), nn.GELU(), layer(6, 20, bias=False))
    x = torch.randn(4, 13)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(torch.randn(7, 13)).shape, torch.Size((7, 6)))


def test_from_encoded_refuses() -> None:
    flat = encode(torch.randn(20, 13) * 0.02, BirkhoffConfig(), by_row=False)
    assert isinstance(flat, BirkhoffTensor)
    with pytest.raises(ValueError, match="by row"):
        HyperLinear.from_encoded(flat, None)
    rows = encode(torch.randn(20, 13) * 0.02, BirkhoffConfig(), by_row=True)
    assert isinstance(rows, BirkhoffTensor)
    with pytest.raises(ValueError, match="bias must have shape"):
        HyperLinear.from_encoded(rows, torch.zeros(3))
    assert "in_features=13" in repr(HyperLinear.from_encoded(rows, None))
