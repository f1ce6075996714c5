"""The ``lattice`` codec: against its oracle and golden vectors, its rates, odd inputs, damaged streams."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.codec import lattice, lattice_naive, lattice_tables, rans
from kernels.codec.lattice import LatticeTensor

GOLDEN = Path(__file__).with_name("golden") / "lattice.json"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    (1, 1), (1, 2), (2, 1), (1, 15), (3, 16), (5, 17), (6, 9), (40, 33), (7, 64),
    (126, 130), (1100, 15),
]  # fmt: skip
LARGE = [(130, 128), (1, 17001), (1900, 9), (17000, 1), (3, 30000)]
ANY = r"."
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def rows(kind: str, count: int, columns: int, *, spread: float = 0.35) -> Tensor:
    """Rows of one distribution, unit variance times 0.03, times a log-normal row factor."""
    rng = np.random.default_rng(1)
    drawn = {
        "gauss": lambda: rng.normal(size=(count, columns)),
        "laplace": lambda: rng.laplace(size=(count, columns)) / math.sqrt(2),
        "t5": lambda: rng.standard_t(5, size=(count, columns)) / math.sqrt(5 / 3),
    }[kind]()
    return torch.from_numpy((0.03 * drawn * np.exp(rng.normal(0, spread, count))[:, None]).astype(np.float32))


def same(coded: LatticeTensor, oracle: LatticeTensor) -> None:
    assert coded.constants() == oracle.constants()
    assert torch.equal(coded.stream(), oracle.stream())


def check_decoded(weight: Tensor, coded: LatticeTensor) -> None:
    """Every decoded weight is the nearest multiple or the weight itself, and the resident form gives the same."""
    dense = lattice.decode(coded)
    assert dense.shape == weight.shape
    assert dense.dtype == weight.dtype
    assert dense.isfinite().all()
    levels, corrections = lattice.levels(coded)
    assert levels.dtype == torch.int8
    assert levels.shape == (coded.rows, coded.columns)
    assert int(levels.min()) >= -127
    index = corrections.index
    assert bool((index.diff() > 0).all())
    resident = levels.to(torch.float32).mul(coded.step).add(coded.offset).reshape(-1)
    resident[index] = corrections.values
    assert torch.equal(resident.view(weight.shape).to(weight.dtype), dense)
    flat = weight.reshape(-1)
    assert torch.equal(corrections.values.to(weight.dtype), flat[index].float().to(weight.dtype))
    apart = torch.ones(weight.numel(), dtype=torch.bool)
    apart[index] = False
    # Half a step, and what fp32 loses on the way there and back.
    bound = 0.5 * coded.step * (1 + 1e-4) + 2**-22 * (flat.abs().double().clamp(max=1e30) + abs(coded.offset))
    error = (lattice.decode(coded, dtype=torch.float32).reshape(-1).double() - flat.double()).abs()
    assert bool((error <= bound)[apart].all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("count", "columns"), SHAPES)
def test_streams_are_those_of_the_oracle(count: int, columns: int, dtype: torch.dtype) -> None:
    weight = torch.randn(count, columns) * torch.randn(count, 1).exp() * 0.05
    if count > 2:
        weight[1] = 0
        weight[2, 0] = 6e4
    if count > 5:
        weight[3] = -5e4
        weight[4] *= 1e-4
    weight = weight.to(dtype)
    offset = 0.25 if count == 1 else 0.0
    coded = lattice.encode(weight, 0.02, columns=columns, offset=offset)
    same(coded, lattice_naive.encode(weight, 0.02, columns=columns, offset=offset))
    assert torch.equal(lattice.decode(coded), lattice_naive.decode(coded))
    check_decoded(weight, coded)
    again = LatticeTensor.parse(coded.shape, coded.dtype, json.loads(json.dumps(coded.constants())), coded.stream())
    assert torch.equal(lattice.decode(again), lattice.decode(coded))


@pytest.mark.parametrize(("count", "columns"), LARGE)
def test_lanes_and_segments_are_those_of_the_oracle(count: int, columns: int) -> None:
    weight = torch.randn(count, columns) * torch.randn(count, 1).exp() * 0.05
    weight[::3] = 0
    weight[-1, 0] = 9.0
    for beta in (0, 6):
        coded = lattice.encode(weight, 0.02, columns=columns, beta=beta)
        same(coded, lattice_naive.encode(weight, 0.02, columns=columns, beta=beta))
    assert torch.equal(lattice.decode(coded), lattice_naive.decode(coded))
    check_decoded(weight, coded)


def test_segments_of_zeros_alone() -> None:
    weight = torch.zeros(400, 700)
    weight[150] = 1.0
    coded = lattice.encode(weight, 0.125, columns=700)
    same(coded, lattice_naive.encode(weight, 0.125, columns=700, beta=coded.beta))
    assert torch.equal(lattice.decode(coded), weight)


@pytest.mark.parametrize("beta", range(7))
@pytest.mark.parametrize("step", [0.001, 0.01, 0.3, 5.0])
def test_every_shape_of_table(step: float, beta: int) -> None:
    weight = rows("laplace", 24, 40, spread=2.0)
    coded = lattice.encode(weight, step, columns=40, beta=beta)
    assert coded.beta == beta
    same(coded, lattice_naive.encode(weight, step, columns=40, beta=beta))
    assert torch.equal(lattice.decode(coded), lattice_naive.decode(coded))
    check_decoded(weight, coded)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.floats(2.0**-126, 2.0**100, width=32),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from(DTYPES),
)
def test_any_finite_numbers(values: list[float], step: float, offset: float, dtype: torch.dtype) -> None:
    weight = torch.tensor(values, dtype=torch.float32).to(dtype)
    if not weight.isfinite().all():
        return
    for columns in {1, len(values)}:
        coded = lattice.encode(weight, step, columns=columns, offset=offset)
        same(coded, lattice_naive.encode(weight, step, columns=columns, offset=offset))
        dense = lattice.decode(coded)
        assert torch.equal(dense, lattice_naive.decode(coded))
        assert dense.isfinite().all()


@pytest.mark.parametrize("kind", ["gauss", "laplace", "t5"])
@pytest.mark.parametrize(("count", "columns"), [(768, 768), (400, 3072)])
@pytest.mark.parametrize(("bits", "least_db"), [(6.19, 35.5), (4.92, 28.0)])
def test_rates_and_errors(kind: str, count: int, columns: int, bits: float, least_db: float) -> None:
    weight = rows(kind, count, columns)
    rms = float(weight.double().square().mean().sqrt())
    low, high = -8.0, 2.0
    for _ in range(20):
        middle = (low + high) / 2
        found = lattice.estimate(weight, 2**middle * rms, columns=columns)
        low, high = (middle, high) if found.bits > bits * weight.numel() else (low, middle)
    step = 2**high * rms
    found = lattice.estimate(weight, step, columns=columns)
    coded = lattice.encode(weight, step, columns=columns)
    assert 8 * coded.nbytes == pytest.approx(bits * weight.numel(), rel=0.003)
    assert found.bits == pytest.approx(8 * coded.nbytes, rel=0.003)
    error = float((weight.double() - lattice.decode(coded).double()).square().sum())
    assert found.squared_error == pytest.approx(error, rel=0.02)
    assert 10 * math.log10(float(weight.double().square().sum()) / error) >= least_db


@pytest.mark.parametrize("relative", [0.05, 0.12, 0.25])
def test_bytes_are_near_the_entropy_of_the_model(relative: float) -> None:
    # The entropy of levels whose distribution and row spreads are known exactly.
    count, columns = 768, 1280
    weight = rows("gauss", count, columns)
    sigma = 0.03 * np.exp(_spreads(count, columns))
    step = relative * 0.03
    edges = (np.arange(-400, 401) - 0.5) * step
    entropy = 0.0
    for s in sigma:
        mass = np.diff([0.5 * math.erfc(-e / (s * math.sqrt(2))) for e in edges])
        mass = mass[mass > 0]
        entropy -= columns * float((mass * np.log2(mass)).sum())
    coded = lattice.encode(weight, step, columns=columns)
    assert 8 * coded.nbytes <= 1.01 * entropy


def _spreads(count: int, columns: int) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(1)
    rng.normal(size=(count, columns))
    return rng.normal(0, 0.35, count)


@pytest.mark.parametrize(
    ("shape", "columns"), [((4096, 300), 300), ((9000, 128), 128), ((1, 1000003), 1000003), ((1500, 1000), 1000)]
)
def test_estimates_from_samples(shape: tuple[int, int], columns: int) -> None:
    weight = rows("laplace", *shape)
    for step, dtype in ((0.002, torch.float32), (0.01, torch.bfloat16), (0.005, torch.float16)):
        source = weight.to(dtype)
        coded = lattice.encode(source, step, columns=columns)
        found = lattice.estimate(source, step, columns=columns)
        assert found.bits == pytest.approx(8 * coded.nbytes, rel=0.003)
        assert found.squared_error == pytest.approx(
            float((source.double() - lattice.decode(coded)).square().sum()), rel=0.02
        )


def test_constants_and_zeros() -> None:
    constant = torch.full((768,), 0.7)
    coded = lattice.encode(constant, 0.01, columns=768, offset=float(np.float32(0.7)))
    assert coded.nbytes == 1 + 4 + 4
    assert torch.equal(lattice.decode(coded), constant)
    zeros = torch.zeros(300, 100)
    coded = lattice.encode(zeros, 1e-3, columns=100)
    assert torch.equal(lattice.decode(coded), zeros)
    assert set(coded.parts().classes.tolist()) == {lattice_tables.ZERO_ROW}
    assert lattice.estimate(zeros, 1e-3, columns=100).squared_error == 0.0
    scalar = torch.tensor(3.0)
    assert torch.equal(lattice.decode(lattice.encode(scalar, 0.5, columns=1)), scalar)


def test_huge_outliers_cost_themselves_alone() -> None:
    weight = rows("gauss", 64, 768)
    plain = lattice.encode(weight, 0.004, columns=768)
    spoilt = weight.clone()
    spoilt[::2, 5] = 3e38
    spoilt[1::2, 700] = -1e12
    coded = lattice.encode(spoilt, 0.004, columns=768)
    assert torch.equal(lattice.decode(coded)[:, [5]][::2], spoilt[:, [5]][::2])
    assert coded.nbytes - plain.nbytes < 64 * 7


def test_half_precision_sources_never_overflow() -> None:
    top = torch.finfo(torch.float16).max
    weight = torch.tensor([[top, -top, 100.0, 0.0]] * 3, dtype=torch.float16)
    coded = lattice.encode(weight, 700.0, columns=4)
    dense = lattice.decode(coded)
    assert dense.isfinite().all()
    assert torch.equal(dense[:, :2], weight[:, :2])


def test_what_cannot_be_coded() -> None:
    weight = torch.randn(4, 6)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="finite"):
            lattice.encode(torch.where(torch.arange(6) == 3, bad, weight), 0.1, columns=6)
        with pytest.raises(ValueError, match="step"):
            lattice.encode(weight, bad, columns=6)
        with pytest.raises(ValueError, match="offset"):
            lattice.encode(weight, 0.1, columns=6, offset=bad)
    with pytest.raises(ValueError, match="finite"):
        lattice.encode(torch.tensor([1e300], dtype=torch.float64), 0.1, columns=1)
    for step in (0.0, -1.0, 1e-40, 1e300):
        with pytest.raises(ValueError, match="step"):
            lattice.encode(weight, step, columns=6)
        with pytest.raises(ValueError, match="step"):
            lattice.estimate(weight, step, columns=6)
    subnormal = torch.full((10,), 1e-42)
    assert torch.equal(lattice.decode(lattice.encode(subnormal, 2.0**-126, columns=10)), torch.zeros(10))
    for columns in (0, -1, 5, 25):
        with pytest.raises(ValueError, match="columns"):
            lattice.encode(weight, 0.1, columns=columns)
    with pytest.raises(ValueError, match="empty"):
        lattice.encode(torch.empty(0, 6), 0.1, columns=6)
    with pytest.raises(ValueError, match="dtype"):
        lattice.encode(torch.ones(6, dtype=torch.int64), 0.1, columns=6)
    for beta in (-1, 7):
        with pytest.raises(ValueError, match="beta"):
            lattice.encode(weight, 0.1, columns=6, beta=beta)


def test_non_contiguous_and_offset_streams() -> None:
    weight = torch.randn(200, 130).T
    coded = lattice.encode(weight, 0.1, columns=200)
    check_decoded(weight.contiguous(), coded)
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), coded.stream()])[1:]
    again = LatticeTensor.parse(coded.shape, coded.dtype, coded.constants(), shifted)
    assert torch.equal(lattice.decode(again), lattice.decode(coded))


def coded_example() -> LatticeTensor:
    weight = rows("laplace", 150, 130)
    weight[7] = 0
    weight[9, 9] = 40.0
    return lattice.encode(weight, 0.004, columns=130)


@pytest.mark.parametrize(
    ("key", "value"),
    [("columns", 0), ("columns", 7), ("columns", True), ("columns", "130"), ("beta", 7), ("beta", 1.0), ("beta", None),
     ("step", 0.0), ("step", -0.5), ("step", 0.1), ("step", math.nan), ("step", 2.0**-130), ("step", 10**400),
     ("step", "1"), ("offset", math.inf), ("offset", 1e-60), ("offset", None)],
)  # fmt: skip
def test_damaged_constants(key: str, value: object) -> None:
    coded = coded_example()
    with pytest.raises(ValueError, match=key):
        LatticeTensor.parse(coded.shape, coded.dtype, {**coded.constants(), key: value}, coded.stream())
    rest = {k: v for k, v in coded.constants().items() if k != key}
    with pytest.raises(KeyError):
        LatticeTensor.parse(coded.shape, coded.dtype, rest, coded.stream())


def test_claims_of_size_need_no_memory() -> None:
    coded = coded_example()
    for shape in ((150, 130 << 40), (150 << 40, 130), (1 << 62, 1 << 62), (0, 130), (-150, -130)):
        with pytest.raises(ValueError, match=ANY):
            LatticeTensor.parse(shape, coded.dtype, coded.constants(), coded.stream())
    wide = {**coded.constants(), "columns": 130 << 40}
    with pytest.raises(ValueError, match=ANY):
        LatticeTensor.parse((150, 130 << 40), coded.dtype, wide, coded.stream())
    with pytest.raises(ValueError, match="dtype"):
        LatticeTensor.parse(coded.shape, torch.int8, coded.constants(), coded.stream())
    with pytest.raises(ValueError, match="uint8"):
        LatticeTensor.parse(coded.shape, coded.dtype, coded.constants(), coded.stream().to(torch.int16))


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 100, 10**9])
def test_shortened_and_lengthened_streams(cut: int) -> None:
    coded = coded_example()
    stream = coded.stream()
    for damaged in (stream[: max(0, stream.numel() - cut)], torch.cat([stream, torch.zeros(min(cut, 999)).byte()])):
        with pytest.raises(ValueError, match=ANY):
            lattice.decode(LatticeTensor.parse(coded.shape, coded.dtype, coded.constants(), damaged))


def test_damaged_streams_decode_or_raise() -> None:
    coded = coded_example()
    generator = torch.Generator().manual_seed(3)
    symbols_end = coded.nbytes - 4 * coded.parts().escapes.size
    raised = 0
    for number in range(300):
        stream = coded.stream().clone()
        where = int(torch.randint(symbols_end, (), generator=generator))
        stream[where] ^= int(torch.randint(1, 256, (), generator=generator))
        try:
            damaged = LatticeTensor.parse(coded.shape, coded.dtype, coded.constants(), stream)
        except ValueError:
            raised += 1
            continue
        try:
            lattice.decode(damaged)
        except ValueError:
            raised += 1
            if number % 10 == 0:
                with pytest.raises(ValueError, match=ANY):
                    lattice_naive.decode(damaged)
    # States return to where the encoder began only by chance.
    assert raised >= 295
    for seed in range(50):
        noise = torch.randint(256, (coded.nbytes,), dtype=torch.uint8, generator=generator.manual_seed(seed))
        noise[: coded.rows] = coded.stream()[: coded.rows]
        with pytest.raises(ValueError, match=ANY):
            lattice.decode(LatticeTensor.parse(coded.shape, coded.dtype, coded.constants(), noise))


def test_damaged_words_are_found_when_decoded() -> None:
    coded = coded_example()
    parts = coded.parts()
    generator = torch.Generator().manual_seed(4)
    words_end = coded.nbytes - 4 * parts.escapes.size
    words_start = words_end - 2 * parts.segments.words.size
    for _ in range(100):
        stream = coded.stream().clone()
        noise = torch.randint(256, (words_end - words_start,), dtype=torch.uint8, generator=generator)
        cut = int(torch.randint(words_end - words_start, (), generator=generator))
        stream[words_start + cut : words_end] = noise[cut:]
        damaged = LatticeTensor.parse(coded.shape, coded.dtype, coded.constants(), stream)
        if not torch.equal(stream, coded.stream()):
            with pytest.raises(ValueError, match=r"decode|escapes"):
                lattice.decode(damaged)
            with pytest.raises(ValueError, match=r"decode|escapes"):
                lattice.levels(damaged)


def test_segment_layout() -> None:
    assert rans.segment_rows(1280) == 51
    assert rans.segment_count(1280, 1280) == 26
    assert rans.segment_rows(70000) == 1
    assert rans.lane_count(127, 129) == 1
    assert rans.lane_count(128, 128) == 16


def test_tables() -> None:
    for beta in range(len(lattice_tables.BETAS)):
        made = lattice_tables.table(beta)
        assert bool((made.frequency.sum(axis=1) == 4096).all())
        assert bool((made.frequency[:, 0] >= 1).all())
        assert bool((made.frequency[:, 1:] == made.frequency[:, :0:-1]).all())
        for j, most in enumerate(made.limit.tolist()):
            assert bool((made.frequency[j, 128 - most : 129 + most] >= 1).all())
            assert int(made.frequency[j, 129 + most :].sum()) == 0


def test_reciprocals_divide_exactly() -> None:
    rng = np.random.default_rng(0)
    f = np.arange(1, 4096, dtype=np.uint64)
    inverse = np.uint64(1 << 44) // f + np.uint64(1)
    top = f << np.uint64(20)
    for x in (
        top - np.uint64(1),
        top - f,
        top - f - np.uint64(1),
        *(rng.integers(0, top, dtype=np.uint64) for _ in range(200)),
    ):
        assert bool(((x * inverse) >> np.uint64(44) == x // f).all())


def golden_weight(case: dict[str, Any]) -> Tensor:
    """The weights of a golden vector, as docs/codec-v1.md says."""
    x = case["seed"]
    values = []
    for _ in range(math.prod(case["shape"])):
        total = 0
        for _ in range(3):
            x = (1664525 * x + 1013904223) % 2**32
            total += (x >> 16) % 2001 - 1000
        values.append(total * 2.0 ** -case["exponent"])
    weight = torch.tensor(values, dtype=torch.float64).to(torch.float32)
    for place, value in case["changes"]:
        weight[place] = value
    if case["zero_row"] is not None:
        weight.view(-1, case["constants"]["columns"])[case["zero_row"]] = 0
    return weight.view(case["shape"]).to(getattr(torch, case["dtype"]))


@pytest.mark.parametrize("number", range(4))
def test_golden_vectors(number: int) -> None:
    case = json.loads(GOLDEN.read_text())["cases"][number]
    stream = torch.frombuffer(bytearray(base64.b64decode(case["stream"])), dtype=torch.uint8)
    dtype = getattr(torch, case["dtype"])
    parsed = LatticeTensor.parse(tuple(case["shape"]), dtype, case["constants"], stream)
    dense = lattice.decode(parsed, dtype=torch.float32)
    assert torch.equal(lattice_naive.decode(parsed, dtype=torch.float32), dense)
    assert hashlib.sha256(dense.numpy().astype("<f4").tobytes()).hexdigest() == case["decoded_fp32_sha256"]
    if "decoded" in case:
        assert dense.reshape(-1).tolist() == case["decoded"]
    constants = case["constants"]
    again = lattice.encode(
        golden_weight(case), constants["step"], columns=constants["columns"], offset=constants["offset"]
    )
    same(again, parsed)


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (5, 17), (7, 64), (129, 130), (1, 400)])
def test_triton(count: int, columns: int) -> None:
    lattice_triton = pytest.importorskip("kernels.codec.lattice_triton")
    weight = torch.randn(count, columns) * 0.05
    if count > 2:
        weight[1] = 0
        weight[2, 0] = -6e4
    coded = lattice.encode(weight, 0.02, columns=columns, offset=0.25 if count == 1 else 0.0)
    expected, corrections = lattice.levels(coded)
    found, apart = lattice_triton.levels(coded, DEVICE)
    assert torch.equal(found.cpu(), expected)
    assert torch.equal(apart.index.cpu(), corrections.index)
    assert torch.equal(apart.values.cpu(), corrections.values)


def test_triton_refuses_damage() -> None:
    lattice_triton = pytest.importorskip("kernels.codec.lattice_triton")
    weight = torch.randn(8, 2048) * 0.05
    weight[1:7] = 0
    coded = lattice.encode(weight, 0.02, columns=2048)
    generator = torch.Generator().manual_seed(5)
    states_end = coded.rows + 4 * 17
    for _ in range(4):
        stream = coded.stream().clone()
        where = int(torch.randint(states_end, stream.numel() - 1, (), generator=generator))
        stream[where] ^= 1
        damaged = LatticeTensor.parse(coded.shape, coded.dtype, coded.constants(), stream)
        with pytest.raises(ValueError, match=r"decode|escapes"):
            lattice_triton.levels(damaged, DEVICE)
