from __future__ import annotations

import base64
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.codec import hadamard, orbit, orbit_naive, orbit_torch, trellis_numba
from kernels.codec.orbit import OrbitTensor, Plan
from kernels.codec.orbit_rows import Matrix, encode_rows
from kernels.codec.orbit_tables import LAWS, table

GOLDEN = Path(__file__).parent / "golden" / "orbit.json"


def sample(rows: int, columns: int, *, law: str = "gauss", seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    values = {
        "gauss": lambda: rng.normal(size=(rows, columns)),
        "laplace": lambda: rng.laplace(size=(rows, columns)),
        "t5": lambda: rng.standard_t(5, size=(rows, columns)),
    }[law]()
    return torch.tensor(0.02 * values * np.exp(rng.normal(0, 0.5, (rows, 1))), dtype=torch.float32)


def decibels(weight: Tensor, decoded: Tensor) -> float:
    weight, decoded = weight.double(), decoded.double()
    return 10 * math.log10(float((weight**2).sum() / ((weight - decoded) ** 2).sum()))


def assert_same(left: OrbitTensor, right: OrbitTensor) -> None:
    assert left.constants() == right.constants()
    assert torch.equal(left.codes, right.codes)
    assert torch.equal(left.scales, right.scales)
    assert torch.equal(left.stream(), right.stream())


def parsed(encoded: OrbitTensor) -> OrbitTensor:
    constants = json.loads(json.dumps(encoded.constants()))
    return OrbitTensor.parse(encoded.shape, encoded.dtype, constants, encoded.stream())


# --- equal to the naive version ---


@pytest.mark.parametrize("k", [3, 4, 5, 6])
@pytest.mark.parametrize(
    ("rows", "columns", "plan"),
    [
        (3, 24, Plan(0, block=8)),
        (2, 17, Plan(1)),
        (5, 29, Plan(2, threshold=2.0)),
        (1, 1, Plan(0)),
        (2, 12, Plan(2, block=4, seed=(1 << 64) - 1)),
    ],
)
def test_naive_and_fast_agree(k: int, rows: int, columns: int, plan: Plan) -> None:
    weight = sample(rows, columns, law="t5", seed=k)
    fast = orbit.encode_planned(weight, k, plan, columns=columns)
    assert_same(fast, orbit_naive.encode(weight, k, plan, columns=columns))
    assert torch.equal(orbit.decode(fast), orbit_naive.decode(fast))


@pytest.mark.parametrize("k", [3, 4, 5, 6])
def test_the_search_finds_the_best_of_all_paths(k: int) -> None:
    columns = {3: 5, 4: 4, 5: 3, 6: 3}[k]
    tables = table(k, 0)
    rng = np.random.default_rng(k)
    x = (rng.normal(0, 40, (columns, 3)) * (1 << trellis_numba.FRACTION)).astype(np.int32)
    codes = np.empty((columns, 3), np.uint8)
    trellis_numba.viterbi(x, tables.slopes, tables.bases, codes)
    symbols = np.indices((1 << k,) * columns).reshape(columns, -1)
    before = np.concatenate([np.zeros_like(symbols[:1]), symbols[:-1]])
    levels = tables.levels[(before << k) | symbols].astype(np.int64) << trellis_numba.FRACTION
    for lane in range(3):
        errors = ((levels - x[:, lane, None]) ** 2).sum(axis=0)
        path = codes[:, lane].astype(np.int64)
        mine = ((tables.levels[(np.concatenate([[0], path[:-1]]) << k) | path].astype(np.int64) << 6) - x[:, lane]) ** 2
        assert mine.sum() == errors.min()


def test_equal_codes_beside_any_rows_and_on_any_number_of_threads() -> None:
    weight = sample(150, 96, law="laplace")
    plan = Plan(1, threshold=3.0)
    whole = orbit.encode_planned(weight, 4, plan, columns=96)
    assert_same(whole, orbit.encode_planned(weight, 4, plan, columns=96, threads=3))
    alone = orbit.encode_planned(weight[77:78], 4, plan, columns=96)
    assert torch.equal(alone.codes[0], whole.codes[77])


def test_long_rows_are_searched_in_spans_with_the_same_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = table(4, 2)
    columns = 2 * trellis_numba.SPAN + 5
    x = (np.random.default_rng(0).normal(0, 40, (columns, 2)) * 64).astype(np.int32)
    codes = np.empty((columns, 2), np.uint8)
    trellis_numba.viterbi(x, tables.slopes, tables.bases, codes)
    shorter = np.empty((trellis_numba.SPAN, 2), np.uint8)
    trellis_numba.viterbi(x[: trellis_numba.SPAN], tables.slopes, tables.bases, shorter)
    # Far from the end, decisions do not depend on it.
    assert np.array_equal(codes[: trellis_numba.SPAN - 200], shorter[:-200])
    levels = tables.levels[(np.concatenate([np.zeros((1, 2), np.int64), codes[:-1]]) << 4) | codes]
    assert 10 * np.log10((x.astype(float) ** 2).sum() / ((levels * 64.0 - x) ** 2).sum()) > 20


@pytest.mark.parametrize("k", [3, 4, 5, 6])
@pytest.mark.parametrize(
    ("columns", "plan"), [(96, Plan(0, block=32)), (77, Plan(2, threshold=2.5)), (1, Plan(1)), (3, Plan(2))]
)
@pytest.mark.parametrize("factor", [1.0, 1e-44, 1e30])
def test_torch_gives_the_same(k: int, columns: int, plan: Plan, factor: float) -> None:
    weight = (sample(7, columns, law="t5").double() * factor).float()
    weight[3] = 0
    weight[5] *= 1e-6
    encoded = orbit.encode_planned(weight, k, plan, columns=columns)
    matrix = Matrix.of(weight, columns)
    expected = encode_rows(matrix, k, plan)
    codes, scales, apart = orbit_torch.encode_rows(weight * float(matrix.scale), k, plan)
    packed = np.zeros_like(expected.codes)
    trellis_numba.pack(np.ascontiguousarray(codes.numpy().T), k, 0, packed)
    assert np.array_equal(packed, expected.codes)
    assert np.array_equal(scales.numpy(), expected.scales)
    assert apart.flatten().nonzero().flatten().tolist() == encoded.outliers.positions.tolist()
    assert torch.equal(orbit_torch.levels(encoded.codes, k, plan.law, columns), orbit.codes_to_levels(encoded))


# --- quality and size ---


@pytest.mark.parametrize("law", ["gauss", "laplace", "t5"])
@pytest.mark.parametrize("columns", [768, 3072])
def test_four_bits_reach_their_quality(law: str, columns: int) -> None:
    weight = sample(128, columns, law=law, seed=1)
    encoded = orbit.encode(weight, 4, columns=columns)
    assert decibels(weight, orbit.decode(encoded)) >= 22.4
    assert 8 * encoded.nbytes / weight.numel() <= 4.15


@pytest.mark.parametrize(("k", "least"), [(3, 16.1), (5, 28.6), (6, 34.6)])
@pytest.mark.parametrize("law", ["gauss", "laplace", "t5"])
def test_other_bits_reach_their_quality(k: int, least: float, law: str) -> None:
    weight = sample(64, 768, law=law, seed=2)
    encoded = orbit.encode(weight, k, columns=768)
    assert decibels(weight, orbit.decode(encoded)) >= least
    assert 8 * encoded.nbytes / weight.numel() <= k + 0.15


def test_outliers_cost_little() -> None:
    weight = sample(256, 1024, seed=3)
    plain = orbit.encode(weight, 4, columns=1024, law=0, outliers=0, rotate=False)
    apart = orbit.encode(weight, 4, columns=1024, law=0, rotate=False)
    share = apart.outliers.positions.numel() / weight.numel()
    assert 0.0025 < share < 0.0035
    assert 8 * (apart.nbytes - plain.nbytes) / weight.numel() <= 0.11
    assert plain.outliers.positions.numel() == 0


def test_the_choice_follows_the_measured_error() -> None:
    spiky = sample(64, 256)
    spiky[:, 5] *= 400
    assert orbit.encode(spiky, 4, columns=256).outliers.positions.numel() > 0
    heavy = sample(64, 256, law="laplace")
    assert orbit.encode(heavy, 4, columns=256).block == 128
    assert orbit.encode(heavy, 4, columns=256, rotate=False).block == 1
    assert orbit.encode(sample(64, 254, law="t5"), 4, columns=254, rotate=True).block == 1
    assert orbit.encode(heavy, 4, columns=256, law=2).law == 2


@pytest.mark.parametrize("rotate", [None, True, False])
@pytest.mark.parametrize(("rows", "columns"), [(40, 96), (900, 800), (3, 5000)])
def test_the_estimate_is_near(rotate: bool | None, rows: int, columns: int) -> None:
    weight = sample(rows, columns, law="t5", seed=4)
    guess = orbit.estimate(weight, 4, columns=columns, rotate=rotate)
    encoded = orbit.encode(weight, 4, columns=columns, rotate=rotate)
    error = float(((weight - orbit.decode(encoded)).double() ** 2).sum())
    assert guess.bits == pytest.approx(8 * encoded.nbytes, rel=0.005)
    assert guess.squared_error == pytest.approx(error, rel=0.05)


# --- shapes and values of every kind ---


@pytest.mark.parametrize("k", [3, 4, 5, 6])
@pytest.mark.parametrize("columns", [1, 2, 3, 4, 7, 9, 17, 33, 130])
@pytest.mark.parametrize("rows", [1, 2, 65])
def test_every_shape_round_trips(k: int, columns: int, rows: int) -> None:
    weight = sample(rows, columns, seed=columns)
    encoded = orbit.encode(weight, k, columns=columns)
    assert_same(parsed(encoded), encoded)
    assert encoded.stream().numel() == encoded.nbytes
    decoded = orbit.decode(encoded)
    assert decoded.shape == weight.shape
    assert decibels(weight, decoded) > {3: 9, 4: 14, 5: 19, 6: 24}[k]


def test_one_very_long_row() -> None:
    weight = sample(1, 1_000_003)
    encoded = orbit.encode(weight.view(-1), 4, columns=1_000_003)
    assert encoded.shape == (1_000_003,)
    assert decibels(weight.view(-1), orbit.decode(encoded)) > 22.4


def test_a_convolution_is_coded_by_its_matrix() -> None:
    weight = sample(32, 16 * 9).view(32, 16, 3, 3)
    encoded = orbit.encode(weight, 4, columns=16 * 9)
    assert (encoded.rows, encoded.block) in ((32, 16), (32, 1))
    assert orbit.decode(encoded).shape == weight.shape


@pytest.mark.parametrize("rotate", [None, True, False])
def test_rows_of_zeros_and_constants(rotate: bool | None) -> None:
    weight = sample(6, 64)
    weight[1] = 0
    weight[2] = 0.5
    weight[3] = -0.25
    encoded = orbit.encode(weight, 5, columns=64, rotate=rotate)
    decoded = orbit.decode(encoded)
    assert not decoded[1].any()
    assert not encoded.codes[1].any()
    assert decibels(weight, decoded) > 25
    zeros = orbit.encode(torch.zeros(3, 8), 4, columns=8, rotate=rotate)
    assert not orbit.decode(parsed(zeros)).any()


@pytest.mark.parametrize("factor", [1e-43, 1e-40, 1e-38, 1e-20, 1e20, 3e38])
@pytest.mark.parametrize("rotate", [True, False])
def test_the_extremes_of_fp32(factor: float, rotate: bool) -> None:
    weight = (sample(16, 64).double() / sample(16, 64).abs().max() * factor).to(torch.float32)
    decoded = orbit.decode(parsed(orbit.encode(weight, 4, columns=64, rotate=rotate)))
    assert bool(decoded.isfinite().all())
    # Below fp32's normal numbers the weights are integers of a few digits themselves.
    assert decibels(weight, decoded) > (20 if factor > 1e-42 else 12)


@pytest.mark.parametrize("huge", [1e3, 1e10, 1e30, 3.4e38, -3.4e38])
def test_a_huge_outlier_survives_and_spoils_nothing(huge: float) -> None:
    weight = sample(4, 500)
    weight[2, 77] = huge
    encoded = orbit.encode(weight, 4, columns=500)
    decoded = orbit.decode(parsed(encoded))
    assert decoded[2, 77].item() == pytest.approx(huge, rel=1e-3)
    rest = torch.ones(4, 500, dtype=torch.bool)
    rest[2, 77] = False
    assert decibels(weight[rest], decoded[rest]) > 22


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_sources(dtype: torch.dtype) -> None:
    weight = sample(20, 60).to(dtype)
    encoded = orbit.encode(weight, 5, columns=60)
    decoded = orbit.decode(encoded)
    assert decoded.dtype == dtype
    assert decibels(weight, decoded) > 27
    assert torch.equal(encoded.codes, orbit.encode(weight.float(), 5, columns=60).codes)


def test_decoding_never_overflows_a_half() -> None:
    weight = torch.full((4, 64), 65504.0).to(torch.float16)
    weight[:, ::2] *= -1
    decoded = orbit.decode(orbit.encode(weight, 3, columns=64))
    assert bool(decoded.isfinite().all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight = sample(4, 8)
    weight[1, 1] = value
    for call in (orbit.encode, orbit.estimate):
        with pytest.raises(ValueError, match="NaN or infinity"):
            call(weight, 4, columns=8)


@pytest.mark.parametrize(
    "arguments",
    [
        {"k": 2},
        {"k": 7},
        {"columns": 0},
        {"columns": 5},
        {"law": 3},
        {"law": -1},
        {"outliers": 1.0},
        {"outliers": -0.1},
    ],
)
def test_options_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|do not divide"):
        orbit.encode(sample(4, 8), **({"k": 4, "columns": 8} | arguments))


def test_integers_and_empty_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="floating"):
        orbit.encode(torch.zeros(4, dtype=torch.int64), 4, columns=4)
    with pytest.raises(ValueError, match="do not divide"):
        orbit.encode(torch.zeros(0, 4), 4, columns=4)


# --- levels, rotation ---


@pytest.mark.parametrize("k", [3, 4, 5, 6])
@pytest.mark.parametrize("columns", [1, 8, 33])
def test_levels_are_the_tables(k: int, columns: int) -> None:
    encoded = orbit.encode(sample(5, columns), k, columns=columns, law=2, rotate=False)
    levels = orbit.codes_to_levels(encoded, threads=2)
    for row in range(5):
        symbols = orbit_naive._unpack(encoded.codes[row].numpy(), k, columns)
        assert levels[row].tolist() == orbit_naive._levels(symbols, k, 2)


def test_the_rotation_is_orthonormal_and_undone() -> None:
    x = sample(7, 96)
    turned = hadamard.rotate(x, 32, 9)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    torch.testing.assert_close(hadamard.unrotate(turned, 32, 9), x)
    torch.testing.assert_close(turned @ turned.T, x @ x.T)
    assert hadamard.rotate(x, 1, 9) is x
    with pytest.raises(ValueError, match="divides the row"):
        hadamard.rotate(x, 64, 9)
    lanes = np.ascontiguousarray(x.numpy().T)
    trellis_numba.rotate(lanes, hadamard.signs(96, 9), 32, hadamard.norm(32))
    assert np.array_equal(lanes.T, turned.numpy())


def test_blocks_and_signs_are_the_stated_ones() -> None:
    assert [hadamard.block_size(columns) for columns in (1, 2, 4, 96, 112, 144, 1280, 9, 130)] == [
        1, 1, 4, 32, 16, 16, 128, 1, 1,
    ]  # fmt: skip
    # The published first outputs of SplitMix64 from seed 1234567.
    assert [hadamard.splitmix64(1234567, index) for index in range(2)] == [6457827717110365317, 3203168211198807973]
    signs = hadamard.signs(70, 1234567)
    assert signs[3] == 1 - 2 * (6457827717110365317 >> 3 & 1)
    assert signs[65] == 1 - 2 * (3203168211198807973 >> 1 & 1)


# --- golden vectors ---


def test_golden_vectors() -> None:
    golden = json.loads(GOLDEN.read_text())
    for law in range(len(LAWS)):
        for k in (3, 4, 5, 6):
            digest = hashlib.sha256(table(k, law).levels.tobytes()).hexdigest()
            assert golden["tables"][f"{k} {LAWS[law]}"] == digest
    for case in golden["cases"]:
        dtype = getattr(torch, case["dtype"])
        stream = torch.frombuffer(bytearray(base64.b64decode(case["stream"])), dtype=torch.uint8)
        encoded = OrbitTensor.parse(tuple(case["shape"]), dtype, case["constants"], stream)
        assert orbit.codes_to_levels(encoded).tolist() == case["levels"]
        decoded = torch.tensor([float.fromhex(value) for value in case["decoded"]]).view(case["shape"]).to(dtype)
        assert torch.equal(orbit.decode(encoded), decoded)
        weight = torch.tensor([float.fromhex(value) for value in case["weight"]]).view(case["shape"]).to(dtype)
        plan = Plan(encoded.law, encoded.block, encoded.seed, case["threshold"] or math.inf)
        again = orbit.encode_planned(weight, encoded.k, plan, columns=encoded.columns)
        assert_same(again, encoded)


# --- damaged streams ---


def _with_outliers() -> OrbitTensor:
    weight = sample(8, 700, law="t5")
    weight[0, 0] = 3.0
    return orbit.encode(weight, 4, columns=700, rotate=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("columns", 0), ("columns", -700), ("columns", 701), ("columns", 1 << 62), ("columns", True), ("columns", 7.0),
        ("k", 2), ("k", 7), ("k", "4"), ("k", 5), ("k", 1 << 40), ("law", 3), ("law", -1),
        ("block", 2), ("block", 256), ("block", 0),
        ("block", 12), ("block", 4), ("seed", -1), ("seed", 1 << 64), ("exponent", 100000), ("exponent", None),
        ("outliers", 5), ("outliers", None), ("outliers", []),
    ],
)  # fmt: skip
def test_hostile_constants(name: str, value: Any) -> None:
    encoded = _with_outliers()
    with pytest.raises(ValueError, match=r"."):
        OrbitTensor.parse(encoded.shape, encoded.dtype, encoded.constants() | {name: value}, encoded.stream())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 0), ("count", -1), ("count", 1 << 60), ("count", True), ("count", 1), ("exponent", 1 << 20),
        ("exponent", 0.5), ("wide", True), ("wide", 1), ("wide", None),
    ],
)  # fmt: skip
def test_hostile_outliers(name: str, value: Any) -> None:
    encoded = _with_outliers()
    constants = encoded.constants()
    constants["outliers"] = constants["outliers"] | {name: value}
    with pytest.raises(ValueError, match=r"."):
        OrbitTensor.parse(encoded.shape, encoded.dtype, constants, encoded.stream())


