"""SAM with a ViT image encoder (Kirillov et al. 2023), of the published sizes or any other.

The image encoder is written here with the official keys: the official one materialises every attention matrix
(0.8 GB a global block for ViT-B), see ``attention`` for what ours does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hypersam.errors import LayoutMismatch
from hypersam.sam.families.attention import attend
from hypersam.sam.families.decoder import (
    DecoderConfig,
    SamDecoding,
    mask_decoder,
    prompt_encoder,
    read_decoder,
    resized_prompts,
)
from hypersam.sam.families.shapes import Shapes, checked, most_of
from hypersam.sam.family import Family
from hypersam.sam.network import LARGEST_SIDE, Features, cut, shell
from hypersam.sam.official import LayerNorm2d, MLPBlock

has_vit = most_of("image_encoder.blocks.", "image_encoder.patch_embed.proj.", "image_encoder.pos_embed")
"""Whether keys are those of a plain ViT, of SAM or another."""


@dataclass(frozen=True)
class SamViTConfig:
    """Sizes of a SAM with a ViT encoder. ``windows`` has a block's window side in patches, 0 where global."""

    image_size: int
    patch: int
    embed_dim: int
    heads: int
    mlp_dim: int
    windows: tuple[int, ...]
    decoder: DecoderConfig

    @property
    def grid(self) -> int:
        """Side of the patch grid and of the embedding."""
        return self.image_size // self.patch

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.windows)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; ``from_dict`` reads it."""
        return asdict(self) | {"windows": list(self.windows)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SamViTConfig:
        """The inverse of ``as_dict``. Raises ValueError where a field is missing, unknown or no positive number."""
        found = checked(cls, values, lists=("windows",))
        return cls(**found | {"decoder": DecoderConfig(**checked(DecoderConfig, found["decoder"]))})


def read_vit(shapes: Shapes, decoder: DecoderConfig) -> SamViTConfig:
    """Read the image encoder's sizes off the shapes. Raises LayoutMismatch naming what does not fit."""
    embed_dim, _, patch, _ = shapes.of("image_encoder.patch_embed.proj.weight", 4)
    _, grid, _, _ = shapes.of("image_encoder.pos_embed", 4)
    depth = shapes.depth("image_encoder.blocks.")
    head_dim = shapes.of("image_encoder.blocks.0.attn.rel_pos_h", 2)[1]
    windows = []
    for i in range(depth):
        side = (shapes.of(f"image_encoder.blocks.{i}.attn.rel_pos_h", 2)[0] + 1) // 2
        windows.append(0 if side == grid else side)
    if embed_dim % head_dim:
        raise LayoutMismatch(f"heads of {head_dim} do not divide a width of {embed_dim}")
    return SamViTConfig(
        image_size=grid * patch,
        patch=patch,
        embed_dim=embed_dim,
        heads=embed_dim // head_dim,
        mlp_dim=shapes.of("image_encoder.blocks.0.mlp.lin1.weight", 2)[0],
        windows=tuple(windows),
        decoder=decoder,
    )


def _read(tensors: Mapping[str, Tensor]) -> SamViTConfig:
    shapes = Shapes(tensors, "SAM ViT")
    return read_vit(shapes, read_decoder(shapes))


