"""The plane of the ``birkhoff`` codec: points, centre, square, nodes, classes. Each formula has its home here.

Symbols as in the published description: l side, U nodes, s = √U, c centre, R radius, K classes, θ node number.
Where a rounding decides between two codings it is fixed here, so that every implementation decides alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Sums are taken in groups of this size so that the result does not depend on the number of threads.
_SUM_GROUP = 1024
# Groups summed at once on the CPU: below torch's threshold for threads, whose barriers cost more than the sums.
_GROUPS_AT_ONCE = 31


def stable_sum(values: Tensor) -> float:
    """Sum in float64, in an order that depends on the number of values alone."""
    flat = values.reshape(-1)
    step = _SUM_GROUP * _GROUPS_AT_ONCE if flat.device.type == "cpu" else flat.numel()
    while flat.numel() > _SUM_GROUP:
        head = flat.numel() // _SUM_GROUP * _SUM_GROUP
        slabs = flat[:head].split(step)
        groups = [slab.view(-1, _SUM_GROUP).sum(1, dtype=torch.float64) for slab in slabs]
        flat = torch.cat((*groups, flat[head:].sum(dtype=torch.float64).reshape(1)))
    return float(flat.sum(dtype=torch.float64))


def points(weight: Tensor, *, by_row: bool) -> Tensor:
    """The points of a tensor: fp32, contiguous, (rows·⌈columns / 2⌉, 2).

    ``by_row`` pairs neighbours along the rows of a matrix, else the flattened tensor is one row. A row of odd
    length is padded with the mean of all second coordinates of the pairs that are whole (one value for the
    tensor). One column has no whole pair: there the padding is the mean of the column, so that it never moves
    the centre. Raises ValueError when ``by_row`` meets anything but a matrix.
    """
    if by_row and weight.dim() != 2:
        raise ValueError(f"coding by row needs a matrix, but shape is {tuple(weight.shape)}")
    values = weight.detach().to(torch.float32)
    values = values if by_row else values.reshape(1, -1)
    rows, columns = values.shape
    if columns % 2:
        seconds = values[:, 1::2] if columns > 1 else values
        padding = stable_sum(seconds) / seconds.numel()
        values = torch.cat((values, values.new_full((rows, 1), padding)), dim=1)
    return values.contiguous().view(-1, 2)


def centre(plane: Tensor) -> tuple[float, float]:
    """c, the mean of points (n, 2): summed in float64 and rounded once to fp32."""
    mean = [stable_sum(plane[:, axis]) / plane.shape[0] for axis in (0, 1)]
    x, y = torch.tensor(mean, dtype=torch.float64).to(torch.float32).tolist()
    return float(x), float(y)


@dataclass(frozen=True)
class Square:
    """The square of side ``side`` about ``centre``, with its edges rounded once to fp32, as the nodes are.

    A point on an edge as fp32 knows it is therefore inside. A point outside is farther than l/2 from the
    centre in exact arithmetic too, since an edge is the fp32 number nearest to c ± l/2.
    """

    centre: tuple[float, float]
    side: float

    @property
    def low(self) -> tuple[float, float]:
        """The lower edges of both coordinates, exact in fp32."""
        return self._edge(-1)

    @property
    def high(self) -> tuple[float, float]:
        """The upper edges of both coordinates, exact in fp32."""
        return self._edge(1)

    def _edge(self, sign: int) -> tuple[float, float]:
        ideal = [value + sign * (self.side / 2) for value in self.centre]
        x, y = torch.tensor(ideal, dtype=torch.float64).to(torch.float32).tolist()
        return float(x), float(y)

    def outside(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether points of fp32 coordinates ``x``, ``y`` lie outside: bool, of their shape."""
        (x0, y0), (x1, y1) = self.low, self.high
        return (x < x0) | (x > x1) | (y < y0) | (y > y1)


def nodes(where: tuple[float, float], side: float, count: int) -> Tensor:
    """All nodes of the winding about the centre ``where``: fp32 (count, 2), on the CPU.

    node(θ) = c − (l/2, l/2) + (l·θ/U, l·(θ mod s)/s), the modulus in integers, in float64, rounded once.
    """
    s = math.isqrt(count)
    theta = torch.arange(count, dtype=torch.int64)
    x = (where[0] - side / 2) + side * theta.to(torch.float64) / count
    y = (where[1] - side / 2) + side * (theta % s).to(torch.float64) / s
    return torch.stack((x, y), dim=1).to(torch.float32)


def class_radii(side: float, radius: float, classes: int) -> list[float]:
    """d_0 … d_K: d_0 = l/2, d_k = l/2 + k·(R − l/2)/K, and d_K = R exactly."""
    half = side / 2
    between = [half + k * (radius - half) / classes for k in range(1, classes)]
    return [half, *between, radius] if classes else [half]


def pair_table(where: tuple[float, float], side: float, radius: float, count: int, classes: int) -> Tensor:
    """The pair of weights of each index k·U + θ: fp32 ((K + 1)·U, 2), on the CPU.

    p = c + (node(θ) − c)·d_k/(l/2), from the fp32 nodes in float64, rounded once; class 0 is the nodes.
    """
    table = nodes(where, side, count)
    c = torch.tensor(where, dtype=torch.float64)
    arms = table.to(torch.float64) - c
    radii = class_radii(side, radius, classes)
    outer = [(c + arms * (d / radii[0])).to(torch.float32) for d in radii[1:]]
    return torch.cat((table, *outer))


def representable(table: Tensor, index: Tensor, dtype: torch.dtype) -> bool:
    """Whether every pair of ``table`` that ``index`` names is finite in ``dtype``."""
    finite = table.to(dtype).isfinite().all(dim=1)
    return bool(finite.all()) or bool(finite[index.to(torch.int64)].all())


def distances(offsets_x: Tensor, offsets_y: Tensor) -> Tensor:
    """Euclidean distances from the centre of float64 offsets."""
    return (offsets_x * offsets_x + offsets_y * offsets_y).sqrt()


def draw_in(offsets: Tensor, distance: Tensor, where: tuple[float, float], radii: list[float]) -> tuple[Tensor, Tensor]:
    """Class and drawn-in place of points outside the square.

    ``offsets``: p − c, float64 (n, 2); ``distance``: their lengths (n,). Gives the classes 1 … K (int64) and
    the fp32 points (n, 2) c + (p − c)·(l/2)/d_k.
    """
    number = torch.ones_like(distance, dtype=torch.int64)
    for d in radii[1:-1]:
        number += distance > d
    factors = torch.tensor([radii[0] / d for d in radii], dtype=torch.float64, device=offsets.device)
    c = torch.tensor(where, dtype=torch.float64, device=offsets.device)
    drawn = offsets * torch.index_select(factors, 0, number).unsqueeze(1) + c
    return number, drawn.to(torch.float32)
