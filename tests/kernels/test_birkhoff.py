"""The published codec: the fast version against the one that compares with every node, and both against the
description, written out in plain Python."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.codec import birkhoff, geometry, naive
from kernels.codec.nearest import NodeFinder
from kernels.codec.packing import pack
from kernels.codec.types import BirkhoffConfig, BirkhoffTensor, Encoded, RawTensor
from kernels.errors import ArtifactCorrupt

PUBLISHED = BirkhoffConfig()
ANYTHING = BirkhoffConfig(raw_above=1e38)


def both(weight: Tensor, config: BirkhoffConfig, *, by_row: bool) -> Encoded:
    """Encode and decode by both, and expect the same of both."""
    fast = birkhoff.encode(weight, config, by_row=by_row)
    slow = naive.encode(weight, config, by_row=by_row)
    if isinstance(fast, RawTensor):
        assert isinstance(slow, RawTensor)
        assert fast.tensor.data_ptr() == weight.data_ptr()
        return fast
    assert isinstance(slow, BirkhoffTensor)
    for name in ("shape", "dtype", "by_row", "centre", "radius", "side", "nodes", "classes", "bits"):
        assert getattr(fast, name) == getattr(slow, name), name
    assert torch.equal(fast.indices, slow.indices)
    assert fast.mean_error == pytest.approx(slow.mean_error, rel=1e-12, abs=1e-300)
    decoded = birkhoff.decode(fast)
    assert decoded.shape == weight.shape
    assert decoded.dtype == weight.dtype
    assert torch.equal(decoded, naive.decode(slow))
    return fast


@pytest.mark.parametrize("config", [PUBLISHED, ANYTHING], ids=["published", "never raw"])
@pytest.mark.parametrize("spread", [0.003, 0.02, 0.05, 0.1, 0.5])
@pytest.mark.parametrize(("shape", "by_row"), [((60, 64), True), ((31, 33), True), ((5, 3, 3, 7), False)])
def test_equals_the_comparison_with_every_node(
    config: BirkhoffConfig, spread: float, shape: tuple[int, ...], by_row: bool
) -> None:
    both(torch.randn(shape) * spread, config, by_row=by_row)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(20, 30),
        torch.full((20, 30), 0.37),
        torch.full((12, 1), 1e7),
        torch.randn(40, 1) * 0.02,
        torch.randn(30, 40) * 0.01 + 1,
        torch.randn(30, 40) * 0.01 + 1000,
        torch.randn(30, 40) * 0.01 + 1e5,
        torch.randn(30, 40) * 1e30,
        torch.randn(30, 40) * 1e-30,
        torch.cat((torch.zeros(29, 40), torch.ones(1, 40))),
        torch.randint(-3, 4, (30, 40)) * 0.05 / 3,
        (torch.randn(30, 41) * 0.03).half(),
        (torch.randn(30, 41) * 0.03).bfloat16(),
        (torch.randn(30, 41) * 0.03).double(),
        (torch.randn(41, 30) * 0.03).t(),
    ],
    ids=[
        "zeros",
        "constant",
        "column-far",
        "column",
        "far1",
        "far1000",
        "far1e5",
        "huge",
        "tiny",
        "sparse",
        "lattice",
        "fp16",
        "bf16",
        "fp64",
        "strided",
    ],
)
@pytest.mark.parametrize("config", [PUBLISHED, ANYTHING, BirkhoffConfig(nodes=(4, 64, 81), raw_above=1e38)])
def test_unusual_tensors(weight: Tensor, config: BirkhoffConfig) -> None:
    both(weight, config, by_row=True)
    both(weight, config, by_row=False)


def squares(side: float, s: int) -> list[Tensor]:
    """Points that decide narrowly: on the ideal nodes, halfway between them, on edges and corners."""
    steps = torch.arange(0, 2 * s + 1, dtype=torch.float64) / (2 * s)
    lattice = torch.cartesian_prod(steps, steps)
    sheared = torch.stack((lattice[:, 0] + lattice[:, 1] / s, lattice[:, 1]), dim=1).clamp(0, 1)
    edge = torch.rand(400, dtype=torch.float64)
    zero, one = torch.zeros_like(edge), torch.ones_like(edge)
    edges = [torch.stack(pair, dim=1) for pair in ((zero, edge), (one, edge), (edge, zero), (edge, one))]
    return [(place - 0.5) * side for place in (lattice, sheared, *edges, torch.rand(4000, 2, dtype=torch.float64))]


@pytest.mark.parametrize("centre", [(0.0, 0.0), (2.0**-20, -(2.0**-21)), (0.011, -0.02), (1.0, -3.0), (900.0, 2.0)])
@pytest.mark.parametrize(("s", "side"), [(35, 0.1), (40, 0.1), (8, 0.1), (9, 1.0), (40, 7.0), (3, 0.1)])
def test_nearest_node_on_edges_corners_and_ties(centre: tuple[float, float], s: int, side: float) -> None:
    middle = torch.tensor(centre, dtype=torch.float32).double()
    where = (float(middle[0]), float(middle[1]))
    table = geometry.nodes(where, side, s * s)
    find = NodeFinder(where, side, table)
    square = geometry.Square(where, side)
    low, high = torch.tensor(square.low), torch.tensor(square.high)
    for place in squares(side, s):
        points = (place + middle).float().clamp(low, high)
        assert torch.equal(find(points).long(), naive.nearest(points, table))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    spread=st.floats(1e-4, 10),
    shift=st.floats(-10, 10),
    side=st.floats(1e-3, 10),
    s=st.integers(2, 40),
    rows=st.integers(2, 12),
    columns=st.integers(5, 40),
)
def test_any_tensor(seed: int, spread: float, shift: float, side: float, s: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * spread + shift
    both(weight, BirkhoffConfig(side=side, nodes=(s * s,), raw_above=1e30), by_row=True)


def test_the_description_in_plain_python() -> None:
    """Items 1 to 6 for one small tensor, with Python's floats and no code of the codec."""
    weight = (torch.randn(7, 9) * 0.05).float()
    rows = weight.double().tolist()
    padding = float(np.float32(np.mean([row[i] for row in rows for i in (1, 3, 5, 7)])))
    points = [pair for row in rows for pair in zip(row[0::2], [*row[1::2], padding], strict=True)]
    centre = tuple(float(np.float32(np.mean([point[axis] for point in points]))) for axis in (0, 1))
    half, s, count, classes = 0.05, 35, 1225, 2
    nodes = [
        tuple(
            float(np.float32(c - half + 0.1 * part))
            for c, part in zip(centre, (theta / count, (theta % s) / s), strict=True)
        )
        for theta in range(count)
    ]
    radius = max(math.dist(point, centre) for point in points)
    radii = [half, half + (radius - half) / 2, radius]
    expected, total = [], 0.0
    for point in points:
        number = 0
        place: tuple[float, ...] = point
        if max(abs(p - c) for p, c in zip(point, centre, strict=True)) > half:
            number = 1 if math.dist(point, centre) <= radii[1] else 2
            place = tuple(
                float(np.float32(c + (p - c) * half / radii[number])) for p, c in zip(point, centre, strict=True)
            )
        theta = min(range(count), key=lambda t: (math.dist(place, nodes[t]), t))
        decoded = [c + (n - c) * radii[number] / half for c, n in zip(centre, nodes[theta], strict=True)]
        total += sum(abs(d - p) for d, p in zip(decoded, point, strict=True))
        expected.append(number * count + theta)

    plane = geometry.points(weight, by_row=True)
    assert geometry.centre(plane) == centre
    config = BirkhoffConfig(nodes=(count,), max_classes=classes, target_error=1e-9)
    encoded = birkhoff.encode(weight, config, by_row=True)
    assert isinstance(encoded, BirkhoffTensor)
    assert encoded.classes == classes
    assert birkhoff.unpack_indices(encoded).view(-1).tolist() == expected
    assert encoded.mean_error == pytest.approx(total / (2 * len(points)), rel=1e-5)
    assert encoded.bits == max(expected).bit_length()


