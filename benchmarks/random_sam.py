"""Checkpoints of the published sizes with random weights spread like trained ones.

Real checkpoints show rows of differing scale and heavier tails than a Gaussian. Linear weights here are
Student-t with five degrees of freedom, with log-normal row scales about 0.7 / sqrt(fan-in), which keeps
activations in their usual range. Good for sizes, speed and correctness; they say nothing of mask quality.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from hypersam.sam.families.decoder import DecoderConfig
from hypersam.sam.families.sam_vit import SamViT, SamViTConfig

_GLOBAL = {"sam_vit_b": (2, 5, 8, 11), "sam_vit_l": (5, 11, 17, 23), "sam_vit_h": (7, 15, 23, 31)}
_SIZES = {"sam_vit_b": (768, 12, 12), "sam_vit_l": (1024, 24, 16), "sam_vit_h": (1280, 32, 16)}


def config(variant: str) -> SamViTConfig:
    """The configuration of a published size."""
    dim, depth, heads = _SIZES[variant]
    windows = tuple(0 if i in _GLOBAL[variant] else 14 for i in range(depth))
    return SamViTConfig(
        image_size=1024, patch=16, embed_dim=dim, heads=heads, mlp_dim=4 * dim, windows=windows,
        decoder=DecoderConfig(
            dim=256, mask_in_chans=16, multimask_outputs=3, depth=2, mlp_dim=2048, iou_depth=3, iou_hidden=256
        ),
    )  # fmt: skip


def state_dict(variant: str, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random fp32 tensors under the official keys."""
    draw = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        network = SamViT(config(variant))
    buffers = {name for name, _ in network.named_buffers()}
    state = {}
    for key, meta in network.state_dict().items():
        if key in buffers:
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
