"""EfficientSAM (Xiong et al. 2023): a plain ViT that was taught on masked pictures, and a decoder asked by points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hypersam.errors import LayoutMismatch
from hypersam.sam.families.decoder import HEADS
from hypersam.sam.families.efficient_sam_decoder import MaskDecoder, PromptEncoder
from hypersam.sam.families.sam_vit import has_vit
from hypersam.sam.families.shapes import Shapes, checked, most_of
from hypersam.sam.family import Family
from hypersam.sam.network import LARGEST_SIDE, Features, Prompts, SamNetwork, shell
from hypersam.sam.official import LayerNorm2d
from hypersam.sam.rules import EfficientSamRules

_has_own_decoder = most_of(
    "prompt_encoder.bbox_top_left_embeddings.",
    "prompt_encoder.bbox_bottom_right_embeddings.",
    "prompt_encoder.invalid_points.",
    "mask_decoder.final_output_upscaling_layers.",
)
_INPUT = 1024
"""Side of the input in pixels. The table of positions has the size of the pictures of the first training (224), and
is stretched to the input's, which is in no checkpoint."""
_HEAD = 64
"""Channels of an encoder's head, in no checkpoint either."""


@dataclass(frozen=True)
class EfficientSamConfig:
    """Sizes of an EfficientSAM. ``table``: side of the table of positions in patches; ``dim``: channels of the
    embedding and of the prompts; ``upscaling``: channels after each doubling of the embedding, down to the masks."""

    image_size: int
    patch: int
    table: int
    embed_dim: int
    heads: int
    depth: int
    mlp_dim: int
    dim: int
    multimask_outputs: int
    decoder_depth: int
    decoder_mlp_dim: int
    iou_depth: int
    iou_hidden: int
    upscaling: tuple[int, ...]

    @property
    def grid(self) -> int:
        """Side of the patch grid and of the embedding."""
        return self.image_size // self.patch

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; ``from_dict`` reads it."""
        return asdict(self) | {"upscaling": list(self.upscaling)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EfficientSamConfig:
        """The inverse of ``as_dict``. Raises ValueError where a field is missing, unknown or no positive number."""
        return cls(**checked(cls, values, lists=("upscaling",)))


def _read(tensors: Mapping[str, Tensor]) -> EfficientSamConfig:
    shapes = Shapes(tensors, "EfficientSAM")
    embed_dim, _, patch, _ = shapes.of("image_encoder.patch_embed.proj.weight", 4)
    positions = shapes.of("image_encoder.pos_embed", 3)[1] - 1
    table = math.isqrt(max(positions, 0))
    if not table or table * table != positions:
        raise LayoutMismatch(f"'image_encoder.pos_embed' has {positions} positions and one more; a square was expected")
    if embed_dim % _HEAD:
        raise LayoutMismatch(f"heads of {_HEAD} channels do not divide a width of {embed_dim}")
    if _INPUT % patch:
        raise LayoutMismatch(f"patches of {patch} pixels do not divide an input of {_INPUT}")
    dim = shapes.of("prompt_encoder.bbox_top_left_embeddings.weight", 2)[1]
    if dim % (2 * HEADS):
        raise LayoutMismatch(f"an embedding of {dim} channels is no multiple of {2 * HEADS}, twice the decoder's heads")
    levels = shapes.depth("mask_decoder.final_output_upscaling_layers.")
    return EfficientSamConfig(
        image_size=_INPUT,
        patch=patch,
        table=table,
        embed_dim=embed_dim,
        heads=embed_dim // _HEAD,
        depth=shapes.depth("image_encoder.blocks."),
        mlp_dim=shapes.of("image_encoder.blocks.0.mlp.fc1.weight", 2)[0],
        dim=dim,
        multimask_outputs=shapes.of("mask_decoder.mask_tokens.weight", 2)[0] - 1,
        decoder_depth=shapes.depth("mask_decoder.transformer.layers."),
        decoder_mlp_dim=shapes.of("mask_decoder.transformer.layers.0.mlp.fc.weight", 2)[1],
        iou_depth=shapes.depth("mask_decoder.iou_prediction_head.layers."),
        iou_hidden=shapes.of("mask_decoder.iou_prediction_head.fc.weight", 2)[1],
        upscaling=tuple(
            shapes.of(f"mask_decoder.final_output_upscaling_layers.{i}.0.weight", 4)[1] for i in range(levels)
        ),
    )


class EfficientSam(SamNetwork):
    """The whole network; every key as in the official checkpoints."""

    family = "efficient_sam"
    rules = EfficientSamRules()
    config: EfficientSamConfig
    image_encoder: _ImageEncoder

    def __init__(self, config: EfficientSamConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = _ImageEncoder(config)
        self.prompt_encoder = PromptEncoder(config)
        self.mask_decoder = MaskDecoder(config)

    @property
    def low_res(self) -> int:
        """Each level of the decoder doubles the embedding's side."""
        return self.config.grid << len(self.config.upscaling)

    def encode(self, pixels: Tensor, *, recompute: bool = False) -> Features:
        """The embedding alone."""
        return (self.image_encoder(pixels, recompute=recompute),)

    def decode(self, features: Features, prompts: Prompts, *, multimask: bool) -> tuple[Tensor, Tensor]:
        """Three masks with ``multimask``, else the one that has a token of its own."""
        masks, iou = self.every_mask(features, prompts)
        chosen = slice(1, None) if multimask else slice(0, 1)
        return masks[:, chosen], iou[:, chosen]

    def every_mask(self, features: Features, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """The single mask, then the three. Raises ValueError for more than six points or for a mask input."""
        if prompts.masks is not None:
            raise ValueError("EfficientSAM takes no mask input")
        tokens = self.prompt_encoder(prompts)
        answer: tuple[Tensor, Tensor] = self.mask_decoder(features[0], self.prompt_encoder.positions(), tokens)
        return answer

    def affordable_side(self) -> int:
        """The model's own up to 256 pixels, else the nearest multiple of the patch to them."""
        config = self.config
        return min(config.image_size, max(1, LARGEST_SIDE // config.patch) * config.patch)

    def reduced(self, side: int) -> EfficientSam:
        """For ``side`` pixels, a multiple of the patch, at most its own side."""
        config = self.config
        if side % config.patch or not config.patch <= side <= config.image_size:
            raise ValueError(f"the side must be a multiple of {config.patch} up to {config.image_size}, not {side}")
        if side == config.image_size:
            return self
        small = shell(self)
        small.config = replace(config, image_size=side)
        # The stretched table is cut, so that a patch sees its neighbours at the distances it was trained with.
        small.image_encoder = shell(self.image_encoder)
        small.image_encoder.grid = side // config.patch
        small.prompt_encoder = shell(self.prompt_encoder)
        small.prompt_encoder.side, small.prompt_encoder.grid = side, side // config.patch
        return small


class _ImageEncoder(nn.Module):
    """ViT of global attention: (B, 3, S, S) normalised pixels to (B, C, S/patch, S/patch)."""

    def __init__(self, config: EfficientSamConfig) -> None:
        super().__init__()
        width, out = config.embed_dim, config.dim
        self.full_grid = self.grid = config.grid
        self.table = config.table
        self.patch_embed = _PatchEmbed(config.patch, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.table**2 + 1, width))
        self.blocks = nn.ModuleList(_Block(width, config.heads, config.mlp_dim) for _ in range(config.depth))
        self.neck = nn.Sequential(
            nn.Conv2d(width, out, 1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            LayerNorm2d(out),
        )

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = x + self._positions().to(x.dtype)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        x = x.transpose(1, 2).unflatten(2, (self.grid, self.grid))
        neck: Tensor = self.neck(x)
        return neck

    def _positions(self) -> Tensor:
        """(1, grid², C): the table without the class token's entry, stretched to the grid of the full input, of which
        a reduced network takes the middle. In fp32 or better, as half precision would blur it."""
        table = self.pos_embed[:, 1:]
        table = table.to(torch.promote_types(table.dtype, torch.float32))
        if self.table != self.full_grid:
            plane = table.transpose(1, 2).unflatten(2, (self.table, self.table))
            plane = F.interpolate(plane, (self.full_grid, self.full_grid), mode="bicubic", align_corners=False)
            table = plane.flatten(2).transpose(1, 2)
        if self.grid != self.full_grid:
            first = (self.full_grid - self.grid) // 2
            middle = slice(first, first + self.grid)
            table = table.unflatten(1, (self.full_grid, self.full_grid))[:, middle, middle].flatten(1, 2)
        return table


class _PatchEmbed(nn.Module):
    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)


class _Block(nn.Module):
    """Transformer block over (B, N, C)."""

    def __init__(self, width: int, heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _SelfAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _Mlp(width, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        mlp: Tensor = self.mlp(self.norm2(x))
        return x + mlp


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return projected


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


FAMILY = Family(
    id="efficient_sam",
    recognises=lambda keys: has_vit(keys) and _has_own_decoder(keys),
    read=_read,
    config=EfficientSamConfig,
    network=EfficientSam,
)
