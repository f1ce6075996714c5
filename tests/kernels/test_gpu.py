"""The GPU's products against float64: in Triton's interpreter, and for real where there is a CUDA device."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path as File

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.codec import BirkhoffConfig, Coded, encode, lattice, orbit
from kernels.hyperlinear import HyperLinear, allow_int8
from kernels.hyperlinear import orbit as orbit_product
from kernels.hyperlinear.module import BirkhoffLinear, LatticeLinear, OrbitLinear

triton = pytest.importorskip("triton")
tl = triton.language
from kernels.hyperlinear import gpu  # noqa: E402
from kernels.hyperlinear.gpu import activations, decode, paths, product, tune  # noqa: E402
from kernels.hyperlinear.gpu.paths import Path  # noqa: E402
from kernels.hyperlinear.gpu.tile import lower_bound  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["birkhoff", "lattice", "orbit3", "orbit4", "orbit4 rotated", "orbit5", "orbit6", "orbit6 rotated"]
WAYS = [
    Path("fused", tile=(16, 32, 32)),
    Path("decode", decode=(16, 64)),
    Path("int8", tile=(16, 32, 32)),
    Path("int8_decode", tile=(16, 32, 32), decode=(16, 64)),
]
# Relative RMS and largest error over the largest output, against float64. The weight is rounded to x's dtype.
BOUNDS = {torch.float32: (1e-6, 1e-5), torch.float16: (1e-3, 3e-3), torch.bfloat16: (8e-3, 2e-2)}
# One step in 254 of a token's largest activation, four times its rms at most here.
INT8_BOUNDS = (1.5e-2, 5e-2)


def coded(kind: str, out_features: int, in_features: int) -> Coded:
    weight = torch.randn(out_features, in_features) * 0.03
    if kind == "birkhoff":
        found = encode(weight, BirkhoffConfig(min_elements=1, raw_above=1.0), by_row=True)
        assert isinstance(found, Coded)
        return found
    # Some that no level of int8 reaches, or that are kept apart.
    weight.view(-1)[::97] *= 40
    if kind == "lattice":
        return lattice.encode(weight, 0.004, columns=in_features)
    return orbit.encode(weight, int(kind[5]), columns=in_features, rotate=kind.endswith("rotated"))


def layer(kind: str, out_features: int, in_features: int, *, bias: bool = True) -> HyperLinear:
    made = HyperLinear.from_encoded(coded(kind, out_features, in_features), torch.randn(out_features) if bias else None)
    return made.to(DEVICE)


def weight_of(made: HyperLinear) -> gpu.CompressedWeight:
    match made:
        case BirkhoffLinear():
            return gpu.CompressedWeight.birkhoff(made.indices, made.pairs, made.in_features)
        case LatticeLinear():
            return gpu.CompressedWeight.lattice(made.levels, made.step, made.index, made.values)
        case OrbitLinear():
            return gpu.CompressedWeight.orbit(
                made.codes, made.bits, made.table, made.scales, made.block, made.signs, made.index, made.values
            )
    raise AssertionError


def expect_close(got: Tensor, made: HyperLinear, x: Tensor, *, int8: bool = False) -> None:
    bias = None if made.bias is None else made.bias.double()
    expected = F.linear(x.double(), made.dense().double(), bias)
    assert got.shape == expected.shape
    assert got.dtype == x.dtype
    assert got.isfinite().all()
    rms, largest = INT8_BOUNDS if int8 else BOUNDS[x.dtype]
    error = got.double() - expected
    assert float(error.square().mean().sqrt()) <= rms * float(expected.square().mean().sqrt())
    assert float(error.abs().max()) <= largest * float(expected.abs().max())


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, columns), torch.nan, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("path", WAYS, ids=lambda path: path.way)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way(kind: str, path: Path, dtype: torch.dtype) -> None:
    """Odd sizes and the remainders of SAM's: 4 rows of 25 × 196 are left over tiles of 16."""
    full = [(20, 33, 40), (1, 7, 33)] if dtype == torch.float32 else [(4, 33, 40)]
    for rows, out_features, in_features in full:
        made = layer(kind, out_features, in_features, bias=rows > 1)
        x = torch.randn(rows, in_features, device=DEVICE).to(dtype)
        # Wider than the result and full of NaN: a stray write or a hole shows.
        wide = poisoned(rows + 2, out_features + 3, dtype)
        out = wide[:rows, :out_features]
        gpu.linear(x, weight_of(made), made.bias, path=path, out=out)
        expect_close(out, made, x, int8=path.int8)
        assert wide[rows:].isnan().all()
        assert wide[:, out_features:].isnan().all()
        again = gpu.linear(x, weight_of(made), made.bias, path=path, out=poisoned(rows, out_features, dtype))
        assert torch.equal(again, out)


