"""The product as it is written down: decode the whole weight, then multiply. The oracle of the others.

All implementations share the arguments: ``x`` (…, in), ``indices`` int16 (out, ⌈in / 2⌉), ``pairs`` int64 (n,)
with the two fp32 weights of an index in the bits of one number (see ``module``), ``bias`` (out,) or None.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dense(indices: Tensor, pairs: Tensor, in_features: int) -> Tensor:
    """The weight: fp32 (out, in)."""
    values = pairs[indices.long()].view(torch.float32)
    return values[:, :in_features]


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype of products and sums: fp32, and float64 for a float64 ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def linear(x: Tensor, indices: Tensor, pairs: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` times the transposed weight, plus ``bias``: (…, out) in ``x``'s dtype, rounded to it once."""
    wide = accumulator(x)
    weight = dense(indices, pairs, x.shape[-1]).to(wide)
    return F.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)