def test_search_order() -> None:
    """U outside, K inside; the first that meets the target, else the last U with its best K."""
    weight = torch.randn(50, 60) * 0.04
    plain: dict[str, Any] = {"raw_above": 1.0}
    errors = {}
    for nodes in (1225, 1600):
        for k in (1, 2, 3):
            alone = birkhoff.encode(
                weight, BirkhoffConfig(nodes=(nodes,), max_classes=k, target_error=1e-9, **plain), by_row=True
            )
            assert isinstance(alone, BirkhoffTensor)
            errors[nodes, k] = alone.mean_error
    target = errors[1225, 1] * 1.001
    first = birkhoff.encode(weight, BirkhoffConfig(target_error=target, **plain), by_row=True)
    assert isinstance(first, BirkhoffTensor)
    assert (first.nodes, first.classes) == (1225, 1)
    none = birkhoff.encode(weight, BirkhoffConfig(target_error=1e-9, **plain), by_row=True)
    assert isinstance(none, BirkhoffTensor)
    assert none.nodes == 1600
    assert none.mean_error == errors[1600, 3]


def test_padding() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 6.0, 8.0]])
    assert geometry.points(weight, by_row=True).tolist() == [[1, 2], [3, 4], [4, 6], [8, 4]]
    assert geometry.points(weight[:, :1], by_row=True).tolist() == [[1, 2.5], [4, 2.5]]
    assert geometry.points(torch.tensor([1.0, 2.0, 3.0]), by_row=False).tolist() == [[1, 2], [3, 2]]


