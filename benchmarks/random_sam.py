"""Checkpoints of the published sizes with random weights spread like trained ones.

Real checkpoints show rows of differing scale and heavier tails than a Gaussian. Linear weights here are
Student-t with five degrees of freedom, with log-normal row scales about 0.7 / sqrt(fan-in), which keeps
activations in their usual range. Good for sizes, speed and correctness; they say nothing of mask quality.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch

from hypersam.sam.families import family_of
from hypersam.sam.families.decoder import DecoderConfig
from hypersam.sam.families.edge_sam import EdgeSamConfig
from hypersam.sam.families.efficient_sam import EfficientSamConfig
from hypersam.sam.families.sam_vit import SamViTConfig
from hypersam.sam.network import Config, SamNetwork
from hypersam.sam.registry import VARIANTS

_GLOBAL = {"sam_vit_b": (2, 5, 8, 11), "sam_vit_l": (5, 11, 17, 23), "sam_vit_h": (7, 15, 23, 31)}
_SIZES = {"sam_vit_b": (768, 12, 12), "sam_vit_l": (1024, 24, 16), "sam_vit_h": (1280, 32, 16)}
PUBLISHED = {row.id: row.family for row in VARIANTS}
"""Variant to family."""
_DECODER = DecoderConfig(
    dim=256, mask_in_chans=16, multimask_outputs=3, depth=2, mlp_dim=2048, iou_depth=3, iou_hidden=256
)


def config(variant: str) -> Config:
    """The configuration of a published variant. Raises KeyError for one without a maker here."""
    return _MAKERS[PUBLISHED[variant]](variant)


def _sam_vit(variant: str) -> Config:
    dim, depth, heads = _SIZES[variant]
    windows = tuple(0 if i in _GLOBAL[variant] else 14 for i in range(depth))
    return SamViTConfig(
        image_size=1024, patch=16, embed_dim=dim, heads=heads, mlp_dim=4 * dim, windows=windows, decoder=_DECODER
    )


def _edge_sam(_: str) -> Config:
    return EdgeSamConfig(
        image_size=1024, stem=24, widths=(48, 96, 192, 384), depths=(3, 3, 15, 2), squeezes=(16, 24, 48, 96),
        excited=(1, 5, *range(9, 23, 2), 25), expansion=2, decoder=_DECODER,
    )  # fmt: skip


def _efficient_sam(variant: str) -> Config:
    width = {"efficient_sam_ti": 192, "efficient_sam_s": 384}[variant]
    return EfficientSamConfig(
        image_size=1024, patch=16, table=14, embed_dim=width, heads=width // 64, depth=12, mlp_dim=4 * width, dim=256,
        multimask_outputs=3, decoder_depth=2, decoder_mlp_dim=2048, iou_depth=2, iou_hidden=256, upscaling=(64, 32),
    )  # fmt: skip


_MAKERS: dict[str, Callable[[str], Config]] = {
    "sam_vit": _sam_vit,
    "edge_sam": _edge_sam,
    "efficient_sam": _efficient_sam,
}


def state_dict(variant: str, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random fp32 tensors under the official keys."""
    return random_state(family_of(PUBLISHED[variant]).on_meta(config(variant)), seed=seed)


def random_state(network: SamNetwork, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors for a network of any size."""
    draw = torch.Generator().manual_seed(seed)
    buffers = {name for name, _ in network.named_buffers()}
    state = {}
    for key, meta in network.state_dict().items():
        if not meta.is_floating_point():
            state[key] = torch.full(meta.shape, 1000, dtype=meta.dtype)
        elif key.endswith("running_var"):
            state[key] = torch.exp(0.4 * torch.randn(meta.shape, generator=draw))
        elif key.endswith("running_mean"):
            state[key] = 0.1 * torch.randn(meta.shape, generator=draw)
        elif key in buffers:
            state[key] = torch.randn(meta.shape, generator=draw)
        elif meta.ndim >= 2 and not key.endswith(("rel_pos_h", "rel_pos_w", "pos_embed")):
            rows = meta.shape[0]
            fan_in = math.prod(meta.shape[1:])
            # t with five degrees of freedom, as a Gaussian over the root of a mean of five squared ones.
            weight = torch.randn(rows, fan_in, generator=draw)
            chi = torch.zeros(rows, fan_in)
            for _ in range(5):
                chi += torch.randn(rows, fan_in, generator=draw).square_()
            weight /= (chi / 5).sqrt_()
            scale = torch.exp(0.3 * torch.randn(rows, 1, generator=draw)) * 0.7 / math.sqrt(max(fan_in, 2))
            state[key] = (weight * scale * math.sqrt(3 / 5)).reshape(meta.shape)
        else:
            base = 1.0 if key.endswith("weight") and meta.ndim == 1 else 0.0
            state[key] = base + 0.05 * torch.randn(meta.shape, generator=draw)
    return state


def write(variant: str, path: Path, *, seed: int = 0) -> Path:
    """Save such a checkpoint as an ordinary ``.pth``, unless it is there."""
    if not path.exists():
        part = path.with_name(path.name + ".part")
        torch.save(state_dict(variant, seed=seed), part)
        part.replace(path)
    return path
