"""The nearest node of the winding in closed form: the same answer as comparing with every node.

In units of l/s, measured from the corner of the square, node θ = a·s + b is at (a + b/s, b): a square grid whose
row b is shifted right by b/s. The nearest node of a point (u, v) is in one of the two rows about v, and there
at the a nearest to u − b/s, kept to 0 … s − 1.

Why two rows are enough. Let h(b) be the horizontal distance from the point to row b; it is at most 1, and
neighbouring rows are shifted by 1/s, so h(b)² changes by at most 2/s from one row to the next. The vertical part
grows by at least 1 from the row below (above) the point to the next one out. So a third row is farther by at
least 1 − 2/s, in squared units: for s ≥ 8 a margin of 0.75.

Why the roundings do not matter. The nodes are fp32 numbers, so they lie off the ideal grid by a little (η, in
units), and ``_guess`` works in fp32. It therefore reports the points whose decision is closer than a bound on all
of these errors, exact ties included, and ``_settle`` decides those anew: four candidates (two rows, two a each),
their distances to the true nodes in float64, the lowest θ on ties, as the comparison with every node has it. The
four candidates hold the answer as long as η is far below the margin; where it is not (a centre so far from zero
that fp32 cannot tell the nodes apart, or s < 8) every node is compared.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kernels.codec import geometry, naive

_MIN_SIDE_NODES = 8
_MAX_OFFSET = 0.02


class NodeFinder:
    """Nearest nodes of the winding with ``count`` nodes in the square of side ``side`` about ``centre``.

    ``table``: its nodes, fp32 (count, 2) on the device of the points.
    """

    def __init__(self, centre: tuple[float, float], side: float, table: Tensor) -> None:
        self._table = table
        self._node_x, self._node_y = (axis.contiguous() for axis in table.to(torch.float64).unbind(1))
        self._s = math.isqrt(table.shape[0])
        self._scale = self._s / side
        square = geometry.Square(centre, side)
        self._low = square.low
        self._corner = (centre[0] - side / 2, centre[1] - side / 2)
        reach = max(abs(edge) for edge in (*square.low, *square.high))
        # Half a unit in the last place of the largest coordinate, in units of l/s.
        offset = reach * 2.0**-24 * self._scale
        self._closed_form = self._s >= _MIN_SIDE_NODES and offset < _MAX_OFFSET
        # s·2⁻²⁴ is one rounding of u or v; a handful of them and of node offsets enter a decision.
        self._doubt = 16 * (self._s * 2.0**-22 + 2 * offset)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """θ of the node nearest to each point inside the square, fp32 coordinates (n,): int32 (n,).

        Points outside get some valid number.
        """
        if not self._closed_form:
            return naive.nearest(torch.stack((x, y), dim=1), self._table).to(torch.int32)
        theta, doubtful = self._guess(x, y)
        if doubtful.numel():
            theta[doubtful] = self._settle(x[doubtful], y[doubtful])
        return theta

    def _guess(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """θ (int32) by two candidates in fp32, and the positions where that decides too narrowly."""
        s = self._s
        u = (x - self._low[0]).mul_(self._scale)
        v = (y - self._low[1]).mul_(self._scale)
        row = v.floor().clamp_(0, s - 2)
        rise = v.sub_(row)
        below = torch.sub(u, row, alpha=1 / s)
        above = below - 1 / s
        a_below = below.round().clamp_(0, s - 1)
        a_above = above.round().clamp_(0, s - 1)
        h_below = below.sub_(a_below)
        h_above = above.sub_(a_above)
        # Squared distance to the row above, less that to the row below: h₁² + (1 − w)² − h₀² − w².
        gap = (h_above * h_above).addcmul_(h_below, h_below, value=-1).sub_(rise, alpha=2).add_(1)
        upper = gap < 0
        a = torch.where(upper, a_above, a_below)
        h = torch.where(upper, h_above, h_below)
        theta = a.mul_(s).add_(row).add_(upper).to(torch.int32)
        narrow = torch.minimum(h.abs_().sub_(0.5).abs_(), gap.abs_()) < self._doubt
        return theta, narrow.nonzero().squeeze(1)

    def _settle(self, x: Tensor, y: Tensor) -> Tensor:
        """θ (int32) by four candidates, measured to the true nodes in float64."""
        s = self._s
        x, y = x.to(torch.float64), y.to(torch.float64)
        u = (x - self._corner[0]) * self._scale
        v = (y - self._corner[1]) * self._scale
        low_row = v.floor().clamp_(0, s - 2)
        best = torch.full_like(u, math.inf)
        found = torch.zeros_like(u, dtype=torch.int64)
        for row in (low_row, low_row + 1):
            left = (u - row / s).floor_().clamp_(0, s - 2)
            for a in (left, left + 1):
                theta = (a * s + row).to(torch.int64)
                dx = x - self._node_x[theta]
                dy = y - self._node_y[theta]
                distance = dx * dx + dy * dy
                better = (distance < best) | ((distance == best) & (theta < found))
                best = torch.where(better, distance, best)
                found = torch.where(better, theta, found)
        return found.to(torch.int32)
