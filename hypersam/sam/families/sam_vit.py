"""SAM with a ViT image encoder (Kirillov et al. 2023), of the published sizes or any other.

The prompt encoder and the mask decoder are segment-anything's own classes. The image encoder is written
here with the same keys: the official one materialises every attention matrix (0.8 GB a global block for
ViT-B) where ours hands scaled_dot_product_attention a bias for a bounded number of queries at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d, MLPBlock
from torch import Tensor, nn

from hypersam.errors import LayoutMismatch

MARK = "image_encoder.patch_embed.proj.weight"
DECODER_HEADS = 8
"""The heads of the mask decoder's attention are in no checkpoint; every published SAM has eight."""
_BIAS_BYTES = 32 << 20
"""Largest relative-position bias that attention materialises at once."""


@dataclass(frozen=True)
class SamViTConfig:
    """Sizes of a SAM with a ViT encoder. ``windows`` has a block's window side in patches, 0 where global."""

    image_size: int
    patch: int
    embed_dim: int
    depth: int
    heads: int
    mlp_dim: int
    windows: tuple[int, ...]
    prompt_dim: int
    mask_in_chans: int
    multimask_outputs: int
    decoder_depth: int
    decoder_mlp_dim: int
    iou_depth: int
    iou_hidden: int

    @property
    def grid(self) -> int:
        """Side of the patch grid and of the embedding."""
        return self.image_size // self.patch

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; ``from_dict`` reads it."""
        return asdict(self) | {"windows": list(self.windows)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamViTConfig:
        """The inverse of ``as_dict``. Raises ValueError where a field is missing, unknown or no positive number."""
        names = {f.name for f in fields(cls)}
        if set(values) != names:
            raise ValueError(f"a SAM ViT configuration has the fields {sorted(names)}, got {sorted(values)}")
        windows = values["windows"]
        numbers = [values[n] for n in names - {"windows"}]
        if not all(isinstance(n, int) and n > 0 for n in numbers) or len(windows) != values["depth"]:
            raise ValueError("a SAM ViT configuration holds positive integers and one window a block")
        return cls(**{**values, "windows": tuple(int(w) for w in windows)})


def config_from(tensors: Mapping[str, Tensor]) -> SamViTConfig:
    """Read the sizes off the shapes of a state dict. Raises LayoutMismatch naming what does not fit."""

    def shape(key: str, dims: int) -> tuple[int, ...]:
        if key not in tensors:
            raise LayoutMismatch(f"a SAM ViT checkpoint needs {key!r}, which is missing")
        if tensors[key].ndim != dims or 0 in tensors[key].shape:
            raise LayoutMismatch(f"{key!r} has shape {tuple(tensors[key].shape)}; {dims} dimensions were expected")
        return tuple(tensors[key].shape)

    def count(pattern: str) -> int:
        n = 0
        while pattern.format(n) in tensors:
            n += 1
        return n

    embed_dim, _, patch, _ = shape(MARK, 4)
    _, grid, _, _ = shape("image_encoder.pos_embed", 4)
    depth = count("image_encoder.blocks.{}.attn.qkv.weight")
    if not depth:
        raise LayoutMismatch("a SAM ViT checkpoint needs 'image_encoder.blocks.0.attn.qkv.weight', which is missing")
    windows = []
    head_dim = shape("image_encoder.blocks.0.attn.rel_pos_h", 2)[1]
    for i in range(depth):
        side = (shape(f"image_encoder.blocks.{i}.attn.rel_pos_h", 2)[0] + 1) // 2
        windows.append(0 if side == grid else side)
    if embed_dim % head_dim:
        raise LayoutMismatch(f"heads of {head_dim} do not divide a width of {embed_dim}")
    prompt_dim = shape("image_encoder.neck.0.weight", 4)[0]
    if prompt_dim % DECODER_HEADS:
        raise LayoutMismatch(f"an embedding of {prompt_dim} channels is no multiple of {DECODER_HEADS} heads")
    return SamViTConfig(
        image_size=grid * patch,
        patch=patch,
        embed_dim=embed_dim,
        depth=depth,
        heads=embed_dim // head_dim,
        mlp_dim=shape("image_encoder.blocks.0.mlp.lin1.weight", 2)[0],
        windows=tuple(windows),
        prompt_dim=prompt_dim,
        mask_in_chans=shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
        multimask_outputs=shape("mask_decoder.mask_tokens.weight", 2)[0] - 1,
        decoder_depth=count("mask_decoder.transformer.layers.{}.norm1.weight"),
        decoder_mlp_dim=shape("mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
        iou_depth=count("mask_decoder.iou_prediction_head.layers.{}.weight"),
        iou_hidden=shape("mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
    )


class SamViT(nn.Module):
    """The whole network; every key as in the official checkpoints. Builds on the meta device."""

    def __init__(self, config: SamViTConfig) -> None:
        super().__init__()
        self.config = config
        grid = config.grid
        self.image_encoder = ImageEncoder(config)
        self.prompt_encoder = PromptEncoder(
            embed_dim=config.prompt_dim,
            image_embedding_size=(grid, grid),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=config.mask_in_chans,
        )
        self.mask_decoder = MaskDecoder(
            num_multimask_outputs=config.multimask_outputs,
            transformer=TwoWayTransformer(
                depth=config.decoder_depth,
                embedding_dim=config.prompt_dim,
                mlp_dim=config.decoder_mlp_dim,
                num_heads=DECODER_HEADS,
            ),
            transformer_dim=config.prompt_dim,
            iou_head_depth=config.iou_depth,
            iou_head_hidden_dim=config.iou_hidden,
        )


class ImageEncoder(nn.Module):
    """ViT with windowed and global attention: (B, 3, S, S) normalised pixels to (B, C, S/patch, S/patch)."""

    def __init__(self, config: SamViTConfig) -> None:
        super().__init__()
        dim, out = config.embed_dim, config.prompt_dim
        self.patch_embed = _PatchEmbed(config.patch, dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.grid, config.grid, dim))
        self.blocks = nn.ModuleList(
            _Block(dim, config.heads, config.mlp_dim, window, config.grid) for window in config.windows
        )
        self.neck = nn.Sequential(
            nn.Conv2d(dim, out, 1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            LayerNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Embed a batch of padded pictures."""
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        neck: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return neck


