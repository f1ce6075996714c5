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
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.codec import geometry, naive

_MIN_SIDE_NODES = 8
# On the CPU a chunk's columns stay in the cache and below torch's threshold for threads: with chunks of 2^18
# points the threads' barriers took most of the time as soon as anything else used a core. A GPU wants much at once.
_CPU_CHUNK = 30 * 1024
_GPU_CHUNK = 1 << 22
# Adding and subtracting 1.5·2²³ rounds an fp32 number under 2²² to a whole one. torch.round does the same, but
# uses threads for as few as 2,048 elements.
_ROUNDING = 1.5 * 2.0**23
_MAX_OFFSET = 0.02


def chunks(count: int, device: torch.device, *, columns: int = 1) -> Iterator[slice]:
    """The positions 0 … count − 1 in pieces that suit the device, for tensors of ``columns`` numbers a position."""
    step = (_CPU_CHUNK if device.type == "cpu" else _GPU_CHUNK) // columns
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


class NodeFinder:
    """Nearest nodes of the winding with ``table``'s nodes in the square of side ``side`` about ``centre``.

    ``table``: the nodes, fp32 (U, 2) on the device of the points.
    """

    def __init__(self, centre: tuple[float, float], side: float, table: Tensor) -> None:
        self._table = table
        self._node_x, self._node_y = (axis.contiguous() for axis in table.to(torch.float64).unbind(1))
        self._s = s = math.isqrt(table.shape[0])
        self._scale = s / side
        square = geometry.Square(centre, side)
        self._corner = (centre[0] - side / 2, centre[1] - side / 2)
        reach = max(abs(edge) for edge in (*square.low, *square.high))
        # Half a unit in the last place of the largest coordinate, in units of l/s.
        offset = reach * 2.0**-24 * self._scale
        self._closed_form = s >= _MIN_SIDE_NODES and offset < _MAX_OFFSET
        # s·2⁻²⁴ is one rounding of u or v; a handful of them and of node offsets enter a decision.
        self._doubt = 16 * (s * 2.0**-22 + 2 * offset)
        # Constants as fp32 tensors: a Python number is converted anew in every operation.
        constants = (*square.low, self._scale, _ROUNDING, 0.5, 1 / s, 1.0, -1e30, s)
        self._constants = torch.tensor(constants, dtype=torch.float32, device=table.device).unbind()

    def __call__(self, points: Tensor) -> Tensor:
        """θ of the node nearest to each point of fp32 (n, 2): int32 (n,). Points outside get a valid number."""
        if not self._closed_form:
            return naive.nearest(points, self._table).to(torch.int32)
        theta = torch.empty(points.shape[0], dtype=torch.int32, device=points.device)
        doubtful = [points.new_empty(0, dtype=torch.int64)]
        for part in chunks(points.shape[0], points.device):
            x, y = points[part].unbind(1)
            narrow = self._guess(x, y, theta[part])
            doubtful.append(narrow.nonzero().squeeze(1).add_(part.start))
        anew = torch.cat(doubtful)
        for part in chunks(anew.numel(), points.device):
            x, y = points[anew[part]].unbind(1)
            theta[anew[part]] = self._settle(x, y)
        return theta

    def _guess(self, x: Tensor, y: Tensor, theta: Tensor) -> Tensor:
        """Fill ``theta`` (int32) by two candidates in fp32; gives where that decides too narrowly (bool)."""
        x0, y0, scale, rounding, half, step, one, steep, size = self._constants
        s = self._s
        # The clamps to 0 … s keep what lies outside the square finite.
        u = (x - x0).mul_(scale).clamp_(0, s)
        v = (y - y0).mul_(scale).clamp_(0, s)
        # A row with row ≤ v ≤ row + 1; for a whole v either of the two will do.
        row = (v - half).add_(rounding).sub_(rounding).clamp_(0, s - 2)
        rise = v.sub_(row)
        below = torch.sub(u, row, alpha=1 / s)
        above = below - step
        a_below = (below + rounding).sub_(rounding).clamp_(0, s - 1)
        a_above = (above + rounding).sub_(rounding).clamp_(0, s - 1)
        h_below = below.sub_(a_below)
        h_above = above.sub_(a_above)
        # Squared distance to the row above, less that to the row below: h₁² + (1 − w)² − h₀² − w².
        gap = (h_above * h_above).addcmul_(h_below, h_below, value=-1).sub_(rise, alpha=2).add_(one)
        # 1 where the row above is nearer, else 0, without a mask; between them only where all is in doubt.
        upper = (gap * steep).clamp_(0, 1)
        a = a_below.addcmul_(a_above.sub_(a_below), upper)
        h = h_above.sub_(h_below).mul_(upper).add_(h_below)
        theta.copy_(a.mul_(size).add_(row).add_(upper))
        return torch.minimum(h.abs_().sub_(half).abs_(), gap.abs_()) < self._doubt

    def _settle(self, x: Tensor, y: Tensor) -> Tensor:
        """θ (int32) by four candidates, measured to the true nodes in float64."""
        s = self._s
        x, y = x.to(torch.float64), y.to(torch.float64)
        u = (x - self._corner[0]) * self._scale
        v = (y - self._corner[1]) * self._scale
        # Clamped numbers are not negative, so cutting their fraction off is rounding down.
        low_row = v.clamp_(0, s - 2).to(torch.int64)
        best = torch.full_like(u, math.inf)
        found = torch.zeros_like(u, dtype=torch.int64)
        for row in (low_row, low_row + 1):
            left = (u - row / s).clamp_(0, s - 2).to(torch.int64)
            for a in (left, left + 1):
                theta = a * s + row
                dx = x - self._node_x[theta]
                dy = y - self._node_y[theta]
                distance = dx * dx + dy * dy
                better = (distance < best) | ((distance == best) & (theta < found))
                best = torch.where(better, distance, best)
                found = torch.where(better, theta, found)
        return found.to(torch.int32)
