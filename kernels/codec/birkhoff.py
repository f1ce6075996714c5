"""The published codec, fast: closed-form nearest nodes, in pieces that stay in the cache, on CPU or GPU.

The same signatures and the same results as ``naive``: equal indices, ties included. What is the same for all
class counts K (everything inside the square) is done once a node count U.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.codec import geometry
from kernels.codec.nearest import NodeFinder, chunks
from kernels.codec.packing import pack, unpack
from kernels.codec.types import CODED_DTYPES, BirkhoffConfig, BirkhoffTensor, RawTensor
from kernels.errors import ArtifactCorrupt


@dataclass(frozen=True)
class _Plane:
    """The points of a tensor, and those outside the square with what is needed to draw them in.

    ``points``: fp32 (n, 2). ``outside``: for each chunk the positions outside, from the chunk's start, int64.
    ``offsets``: p − c of all points outside, float64 (m, 2). ``distance``: its length, float64 (m,).
    ``radius``: R over all points.
    """

    points: Tensor
    centre: tuple[float, float]
    outside: tuple[Tensor, ...]
    offsets: Tensor
    distance: Tensor
    radius: float

    @classmethod
    def of(cls, points: Tensor, side: float) -> _Plane:
        centre = geometry.centre(points)
        square = geometry.Square(centre, side)
        radius = 0.0
        positions = []
        for part in chunks(points.shape[0], points.device, columns=2):
            x, y = (axis.contiguous() for axis in points[part].unbind(1))
            radius = max(radius, _largest_distance(x, y, centre))
            positions.append(square.outside(x, y).nonzero().squeeze(1))
        plane = cls(points, centre, tuple(positions), points.new_empty(0), points.new_empty(0), radius)
        c = torch.tensor(centre, dtype=torch.float64, device=points.device)
        offsets = points[plane.positions()].to(torch.float64) - c
        return replace(plane, offsets=offsets, distance=geometry.distances(offsets[:, 0], offsets[:, 1]))

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """The chunks, and the positions outside in each."""
        return zip(chunks(self.points.shape[0], self.points.device, columns=2), self.outside, strict=True)

    def positions(self) -> Tensor:
        """The positions outside from the first point, int64 (m,)."""
        return torch.cat([local + part.start for part, local in self.chunks()])


def _largest_distance(x: Tensor, y: Tensor, centre: tuple[float, float]) -> float:
    """Largest distance from the centre, exact in float64, taken for those alone that fp32 finds the farthest."""
    dx, dy = x - centre[0], y - centre[1]
    squared = dx.mul_(dx).add_(dy.mul_(dy))
    # Overflow to infinity and underflow to zero only let more points through.
    far = (squared >= squared.max() * (1 - 2.0**-20)).nonzero().squeeze(1)
    fx, fy = x[far].to(torch.float64) - centre[0], y[far].to(torch.float64) - centre[1]
    return float(geometry.distances(fx, fy).max())


def _gather(table: Tensor, index: Tensor, out: Tensor) -> None:
    """``out`` (n, 2) = the rows of ``table`` that ``index`` names; both fp32. A row moves as one int64."""
    torch.index_select(table.view(torch.int64).view(-1), 0, index, out=out.view(torch.int64).view(-1))


def _absolute_error(table: Tensor, index: Tensor, points: Tensor) -> Tensor:
    """|p̂ − p| of both coordinates, fp32 (n, 2)."""
    decoded = torch.empty_like(points)
    _gather(table, index, decoded)
    return decoded.sub_(points).abs_()


class _Search:
    """One node count U: the nodes of the points inside, found once, and the search for K over those outside."""

    def __init__(self, plane: _Plane, config: BirkhoffConfig, nodes: int) -> None:
        self._plane, self._config, self._nodes = plane, config, nodes
        table = geometry.nodes(plane.centre, config.side, nodes).to(plane.points.device)
        self._find = NodeFinder(plane.centre, config.side, table)
        self._inside = self._find(plane.points)
        self._inside_error = 0.0
        for part, outside in plane.chunks():
            error = _absolute_error(table, self._inside[part], plane.points[part])
            if outside.numel():
                error.index_fill_(0, outside, 0)
            self._inside_error += geometry.stable_sum(error)

    def run(self) -> _Found:
        """The first K that meets the target, else the best, the later on ties."""
        plane, config = self._plane, self._config
        size = plane.points.numel()
        if not plane.distance.numel():
            table = geometry.pair_table(plane.centre, config.side, plane.radius, self._nodes, 0)
            return _Found(self._inside_error / size, self._nodes, 0, self._inside, table)
        positions = plane.positions()
        points = plane.points[positions]
        best: _Found | None = None
        for classes in range(1, config.max_classes + 1):
            table = geometry.pair_table(plane.centre, config.side, plane.radius, self._nodes, classes)
            index, absolute = self._outside(points, table.to(points.device), classes)
            error = (self._inside_error + absolute) / size
            if best is None or error <= best.error:
                best = _Found(error, self._nodes, classes, index, table)
            if error <= config.target_error:
                break
        assert best is not None
        index = self._inside
        index[positions] = best.index
        return replace(best, index=index)

    def _outside(self, points: Tensor, table: Tensor, classes: int) -> tuple[Tensor, float]:
        """Index (int32) of the points outside with K ``classes``, and the sum of their absolute errors."""
        plane = self._plane
        radii = geometry.class_radii(self._config.side, plane.radius, classes)
        drawn = torch.empty_like(points)
        number = torch.empty(points.shape[0], dtype=torch.int32, device=points.device)
        for part in chunks(points.shape[0], points.device, columns=2):
            number[part], drawn[part] = geometry.draw_in(plane.offsets[part], plane.distance[part], plane.centre, radii)
        index = self._find(drawn).add_(number, alpha=self._nodes)
        absolute = 0.0
        for part in chunks(points.shape[0], points.device, columns=2):
            absolute += geometry.stable_sum(_absolute_error(table, index[part], points[part]))
        return index, absolute


@dataclass(frozen=True)
class _Found:
    """The outcome of a search: mean error, U, K, index (int32) and the table of pairs (on the CPU)."""

    error: float
    nodes: int
    classes: int
    index: Tensor
    table: Tensor


def encode(
    weight: Tensor, config: BirkhoffConfig, *, by_row: bool, keep_raw: bool = False
) -> BirkhoffTensor | RawTensor:
    """Encode a tensor of any shape, on its own device.

    ``by_row``: ``weight`` is a matrix whose points are neighbours along its rows, as a linear layer needs;
    else the flattened tensor is read. ``keep_raw``: store it as it is (buffers). float64 is read as fp32.
    Stored as it is, besides: other dtypes than floating ones, fewer elements than ``config.min_elements``,
    NaN or infinity (as fp32 or in what would be decoded), and a mean error over ``config.raw_above``.

    The indices are on the CPU. Raises ValueError when ``by_row`` meets a tensor that is coded but no matrix.
    """
    weight = weight.detach()
    if keep_raw or weight.dtype not in CODED_DTYPES or weight.numel() < config.min_elements:
        return RawTensor(weight)
    points = geometry.points(weight, by_row=by_row)
    if not _finite(points):
        return RawTensor(weight)
    plane = _Plane.of(points, config.side)
    for nodes in config.nodes:
        found = _Search(plane, config, nodes).run()
        if found.error <= config.target_error:
            break
    if not found.error <= config.raw_above:
        return RawTensor(weight)
    if not geometry.representable(found.table, found.index, weight.dtype):
        return RawTensor(weight)
    bits = int(found.index.max()).bit_length()
    return BirkhoffTensor(
        shape=tuple(weight.shape), dtype=weight.dtype, by_row=by_row, centre=plane.centre, radius=plane.radius,
        side=config.side, nodes=found.nodes, classes=found.classes, bits=bits,
        indices=pack(found.index, bits).cpu(), mean_error=found.error,
    )  # fmt: skip


def _finite(points: Tensor) -> bool:
    low, high = points.aminmax()
    return bool(low.isfinite()) and bool(high.isfinite())


def pair_table(encoded: BirkhoffTensor) -> Tensor:
    """The pair of weights of every index: fp32 ((K + 1)·U, 2), on the CPU. Decoding is one gather from it."""
    e = encoded
    return geometry.pair_table(e.centre, e.side, e.radius, e.nodes, e.classes)


def unpack_indices(encoded: BirkhoffTensor, device: torch.device | str | None = None) -> Tensor:
    """The indices: int16 (rows, points per row), on ``device`` (default: the stream's).

    Raises ArtifactCorrupt for an index that names no pair, so that none reaches a kernel.
    """
    stream = encoded.indices if device is None else encoded.indices.to(device)
    index = unpack(stream, encoded.bits, encoded.count)
    highest = int(index.max())
    if highest >= encoded.table_size:
        raise ArtifactCorrupt(f"index {highest} occurs, but there are only {encoded.table_size} pairs")
    # Table sizes are at most 2^15, so every index that passed fits.
    return index.to(torch.int16).view(encoded.rows, encoded.points_per_row)


def decode(
    encoded: BirkhoffTensor | RawTensor, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """The dense tensor, in the source's shape, dtype (unless ``dtype`` is given) and on ``device``.

    The pairs are fp32 and are then cast. A raw tensor comes back as a copy. Raises ArtifactCorrupt for an
    index that names no pair.
    """
    if isinstance(encoded, RawTensor):
        return encoded.tensor.to(device=device, dtype=dtype, copy=True)
    index = unpack_indices(encoded, device)
    table = pair_table(encoded).to(index.device)
    target = dtype or encoded.dtype
    rows, columns = encoded.rows, encoded.columns
    values = torch.empty((*index.shape, 2), dtype=torch.float32, device=index.device)
    flat_index, flat_values = index.view(-1), values.view(-1, 2)
    for part in chunks(flat_index.numel(), index.device):
        _gather(table, flat_index[part].to(torch.int32), flat_values[part])
    return values.view(rows, -1)[:, :columns].reshape(encoded.shape).to(target)