@pytest.mark.parametrize(
    "weight",
    [
        torch.arange(20),
        torch.ones(20, dtype=torch.bool),
        torch.ones(9),
        torch.tensor(1.0),
        torch.empty(0, 5),
        torch.tensor([math.nan] + [0.0] * 19),
        torch.tensor([math.inf] + [0.0] * 19),
        torch.tensor([1e300] + [0.0] * 19, dtype=torch.float64),
        torch.randn(20, 20),
    ],
    ids=["int", "bool", "few", "scalar", "empty", "nan", "inf", "over-fp32", "coarse"],
)
def test_stored_as_it_is(weight: Tensor) -> None:
    encoded = both(weight, PUBLISHED, by_row=False)
    assert isinstance(encoded, RawTensor)
    decoded = birkhoff.decode(encoded)
    assert torch.equal(decoded.view(-1).view(torch.uint8), weight.reshape(-1).view(torch.uint8)) or not weight.numel()
    assert isinstance(birkhoff.encode(torch.zeros(99), PUBLISHED, by_row=False, keep_raw=True), RawTensor)


def test_half_precision_that_would_overflow_is_stored_as_it_is() -> None:
    weight = (torch.rand(40, 40) * 2 - 1).mul(65504).half()
    encoded = both(weight, BirkhoffConfig(nodes=(4,), raw_above=1e30), by_row=True)
    assert isinstance(encoded, RawTensor) or birkhoff.decode(encoded).isfinite().all()


def test_decode_is_a_gather_from_the_table() -> None:
    weight = torch.randn(40, 31) * 0.06
    encoded = both(weight, PUBLISHED, by_row=True)
    assert isinstance(encoded, BirkhoffTensor)
    table = birkhoff.pair_table(encoded)
    assert table.shape == (encoded.table_size, 2)
    gathered = table[birkhoff.unpack_indices(encoded).long()].view(40, -1)[:, :31]
    assert torch.equal(gathered, birkhoff.decode(encoded))
    assert torch.equal(birkhoff.decode(encoded, dtype=torch.bfloat16), gathered.bfloat16())


def test_the_same_whatever_the_number_of_threads() -> None:
    weight = torch.randn(700, 300) * 0.04
    many = birkhoff.encode(weight, PUBLISHED, by_row=True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = birkhoff.encode(weight, PUBLISHED, by_row=True)
    finally:
        torch.set_num_threads(before)
    assert isinstance(many, BirkhoffTensor)
    assert isinstance(one, BirkhoffTensor)
    assert (many.mean_error, many.radius, many.centre) == (one.mean_error, one.radius, one.centre)
    assert torch.equal(many.indices, one.indices)


def test_an_index_that_names_no_pair() -> None:
    stream = pack(torch.full((10,), 1300), 11)
    bad = BirkhoffTensor((20,), torch.float32, False, (0.0, 0.0), 0.0, 0.1, 1225, 0, 11, stream, 0.0)
    with pytest.raises(ArtifactCorrupt, match="index 1300"):
        birkhoff.decode(bad)


@pytest.mark.parametrize(
    "options",
    [
        {"side": 0.0}, {"side": math.nan}, {"target_error": -1.0}, {"raw_above": math.inf}, {"nodes": ()},
        {"nodes": (1226,)}, {"nodes": (0,)}, {"max_classes": 0}, {"max_classes": 99}, {"min_elements": 0},
        {"side": "wide"}, {"max_classes": 1.5},
    ],
)  # fmt: skip
def test_options_outside_their_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        BirkhoffConfig(**options)


def test_by_row_needs_a_matrix() -> None:
    with pytest.raises(ValueError, match="matrix"):
        birkhoff.encode(torch.zeros(2, 3, 4), PUBLISHED, by_row=True)