class _PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x)
        return patches.permute(0, 2, 3, 1)


class _Block(nn.Module):
    """Transformer block over (B, H, W, C), attention within windows where ``window`` is not 0."""

    def __init__(self, dim: int, heads: int, mlp_dim: int, window: int, grid: int) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, heads, window or grid)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLPBlock(embedding_dim=dim, mlp_dim=mlp_dim, act=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        attended = self._windowed(normed) if self.window else self.attn(normed)
        x = x + attended
        mlp: Tensor = self.mlp(self.norm2(x))
        return x + mlp

    def _windowed(self, x: Tensor) -> Tensor:
        """Cut into windows (the last ones padded with zeros), attend within each, put together again."""
        b, h, w, c = x.shape
        side = self.window
        x = F.pad(x, (0, 0, 0, -w % side, 0, -h % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.view(b, rows, side, columns, side, c).transpose(2, 3).reshape(-1, side, side, c)
        x = self.attn(x)
        x = x.view(b, rows, columns, side, side, c).transpose(2, 3)
        return x.reshape(b, rows * side, columns * side, c)[:, :h, :w]


class _Attention(nn.Module):
    """Multi-head attention over a square of tokens with decomposed relative positions (Li et al. 2022)."""

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))

    def forward(self, x: Tensor) -> Tensor:
        b, side = x.shape[0], self.side
        tokens, dim = side * side, x.shape[-1]
        qkv = self.qkv(x).view(b, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        steps = torch.arange(side, device=x.device)
        offset = steps[:, None] - steps[None, :] + side - 1
        r_h, r_w = self.rel_pos_h[offset].to(q.dtype), self.rel_pos_w[offset].to(q.dtype)
        grid_q = q.reshape(b, self.heads, side, side, -1)
        # (B, heads, row of the query, column of the query, row or column of the key)
        rel_h = torch.einsum("bnhwc,hkc->bnhwk", grid_q, r_h)
        rel_w = torch.einsum("bnhwc,wkc->bnhwk", grid_q, r_w)
        rows = self._rows_at_once(b, q.element_size())
        out = torch.empty(b, tokens, self.heads, dim // self.heads, dtype=q.dtype, device=q.device)
        for first in range(0, side, rows):
            last = min(first + rows, side)
            bias = rel_h[:, :, first:last, :, :, None] + rel_w[:, :, first:last, :, None, :]
            part = slice(first * side, last * side)
            attended = F.scaled_dot_product_attention(
                q[:, :, part], k, v, attn_mask=bias.reshape(b, self.heads, -1, tokens)
            )
            out[:, part] = attended.transpose(1, 2)
        projected: Tensor = self.proj(out.view(b, side, side, dim))
        return projected

    def _rows_at_once(self, batch: int, element_size: int) -> int:
        """Rows of queries whose bias stays within the bound. Windows are many and small: all at once."""
        row_bytes = batch * self.heads * self.side**3 * element_size
        return self.side if self.side <= 16 else max(1, min(self.side, math.floor(_BIAS_BYTES / row_bytes)))
