"""Square windows of pixels, each of which is attended to by itself."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Layout = tuple[int, int]
"""How many windows there are from top to bottom and from left to right."""


def cut(x: Tensor, side: int) -> tuple[Tensor, Layout]:
    """(B, H, W, C) to windows (B·n, side, side, C) and their layout; the last ones are padded with zeros."""
    b, h, w, c = x.shape
    x = F.pad(x, (0, 0, 0, -w % side, 0, -h % side))
    rows, columns = x.shape[1] // side, x.shape[2] // side
    windows = x.reshape(b, rows, side, columns, side, c).transpose(2, 3).reshape(-1, side, side, c)
    return windows, (rows, columns)


def joined(windows: Tensor, layout: Layout) -> Tensor:
    """The inverse of ``cut``, of windows of any side: (B, H, W, C) with the padding."""
    (rows, columns), (_, side, _, c) = layout, windows.shape
    x = windows.reshape(-1, rows, columns, side, side, c).transpose(2, 3)
    return x.reshape(-1, rows * side, columns * side, c)
