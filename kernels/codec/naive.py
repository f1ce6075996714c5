"""The published codec, shaped like its description: every point is compared with every node.

Slow on purpose and here for ever: the oracle that ``birkhoff`` is tested against.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.codec import geometry
from kernels.codec.packing import pack, unpack
from kernels.codec.types import CODED_DTYPES, BirkhoffConfig, BirkhoffTensor, RawTensor

_POINTS_AT_ONCE = 1 << 10


def nodes(centre: tuple[float, float], side: float, count: int) -> Tensor:
    """All nodes of the winding: fp32 (count, 2)."""
    return geometry.nodes(centre, side, count)


def nearest(plane: Tensor, table: Tensor) -> Tensor:
    """The number of the node of ``table`` (U, 2) nearest to each point of ``plane`` (n, 2), both fp32: int64 (n,).

    Distances are Euclidean, in float64; the lowest number wins ties (argmin gives the first minimum).
    """
    found = torch.empty(plane.shape[0], dtype=torch.int64, device=plane.device)
    node_x, node_y = table.to(device=plane.device, dtype=torch.float64).unbind(1)
    for start in range(0, plane.shape[0], _POINTS_AT_ONCE):
        x, y = plane[start : start + _POINTS_AT_ONCE].to(torch.float64).unbind(1)
        dx = x[:, None] - node_x
        dy = y[:, None] - node_y
        found[start : start + _POINTS_AT_ONCE] = (dx * dx + dy * dy).argmin(dim=1)
    return found


def encode(
    weight: Tensor, config: BirkhoffConfig, *, by_row: bool, keep_raw: bool = False
) -> BirkhoffTensor | RawTensor:
    """Encode a tensor; see ``kernels.codec.birkhoff.encode``, which gives the same."""
    if keep_raw or weight.dtype not in CODED_DTYPES or weight.numel() < config.min_elements:
        return RawTensor(weight.detach())
    plane = geometry.points(weight, by_row=by_row).cpu()
    if not plane.isfinite().all():
        return RawTensor(weight.detach())

    centre = geometry.centre(plane)
    c = torch.tensor(centre, dtype=torch.float64)
    offsets = plane.to(torch.float64) - c
    distance = geometry.distances(offsets[:, 0], offsets[:, 1])
    radius = float(distance.max())
    outside = geometry.Square(centre, config.side).outside(plane[:, 0], plane[:, 1])

    best: tuple[float, int, int, Tensor] | None = None
    for count in config.nodes:
        table = nodes(centre, config.side, count)
        best = None
        for classes in range(1, config.max_classes + 1) if bool(outside.any()) else (0,):
            drawn = plane.clone()
            number = torch.zeros(plane.shape[0], dtype=torch.int64)
            if classes:
                radii = geometry.class_radii(config.side, radius, classes)
                number[outside], drawn[outside] = geometry.draw_in(offsets[outside], distance[outside], centre, radii)
            index = number * count + nearest(drawn, table)
            pairs = geometry.pair_table(centre, config.side, radius, count, classes)
            error = geometry.stable_sum((pairs[index] - plane).abs()) / plane.numel()
            if best is None or error <= best[0]:
                best = (error, count, classes, index)
            if error <= config.target_error:
                break
        if best is not None and best[0] <= config.target_error:
            break
    assert best is not None
    error, count, classes, index = best
    pairs = geometry.pair_table(centre, config.side, radius, count, classes)
    if not (error <= config.raw_above and geometry.representable(pairs, index, weight.dtype)):
        return RawTensor(weight.detach())
    bits = int(index.max()).bit_length()
    return BirkhoffTensor(
        shape=tuple(weight.shape), dtype=weight.dtype, by_row=by_row, centre=centre, radius=radius,
        side=config.side, nodes=count, classes=classes, bits=bits, indices=pack(index, bits), mean_error=error,
    )  # fmt: skip


def decode(
    encoded: BirkhoffTensor | RawTensor, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Tensor:
    """Decode a tensor; see ``kernels.codec.birkhoff.decode``, which gives the same."""
    if isinstance(encoded, RawTensor):
        return encoded.tensor.to(device=device, dtype=dtype, copy=True)
    e = encoded
    index = unpack(e.indices, e.bits, e.count).to(torch.int64)
    number, theta = index // e.nodes, index % e.nodes
    c = torch.tensor(e.centre, dtype=torch.float64)
    arm = nodes(e.centre, e.side, e.nodes)[theta].to(torch.float64) - c
    radii = torch.tensor(geometry.class_radii(e.side, e.radius, e.classes), dtype=torch.float64)
    pairs = (c + arm * (radii[number] / (e.side / 2)).unsqueeze(1)).to(torch.float32)
    values = pairs.view(e.rows, -1)[:, : e.columns].reshape(e.shape)
    return values.to(device=device, dtype=dtype or e.dtype)