def test_streams_of_other_lengths() -> None:
    for encoded in (_with_outliers(), orbit.encode(sample(8, 700), 4, columns=700, rotate=True)):
        stream = encoded.stream()
        for damaged in (stream[:0], stream[:9], stream[:-1], torch.cat([stream, stream[:1]])):
            with pytest.raises(ValueError, match=r"."):
                OrbitTensor.parse(encoded.shape, encoded.dtype, encoded.constants(), damaged)


def test_damaged_bytes_are_refused_or_decode_within_bounds() -> None:
    encoded = _with_outliers()
    stream = encoded.stream()
    rng = np.random.default_rng(0)
    for place in [*range(16), *rng.integers(0, len(stream), 300).tolist(), *range(len(stream) - 120, len(stream))]:
        damaged = stream.clone()
        damaged[place] ^= int(rng.integers(1, 256))
        try:
            other = OrbitTensor.parse(encoded.shape, encoded.dtype, encoded.constants(), damaged)
        except ValueError:
            continue
        assert bool(orbit.decode(other).isfinite().all())


def test_what_a_stream_may_not_hold() -> None:
    encoded = orbit.encode(sample(4, 9), 4, columns=9)
    for scale in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scales"):
            replace(encoded, scales=torch.full((4,), scale, dtype=torch.float16))
    with pytest.raises(ValueError, match="unused bits"):
        replace(encoded, codes=encoded.codes | 1)
    positions = torch.tensor([35, 36])
    with pytest.raises(ValueError, match="beyond"):
        replace(encoded, outliers=orbit.Outliers(positions, torch.ones(2, dtype=torch.float16), 0))
    with pytest.raises(ValueError, match="ascend"):
        orbit.Outliers(positions.flip(0), torch.ones(2, dtype=torch.float16), 0)
    rotated = orbit.encode(sample(4, 8), 4, columns=8, rotate=True)
    with pytest.raises(ValueError, match="rotated"):
        replace(rotated, outliers=orbit.Outliers(positions - 20, torch.ones(2, dtype=torch.float16), 0))


def test_gaps_are_undone() -> None:
    rng = np.random.default_rng(1)
    for scale in (1, 100, 254, 255, 256, 10_000):
        positions = np.cumsum(rng.integers(1, scale + 1, 200)) - 1
        positions = np.concatenate([positions, positions[-1] + np.array([255, 255 + 256, 255 + 256 + 510])])
        outliers = orbit.Outliers(torch.from_numpy(positions), torch.ones(203, dtype=torch.float16), 0)
        gaps = outliers.gaps()
        assert torch.equal(orbit.Outliers.positions_of(gaps, 203, int(positions[-1]) + 1), outliers.positions)
        with pytest.raises(ValueError, match="beyond"):
            orbit.Outliers.positions_of(gaps, 203, int(positions[-1]))
