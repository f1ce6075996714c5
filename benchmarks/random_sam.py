"""Checkpoints of the published sizes with random weights spread like trained ones.

Real checkpoints show rows of differing scale and heavier tails than a Gaussian. Linear weights here are
Student-t with five degrees of freedom, with log-normal row scales about 0.7 / sqrt(fan-in), which keeps
activations in their usual range. Good for sizes, speed and correctness; they say nothing of mask quality.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_LAYOUTS = Path(__file__).parent / "layouts"
LAYOUT_OF = {
    "sam_vit_b": "sam_b", "sam_vit_l": "sam_l", "sam_vit_h": "sam_h", "mobile_sam_v2": "sam_h",
    "sam_hq_vit_tiny": "hq_tiny", "sam_hq_vit_b": "hq_b", "sam_hq_vit_l": "hq_l", "sam_hq_vit_h": "hq_h",
    "sam2_hiera_tiny": "sam2_t", "sam2_hiera_small": "sam2_s",
    "sam2_hiera_base_plus": "sam2_bp", "sam2_hiera_large": "sam2_l",
    "sam2.1_hiera_tiny": "sam21_t", "sam2.1_hiera_small": "sam21_s",
    "sam2.1_hiera_base_plus": "sam21_bp", "sam2.1_hiera_large": "sam21_l",
    "mobile_sam": "mobile_and_tinysam", "tiny_sam": "mobile_and_tinysam",
    "edge_sam": "edge", "edge_sam_3x": "edge", "efficient_sam_ti": "eff_ti", "efficient_sam_s": "eff_s",
}  # fmt: skip
"""Published variant to the file of its official layout."""
_TABLES = ("rel_pos_h", "rel_pos_w", "pos_embed", "pos_embed_window", "attention_biases")
_DRAWN_ONCE = "positional_encoding_gaussian_matrix"


def layout(name: str) -> dict[str, Tensor]:
    """Tensors without storage under the keys of an official checkpoint, by the name of its file in ``layouts``."""
    rows = json.loads(gzip.decompress((_LAYOUTS / f"{name}.json.gz").read_bytes()))
    return {k: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for k, (dtype, *shape) in rows.items()}


def state_dict(variant: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under the official keys of a published variant, in its dtypes and shapes."""
    return _filled(layout(LAYOUT_OF[variant]), seed)


def spread(network: Callable[[Any], nn.Module], sizes: Any, *, seed: int) -> dict[str, Tensor]:
    """Random tensors for a network of that configuration."""
    with torch.device("meta"):
        made = network(sizes)
    return spread_like(made, seed=seed)


def spread_like(network: nn.Module, *, seed: int) -> dict[str, Tensor]:
    """Random tensors under a network's keys, in its dtypes and shapes."""
    return _filled(network.state_dict(), seed)


def _filled(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {key: _drawn(key, like, draw).to(like.dtype) for key, like in state.items()}


def _drawn(key: str, like: Tensor, draw: torch.Generator) -> Tensor:
    shape = like.shape
    if not like.is_floating_point():  # how many batches a batch normalisation has seen
        return torch.full(shape, 100_000, dtype=like.dtype)
    if key.endswith("running_var"):
        return torch.exp(0.3 * torch.randn(shape, generator=draw))
    if key.endswith("running_mean"):
        return 0.1 * torch.randn(shape, generator=draw)
    if key.endswith(_DRAWN_ONCE):
        return torch.randn(shape, generator=draw)
    if len(shape) >= 2 and not key.endswith(_TABLES):
        rows = shape[0]
        fan_in = math.prod(shape[1:])
        # t with five degrees of freedom, as a Gaussian over the root of a mean of five squared ones, four of which
        # together are -2 log of a product of two evenly distributed numbers.
        weight = torch.randn(rows, fan_in, generator=draw)
        chi = torch.randn(rows, fan_in, generator=draw).square_()
        for _ in range(2):
            chi -= 2 * torch.rand(rows, fan_in, generator=draw).clamp_(min=1e-12).log_()
        weight /= (chi / 5).sqrt_()
        scale = torch.exp(0.3 * torch.randn(rows, 1, generator=draw)) * 0.7 / math.sqrt(max(fan_in, 2))
        return (weight * scale * math.sqrt(3 / 5)).reshape(shape)
    base = 1.0 if key.endswith("weight") and len(shape) == 1 else 0.0
    return base + 0.05 * torch.randn(shape, generator=draw)


def write(variant: str, path: Path, *, seed: int = 0) -> Path:
    """Save such a checkpoint as an ordinary ``.pth``, unless it is there."""
    if not path.exists():
        part = path.with_name(path.name + ".part")
        torch.save(state_dict(variant, seed=seed), part)
        part.replace(path)
    return path