class SamViT(SamDecoding):
    """The whole network; every key as in the official checkpoints."""

    family = "sam_vit"
    config: SamViTConfig
    image_encoder: ImageEncoder

    def __init__(self, config: SamViTConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = ImageEncoder(config)
        self.prompt_encoder = prompt_encoder(config.decoder, grid=config.grid, image_size=config.image_size)
        self.mask_decoder = mask_decoder(config.decoder)

    @property
    def grid(self) -> int:
        """Side of the embedding."""
        return self.config.grid

    def encode(self, pixels: Tensor, *, recompute: bool = False) -> Features:
        """The embedding alone."""
        return (self.image_encoder(pixels, recompute=recompute),)

    def affordable_side(self) -> int:
        """The model's own up to 256 pixels, else one whole attention window, so that no token is padding
        (14 patches of 16 pixels, 224, for the published sizes)."""
        config = self.config
        if config.image_size <= LARGEST_SIDE:
            return config.image_size
        window = max(config.windows)
        patches = window if window and window * config.patch <= LARGEST_SIDE else LARGEST_SIDE // config.patch
        return min(config.image_size, max(1, patches) * config.patch)

    def reduced(self, side: int) -> SamViT:
        """For ``side`` pixels, a multiple of the patch, at most its own side; tables that shrink are views."""
        config = self.config
        if side % config.patch or not config.patch <= side <= config.image_size:
            raise ValueError(f"the side must be a multiple of {config.patch} up to {config.image_size}, not {side}")
        if side == config.image_size:
            return self
        small = shell(self)
        small.config = replace(config, image_size=side)
        small.image_encoder = self.image_encoder.reduced(side // config.patch)
        small.prompt_encoder = shell(self.prompt_encoder)
        resized_prompts(self.prompt_encoder, small.prompt_encoder, grid=side // config.patch, side=side)
        return small


class ImageEncoder(nn.Module):
    """ViT with windowed and global attention: (B, 3, S, S) normalised pixels to (B, C, S/patch, S/patch)."""

    def __init__(self, config: SamViTConfig) -> None:
        super().__init__()
        dim, out = config.embed_dim, config.decoder.dim
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

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        """Embed a batch of padded pictures. ``recompute``: see ``SamNetwork.encode``."""
        return self.with_early(x, recompute=recompute)[0]

    def with_early(self, x: Tensor, *, recompute: bool = False) -> tuple[Tensor, Tensor]:
        """The embedding, and what the first global block gives (without one, the last), (B, C, g, g) both."""
        x = self.patch_embed(x) + self.pos_embed
        early: Tensor | None = None
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if early is None and not block.window:
                early = x
        early = x if early is None else early
        neck: Tensor = self.neck(x.permute(0, 3, 1, 2))
        return neck, early.permute(0, 3, 1, 2)

    def reduced(self, grid: int) -> ImageEncoder:
        """The same for fewer patches a side. Tables of positions and the relative positions of global blocks are
        cut, not interpolated, so that a token sees its neighbours at the distances it was trained with."""
        made = shell(self)
        first = (self.pos_embed.shape[1] - grid) // 2
        made.pos_embed = cut(self.pos_embed, (slice(None), *[slice(first, first + grid)] * 2))
        blocks = []
        for original in self.blocks:
            block: Any = shell(original)
            if not block.window:
                attention: Any = shell(block.attn)
                near = slice(attention.side - grid, attention.side + grid - 1)
                attention.rel_pos_h = cut(attention.rel_pos_h, (near,))
                attention.rel_pos_w = cut(attention.rel_pos_w, (near,))
                attention.side = grid
                block.attn = attention
            blocks.append(block)
        made.blocks = nn.ModuleList(blocks)
        return made


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
        x = x + self.attn(self.norm1(x))
        mlp: Tensor = self.mlp(self.norm2(x))
        return x + mlp


class _Attention(nn.Module):
    """Multi-head attention within squares of ``side`` tokens with decomposed relative positions.

    Where the squares do not divide the picture the last ones are padded with zeros, as in the official code. There
    the padding goes through both projections; here it does not, because what they make of it is known: the first
    makes its bias, and what the second would make is thrown away.
    """

    def __init__(self, dim: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to the same."""
        side, (h, w) = self.side, x.shape[1:3]
        qkv: Tensor = self.qkv(x)
        if h % side or w % side:
            bias = self.qkv.bias.to(qkv.dtype)
            padded = bias.expand(x.shape[0], h + -h % side, w + -w % side, -1).clone()
            padded[:, :h, :w] = qkv
            qkv = padded
        b, high, wide, _ = qkv.shape
        # (B, rows of squares, side, columns of squares, side, 3, heads, d)
        cut = qkv.view(b, high // side, side, wide // side, side, 3, self.heads, -1)
        # A copy, whatever the sizes: products with rows that lie apart would copy them again and again.
        turned = cut.permute(5, 0, 1, 3, 6, 2, 4, 7).contiguous()
        q, k, v = turned.view(3, -1, self.heads, side * side, cut.shape[-1]).unbind(0)
        out = attend(q, k, v, self.rel_pos_h, self.rel_pos_w)
        out = out.view(b, high // side, wide // side, self.heads, side, side, -1).permute(0, 1, 4, 2, 5, 3, 6)
        projected: Tensor = self.proj(out.reshape(b, high, wide, -1)[:, :h, :w])
        return projected


FAMILY = Family(
    id="sam_vit",
    recognises=has_vit,
    read=_read,
    config=SamViTConfig,
    network=SamViT,
)
