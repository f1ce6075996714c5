"""SAM 2's image encoder: Hiera (Ryali et al. 2023; its position tables: Bolya et al. 2023) and the neck behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hypersam.sam.families.windows import cut, joined

if TYPE_CHECKING:
    from hypersam.sam.families.sam2 import Sam2Config

STAGES = 4
STRIDE = 4
"""Pixels of the picture a side of a token of the first stage."""


class ImageEncoder(nn.Module):
    """(B, 3, S, S) normalised pixels to three levels (B, C, S / 4, S / 4), (…, S / 8), (…, S / 16)."""

    def __init__(self, config: Sam2Config) -> None:
        super().__init__()
        self.trunk = Hiera(config)
        self.neck = _Neck([config.embed_dim << stage for stage in reversed(range(STAGES))], config.decoder.dim)

    def forward(self, x: Tensor, *, recompute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """``recompute``: see ``SamNetwork.encode``."""
        levels: tuple[Tensor, Tensor, Tensor] = self.neck(self.trunk(x, recompute=recompute))
        return levels


class _Neck(nn.Module):
    """Every level to one width; the coarsest is added to the one above it, and then let go."""

    def __init__(self, widths: list[int], dim: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_Lateral(width, dim) for width in widths)

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        made = [lateral(level) for lateral, level in zip(reversed(list(self.convs)), levels, strict=True)]
        coarsest = F.interpolate(made[3].float(), scale_factor=2.0, mode="nearest").to(made[2].dtype)
        return made[0], made[1], made[2] + coarsest


class _Lateral(nn.Module):
    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.conv(x)
        return projected


class Hiera(nn.Module):
    """The last blocks' outputs (B, C, h, w) of four stages, each of half the side and double the width."""

    def __init__(self, config: Sam2Config) -> None:
        super().__init__()
        dim, heads, first = config.embed_dim, config.heads, 0
        self.grid = self.shown = config.image_size // STRIDE
        self.ends = [sum(config.stages[: i + 1]) - 1 for i in range(STAGES)]
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 7, stride=STRIDE, padding=3)})
        self.pos_embed = nn.Parameter(torch.zeros(1, dim, config.background, config.background))
        self.pos_embed_window = nn.Parameter(torch.zeros(1, dim, config.windows[0], config.windows[0]))
        blocks = []
        for stage, count in enumerate(config.stages):
            for i in range(first, first + count):
                pool = stage > 0 and i == first
                # The block that halves the sides still has the windows of the stage before it.
                window = 0 if i in config.global_blocks else config.windows[stage - pool]
                blocks.append(_Block(dim, dim << pool, heads << pool, window, config.mlp_ratio))
                dim, heads = dim << pool, heads << pool
            first += count
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *, recompute: bool) -> list[Tensor]:
        x = self.patch_embed["proj"](x).permute(0, 2, 3, 1)
        x = x + self._positions().to(x.dtype)
        outputs = []
        for i, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if i in self.ends:
                outputs.append(x.permute(0, 3, 1, 2))
        return outputs

    def _positions(self) -> Tensor:
        """(1, g, g, C): a coarse table for the whole picture, and a fine one that repeats with the windows. Of a
        reduced picture it is the middle, as fine as the model was trained with."""
        coarse = F.interpolate(self.pos_embed.float(), (self.grid, self.grid), mode="bicubic", align_corners=False)
        times = self.grid // self.pos_embed_window.shape[-1]
        whole = coarse + self.pos_embed_window.tile(1, 1, times, times)
        # Windows begin where they did: the reduced side is a multiple of two of them.
        first = (self.grid - self.shown) // 2
        part = slice(first, first + self.shown)
        return whole[:, :, part, part].permute(0, 2, 3, 1)


class _Block(nn.Module):
    """Attention, in windows but where ``window`` is 0, and a perceptron, over (B, H, W, C); where the width changes
    the sides are halved by the greatest of four."""

    def __init__(self, dim: int, out: int, heads: int, window: int, mlp_ratio: int) -> None:
        super().__init__()
        self.window, self.pool = window, dim != out
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, out, heads, pool=self.pool)
        self.norm2 = nn.LayerNorm(out, eps=1e-6)
        self.mlp = _Perceptron(out, mlp_ratio * out)
        if self.pool:
            self.proj = nn.Linear(dim, out)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        shortcut = _halved(self.proj(normed)) if self.pool else x
        x = shortcut + (self._windowed(normed) if self.window else self.attn(normed))
        mixed: Tensor = x + self.mlp(self.norm2(x))
        return mixed

    def _windowed(self, x: Tensor) -> Tensor:
        """Cut into windows (the last ones padded with zeros), attend within each, put together again."""
        _, h, w, _ = x.shape
        windows, layout = cut(x, self.window)
        if self.pool:
            h, w = h // 2, w // 2
        return joined(self.attn(windows), layout)[:, :h, :w]


class _Attention(nn.Module):
    def __init__(self, dim: int, out: int, heads: int, *, pool: bool) -> None:
        super().__init__()
        self.heads, self.pool = heads, pool
        self.qkv = nn.Linear(dim, 3 * out)
        self.proj = nn.Linear(out, out)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, _ = x.shape
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.pool:
            q, h, w = _halved(q), h // 2, w // 2
        q, k, v = (part.reshape(b, -1, self.heads, part.shape[-1] // self.heads).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(b, h, w, -1))
        return projected


class _Perceptron(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, hidden), nn.Linear(hidden, dim)])

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.layers[1](F.gelu(self.layers[0](x)))
        return projected


def _halved(x: Tensor) -> Tensor:
    """(B, H, W, C) to (B, H / 2, W / 2, C), the greatest of each four."""
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
