"""Small SAMs of segment-anything's own classes with random weights whose spreads are like trained ones'."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from torch import nn


@dataclass(frozen=True)
class ModelSize:
    image: int
    patch: int
    dim: int
    depth: int
    heads: int
    window: int
    global_blocks: tuple[int, ...]
    prompt_dim: int

    @property
    def grid(self) -> int:
        return self.image // self.patch


TINY = ModelSize(image=64, patch=8, dim=32, depth=2, heads=2, window=4, global_blocks=(1,), prompt_dim=32)


def official_sam(size: ModelSize = TINY, *, seed: int = 0, mlp_dim: int = 128, iou_hidden: int = 64) -> Sam:
    """A random model; position tables and biases, which start at zero, are drawn too."""
    torch.manual_seed(seed)
    sam = Sam(
        ImageEncoderViT(
            img_size=size.image, patch_size=size.patch, embed_dim=size.dim, depth=size.depth, num_heads=size.heads,
            mlp_ratio=4, out_chans=size.prompt_dim, qkv_bias=True, use_rel_pos=True, window_size=size.window,
            global_attn_indexes=size.global_blocks, norm_layer=partial(nn.LayerNorm, eps=1e-6),
        ),
        PromptEncoder(size.prompt_dim, (size.grid, size.grid), (size.image, size.image), 16),
        MaskDecoder(
            transformer_dim=size.prompt_dim, iou_head_hidden_dim=iou_hidden,
            transformer=TwoWayTransformer(2, size.prompt_dim, 8, mlp_dim),
        ),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, p in sam.named_parameters():
            if "rel_pos" in name or "pos_embed" in name or name.endswith("bias"):
                p.add_(torch.randn_like(p) * 0.05)
    return sam.requires_grad_(False)


def save_checkpoint(path: Path, size: ModelSize = TINY, *, seed: int = 0) -> Path:
    """An ordinary ``.pth`` state dict of such a model."""
    torch.save(official_sam(size, seed=seed).state_dict(), path)
    return path
