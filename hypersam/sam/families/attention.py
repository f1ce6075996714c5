"""Attention over squares of tokens with decomposed relative positions (Li et al. 2022), two ways to the same numbers.

score(i, j) = q_i·k_j/√d + rel_h(i, row of j) + rel_w(i, column of j). GPUs get it as a bias for
``scaled_dot_product_attention``. On CPUs that function takes twice to three times as long as its two matrix products
and the softmax between them, whatever the dtype, so there these three are written out, for a bounded number of
queries at a time, unless gradients are wanted.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_SCORE_BYTES = 16 << 20
"""Largest bias, or part of the attention matrix, that is materialised at once."""
_SMALL_SIDE = 16
"""Up to here relative positions are cheaper as further columns of queries and keys than as a sum over the scores."""


def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """(B, heads, side·side, d) each to (B, heads, side·side, d).

    ``rel_h``, ``rel_w``: (2·side − 1, d), the embeddings of the distances −(side − 1) … side − 1 of rows and columns.
    """
    side = math.isqrt(q.shape[2])
    steps = torch.arange(side, device=q.device)
    offset = steps[:, None] - steps[None, :] + side - 1
    grid = q.unflatten(2, (side, side))
    # (B, heads, row of the query, column of the query, row or column of the key)
    rows = torch.einsum("bnhwc,hkc->bnhwk", grid, rel_h[offset].to(q.dtype))
    columns = torch.einsum("bnhwc,wkc->bnhwk", grid, rel_w[offset].to(q.dtype))
    if q.device.type != "cpu" or q.requires_grad:
        return _by_library(q, k, v, rows, columns)
    return (_small if side <= _SMALL_SIDE else _large)(q, k, v, rows, columns)


def _by_library(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    out = torch.empty_like(q)
    for part, some in _parts(q):
        bias = (rows[:, :, some, :, :, None] + columns[:, :, some, :, None, :]).flatten(4).flatten(2, 3)
        out[:, :, part] = F.scaled_dot_product_attention(q[:, :, part], k, v, attn_mask=bias)
    return out


def _small(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """One product gives the whole sum: [q/√d, rel_h, rel_w] · [k, which row, which column]."""
    side, width = rows.shape[2], q.shape[-1]
    one = torch.eye(side, dtype=q.dtype, device=q.device)
    which = torch.cat([one.repeat_interleave(side, 1), one.repeat(1, side)]).expand(*q.shape[:2], -1, -1)
    queries = torch.cat([q * width**-0.5, rows.flatten(2, 3), columns.flatten(2, 3)], -1)
    scores = queries @ torch.cat([k.transpose(2, 3), which], 2)
    return scores.softmax(-1) @ v


def _large(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The bias of some queries is laid down and the product of queries and keys is added to it.

    Two buffers serve all of them: fresh memory for each would cost more than what is computed in it.
    """
    heads, (tokens, width) = q.shape[0] * q.shape[1], q.shape[2:]
    side = rows.shape[2]
    queries, values, keys = q.flatten(0, 1), v.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)
    rows, columns = (rel.flatten(0, 1).contiguous() for rel in (rows, columns))
    out = torch.empty_like(queries)
    parts = _parts(q)
    first = parts[0][0]
    scores, weights = (torch.empty(heads, first.stop, tokens, dtype=q.dtype, device=q.device) for _ in range(2))
    for part, some in parts:
        size = part.stop - part.start
        score, weight = (b.view(-1)[: heads * size * tokens].view(heads, size, tokens) for b in (scores, weights))
        bias = score.view(heads, -1, side, side, side)
        torch.add(rows[:, some, :, :, None], columns[:, some, :, None, :], out=bias)
        score.baddbmm_(queries[:, part], keys, alpha=width**-0.5)
        torch.softmax(score, -1, out=weight)
        out[:, part] = weight @ values
    return out.view(q.shape)


def _parts(q: Tensor) -> list[tuple[slice, slice]]:
    """Queries whose scores stay within the bound, as a slice of the tokens and one of their rows."""
    batch, heads, tokens, _ = q.shape
    side = math.isqrt(tokens)
    at_once = max(1, _SCORE_BYTES // (batch * heads * side * tokens * q.element_size())) if side > _SMALL_SIDE else side
    bounds = [(first, min(first + at_once, side)) for first in range(0, side, at_once)]
    return [(slice(first * side, last * side), slice(first, last)) for first, last in bounds]