def shipped() -> Iterator[tuple[str, str, Path]]:
    found = {
        (form, operands, entry.path): None
        for entries in paths.shipped().values() for entry in entries
        for form, operands in itertools.product(entry.forms, entry.operands)
    }  # fmt: skip
    return iter(found)


@pytest.mark.parametrize(("form", "operands", "path"), list(shipped()), ids=str)
def test_every_shipped_configuration(form: str, operands: str, path: Path) -> None:
    made = layer(form, 20, 140)
    dtype = torch.float32 if operands == "float32" else torch.bfloat16
    x = torch.randn(3, 140, device=DEVICE).to(dtype)
    got = gpu.linear(x, weight_of(made), made.bias, path=path, out=poisoned(3, 20, dtype))
    expect_close(got, made, x, int8=path.int8)


@pytest.mark.parametrize("path", WAYS, ids=lambda path: path.way)
def test_strides_dimensions_and_nothing(path: Path) -> None:
    made = layer("orbit4 rotated", 20, 12)
    weight = weight_of(made)
    for x in (
        torch.randn(12, device=DEVICE),
        torch.randn(12, 5, device=DEVICE).t(),
        torch.randn(2, 9, 40, device=DEVICE)[:, ::2, 5:17],
    ):
        expect_close(gpu.linear(x, weight, made.bias, path=path), made, x, int8=path.int8)
    assert gpu.linear(torch.empty(0, 5, 12, device=DEVICE), weight, made.bias, path=path).shape == (0, 5, 20)
    with pytest.raises(TypeError, match="float64"):
        gpu.linear(torch.randn(2, 12, device=DEVICE).double(), weight, made.bias, path=path)


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_gives_the_bits_of_the_codec(kind: str) -> None:
    made = layer(kind, 21, 44)
    weight = weight_of(made)
    out = poisoned(21, 44, torch.float32)
    decode.fill(out, weight, (16, 32))
    if weight.block > 1:
        out = orbit_product.rotated(out, 1, made.signs)
        turned = orbit_product.butterflies(out, weight.block) * float(orbit_product.norm(weight.block)) * made.signs
        assert torch.equal(turned, made.dense())
    elif weight.index is None or not weight.added:
        assert torch.equal(out, made.dense())
    else:
        torch.testing.assert_close(out, made.dense(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("block", [4, 8, 16, 32, 64, 128])
def test_rotation(block: int, dtype: torch.dtype) -> None:
    x = torch.randn(19, 3 * block, device=DEVICE).to(dtype)
    signs = torch.randint(0, 2, (3 * block,), dtype=torch.int8, device=DEVICE) * 2 - 1
    expected = orbit_product.rotated(x.double(), block, signs)
    got = activations.rotate(x, block, signs)
    assert got.dtype == dtype
    assert float((got.double() - expected).abs().max()) <= BOUNDS[dtype][0] * float(expected.abs().max())
    quantised, scales = activations.quantise(x, block, signs)
    assert float((quantised * scales[:, None] - expected).abs().max()) <= 0.5001 * float(scales.max())


def test_quantised_rows_of_zeros_and_of_nan() -> None:
    x = torch.randn(4, 20, device=DEVICE)
    x[1], x[2, 3], x[3, 5] = 0, torch.nan, torch.inf
    quantised, scales = activations.quantise(x, 1, None)
    assert quantised[0].abs().max() == 127
    assert not quantised[1].any()
    assert scales[:2].isfinite().all()
    assert scales[2:].isnan().all()


@pytest.mark.parametrize("which", ["x", "codes", "out"])
def test_offsets_beyond_32_bits(which: str) -> None:
    """Two rows more than 2^31 elements apart, in memory of which the system provides only what is touched."""
    made = layer("lattice", 2, 40)
    assert isinstance(made, LatticeLinear)
    far = (1 << 31) + 16

    def apart(tensor: Tensor) -> Tensor:
        base = torch.empty(far + 64, dtype=tensor.dtype, device=DEVICE)
        return base.as_strided(tensor.shape, (far, 1)).copy_(tensor)

    x = torch.randn(2, 40, device=DEVICE).half()
    weight = weight_of(made)
    expected = gpu.linear(x, weight, made.bias, path=WAYS[0])
    if which == "x":
        got = gpu.linear(apart(x), weight, made.bias, path=WAYS[0])
    elif which == "codes":
        levels = apart(made.levels)
        far_weight = gpu.CompressedWeight.lattice(levels, made.step, made.index, made.values)
        got = gpu.linear(x, far_weight, made.bias, path=WAYS[0])
        out = poisoned(2, 40, torch.float32)
        decode.fill(out, far_weight, (16, 32))
        assert torch.equal(out, made.dense())
    else:
        got = apart(torch.zeros(2, 2, dtype=torch.float16, device=DEVICE))
        gpu.linear(x, weight, made.bias, path=WAYS[0], out=got)
    assert torch.equal(got, expected)


@triton.jit
def _bounds_kernel(index, count, steps, keys, out, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(out + at, lower_bound(index, count, steps, tl.load(keys + at)))


def test_corrections_beyond_32_bits() -> None:
    """Flat positions of a weight that is wider than memory: the search for a row's own."""
    index = torch.tensor([5, (1 << 33) + 1, (1 << 33) + 2, 3 << 33], dtype=torch.int64)
    keys = [0, 5, 6, 1 << 33, (1 << 33) + 2, 1 << 40]
    found = torch.tensor([sum(int(number) < key for number in index) for key in keys])
    assert torch.equal(torch.searchsorted(index, torch.tensor(keys)), found)
    out = torch.full((8,), -1, dtype=torch.int64, device=DEVICE)
    _bounds_kernel[(1,)](
        index.to(DEVICE), 4, 3, torch.tensor([*keys, 0, 0], device=DEVICE), out, SIZE=8
    )  # fmt: skip
    assert out[:6].tolist() == found.tolist()


def test_table_of_paths(tmp_path: File, monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in itertools.chain.from_iterable(paths.shipped().values()):
        assert entry == paths.parsed(
            json.dumps({"format": 1, "devices": {"any": {"entries": [entry.as_dict()]}}}), "here"
        )["any"][0]  # fmt: skip
    for device in ("NVIDIA H100 80GB HBM3", "cpu"):
        entries = paths.entries_for(device)
        for form, operands, rows, int8 in itertools.product(
            paths.FORMS, ("half", "float32"), (1, 64, 4900), (False, True)
        ):
            path = next(entry.path for entry in entries if entry.takes(form, operands, rows, 1 << 20, int8))
            assert int8 or not path.int8
            assert int8 is False or operands == "float32" or path.int8
    own = tmp_path / "paths.json"
    monkeypatch.setenv(paths.VARIABLE, str(own))
    only = paths.Entry(("lattice",), ("half",), None, None, WAYS[1], measured=True)
    own.write_text(json.dumps({"format": 1, "devices": {"cpu": {"entries": [only.as_dict()]}}}))
    paths._tables.cache_clear()
    paths.choose.cache_clear()
    try:
        assert paths.choose("lattice", torch.float16, 9, 99, True, torch.device("cpu")) == WAYS[1]
        assert paths.choose("orbit4", torch.float16, 9, 99, False, torch.device("cpu")).way == "fused"
    finally:
        paths._tables.cache_clear()
        paths.choose.cache_clear()
    for wrong in ("no", "{}", '{"format": 2, "devices": {}}'):
        with pytest.raises(ValueError, match=r"here is no table"):
            paths.parsed(wrong, "here")


def test_tuning_writes_what_is_read(tmp_path: File) -> None:
    device = torch.device(DEVICE)
    told: list[str] = []
    entries = tune.measure(
        device, forms=["lattice", "orbit3"], rows=[4, 80], layers=[(16, 32)], dtypes=[torch.float16], tell=told.append
    )
    assert len(told) == 4
    file = tmp_path / "folder" / "paths.json"
    tune.write(file, "a device", entries)
    tune.write(file, "another", entries[:1])
    table = paths.parsed(file.read_text(), "here")
    assert table == {"a device": tuple(entries), "another": (entries[0],)}
    for form, rows, int8 in itertools.product(("lattice", "orbit3"), (1, 4000), (False, True)):
        assert any(entry.takes(form, "half", rows, 1 << 20, int8) and entry.measured for entry in entries)


@pytest.mark.parametrize(
    ("way", "rest", "says"),
    [
        ("best", {"tile": (16, 16, 16)}, "way must be"),
        ("fused", {}, "has a tile"),
        ("decode", {"tile": (16, 16, 16)}, "has a tile"),
        ("int8", {"tile": (16, 16, 16)}, "at least 32"),
        ("fused", {"tile": (16, 16, 24)}, "powers of two"),
        ("fused", {"tile": (16, 16, 16), "warps": 3}, "warps"),
    ],
)
def test_paths_refuse(way: str, rest: dict[str, tuple[int, ...]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Path(way, **rest)


def test_int8_is_allowed_layer_by_layer() -> None:
    model = nn.Sequential(layer("lattice", 9, 12), nn.GELU(), layer("orbit4", 5, 9))
    assert not model[0].int8
    allow_int8(model)
    assert model[0].int8
    assert model[2].int8
    allow_int8(model, False)
    assert not model[2].int8


def test_kernels_compile_for_hopper() -> None:
    """Triton's compiler needs no GPU, and takes less than its interpreter does. 16-bit and int8 products use wgmma."""
    script = (
        "from benchmarks.gpu_compile import run\n"
        "for row in run(('orbit5',)):\n"
        "    print(row['operands'], row['path'], row['wgmma'], row['spilled_bytes'], sep=';')\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split(";") for line in done.stdout.splitlines()]
    assert {path.split()[0] for _, path, _, _ in rows} == {"fused", "int8", "int8_decode"}
    for operands, _, wgmma, spilled in rows:
        assert (int(wgmma) > 0) == (operands == "half")
        assert spilled == "0"


# --- what only a device can show ---------------------------------------------------------------------------


def sam_layers() -> list[HyperLinear]:
    return [layer(kind, out, 256) for kind in ("birkhoff", "lattice", "orbit4 rotated") for out in (256, 768, 1000)]


@pytest.mark.gpu
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_on_the_device(kind: str, int8: bool) -> None:
    made = layer(kind, 768, 256)
    allow_int8(made, int8)
    for rows, dtype in itertools.product((1, 7, 64, 196, 4900), BOUNDS):
        x = torch.randn(rows, 256, device=DEVICE).to(dtype)
        expect_close(made(x), made, x, int8=int8 and dtype != torch.float32)
    back = torch.randn(56, 768, device=DEVICE)
    expected = back.double() @ made.dense().double()
    assert float((made.transposed(back).double() - expected).norm() / expected.norm()) < BOUNDS[torch.float32][0]


@pytest.mark.gpu
def test_nothing_waits_for_the_device() -> None:
    layers = sam_layers()
    x = torch.randn(300, 256, device=DEVICE, dtype=torch.bfloat16)
    for made in layers:
        made.transposed(made(x))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for made in layers:
            made.transposed(made(x))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_one_kernel_for_all_layers() -> None:
    """Layers of other sizes, constants and corrections take the kernels that are there."""
    path = Path("fused", tile=(32, 64, 64))
    x = torch.randn(50, 256, device=DEVICE, dtype=torch.float16)
    counts = []
    for out in (256, 512, 1000):
        made = layer("lattice", out, 256, bias=out != 512)
        gpu.linear(x, weight_of(made), made.bias, path=path)
        counts.append(sum(len(cache[0]) for cache in product._product_kernel.device_caches.values()))
    assert counts[0] == counts[-1]


@pytest.mark.gpu
def test_cuda_graph() -> None:
    layers = sam_layers()
    x = torch.randn(300, 256, device=DEVICE, dtype=torch.bfloat16)
    expected = [made(x) for made in layers]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = [made(x) for made in layers]
    for tensor in got:
        tensor.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
def test_compiled() -> None:
    model = nn.Sequential(layer("orbit4 rotated", 512, 256), nn.GELU(), layer("lattice", 256, 512)).to(DEVICE)
    x = torch.randn(300, 256, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x), rtol=2e-2, atol=2e-2)
