"""SAM's prompt encoder and mask decoder, and what image encoders share, as plain float64 arithmetic on a state dict.

No module and no fused operation of the library: every product, softmax and norm is written out, so that a network
that agrees was wired as the papers say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

State = Mapping[str, Tensor]


def doubled(state: State) -> dict[str, Tensor]:
    return {key: value.double() for key, value in state.items()}


def under(state: State, prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def linear(s: State, x: Tensor) -> Tensor:
    return x @ s["weight"].T + s["bias"]


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def layer_norm(s: State, x: Tensor, eps: float, dim: int = -1) -> Tensor:
    mean = x.mean(dim, keepdim=True)
    variance = (x - mean).square().mean(dim, keepdim=True)
    shape = [1] * x.ndim
    shape[dim] = -1
    return (x - mean) / (variance + eps).sqrt() * s["weight"].view(shape) + s["bias"].view(shape)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """(B, N, C) each; the attention matrix is written out head by head."""
    width = q.shape[-1] // heads
    parts = []
    for h in range(heads):
        at = slice(h * width, (h + 1) * width)
        scores = q[..., at] @ k[..., at].transpose(-1, -2) / math.sqrt(width)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        parts.append(weights / weights.sum(-1, keepdim=True) @ v[..., at])
    return torch.cat(parts, -1)


def projected_attention(s: State, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (linear(under(s, f"{n}_proj."), t) for n, t in (("q", q), ("k", k), ("v", v)))
    return linear(under(s, "out_proj."), attend(q, k, v, heads))


def fourier(s: State, coordinates: Tensor) -> Tensor:
    """Coordinates from 0 to 1, (…, 2) as x, y."""
    angles = 2 * math.pi * ((2 * coordinates - 1) @ s["pe_layer.positional_encoding_gaussian_matrix"])
    return torch.cat([angles.sin(), angles.cos()], -1)


def grid_fourier(s: State, grid: int) -> Tensor:
    """(1, C, grid, grid)."""
    at = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    return fourier(s, torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)).permute(2, 0, 1)[None]


def neck(s: State, x: Tensor) -> Tensor:
    x = layer_norm(under(s, "1."), F.conv2d(x, s["0.weight"]), 1e-6, dim=1)
    return layer_norm(under(s, "3."), F.conv2d(x, s["2.weight"], padding=1), 1e-6, dim=1)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())
