"""EfficientSAM (Xiong et al. 2023): a plain ViT that saw masked pictures, and a decoder asked by points alone.

A box is two points with labels of their own, every prompt is filled up to six points, and there is no mask input and
no embedding of background points. The two-way transformer differs from SAM's: its first self-attention keeps the
residual, positions are added to the values too, and its MLPs are GELU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hypersam.errors import LayoutMismatch
from hypersam.sam.families.decoder import HEADS
from hypersam.sam.families.shapes import Shapes, checked
from hypersam.sam.family import Family
from hypersam.sam.network import LARGEST_SIDE, Features, Prompts, SamNetwork, shell
from hypersam.sam.rules import STRETCHED

MARK = "prompt_encoder.bbox_top_left_embeddings.weight"
POINTS = 6
"""Of every prompt: what is missing is filled up with points that say so. In no checkpoint."""
_INPUT = 1024
"""Side of the input in pixels. The table of positions has the size of the pictures of the first training (224), and
is stretched to the input's, which is in no checkpoint."""
_HEAD = 64
"""Channels of an encoder's head, in no checkpoint either."""
_FILLING, _INSIDE, _TOP_LEFT, _BOTTOM_RIGHT = -1, 1, 2, 3


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
    dim = shapes.of(MARK, 2)[1]
    if dim % (2 * HEADS):
        raise LayoutMismatch(f"an embedding of {dim} channels is no multiple of {2 * HEADS}, twice the decoder's heads")
    levels = shapes.count("mask_decoder.final_output_upscaling_layers.{}.0.weight")
    return EfficientSamConfig(
        image_size=_INPUT,
        patch=patch,
        table=table,
        embed_dim=embed_dim,
        heads=embed_dim // _HEAD,
        depth=shapes.count("image_encoder.blocks.{}.attn.qkv.weight"),
        mlp_dim=shapes.of("image_encoder.blocks.0.mlp.fc1.weight", 2)[0],
        dim=dim,
        multimask_outputs=shapes.of("mask_decoder.mask_tokens.weight", 2)[0] - 1,
        decoder_depth=shapes.count("mask_decoder.transformer.layers.{}.norm1.weight"),
        decoder_mlp_dim=shapes.of("mask_decoder.transformer.layers.0.mlp.fc.weight", 2)[1],
        iou_depth=shapes.count("mask_decoder.iou_prediction_head.layers.{}.0.weight"),
        iou_hidden=shapes.of("mask_decoder.iou_prediction_head.fc.weight", 2)[1],
        upscaling=tuple(
            shapes.of(f"mask_decoder.final_output_upscaling_layers.{i}.0.weight", 4)[1] for i in range(levels)
        ),
    )


class EfficientSam(SamNetwork):
    """The whole network; every key as in the official checkpoints."""

    family = "efficient_sam"
    rules = STRETCHED
    config: EfficientSamConfig
    image_encoder: _ImageEncoder

    def __init__(self, config: EfficientSamConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = _ImageEncoder(config)
        self.prompt_encoder = _PromptEncoder(config)
        self.mask_decoder = _MaskDecoder(config)

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
        answer: tuple[Tensor, Tensor] = self.mask_decoder(features[0], self.prompt_encoder.grid_positions(), tokens)
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


class _PromptEncoder(nn.Module):
    """Points and corners of boxes to tokens (B, 6, C)."""

    def __init__(self, config: EfficientSamConfig) -> None:
        super().__init__()
        self.side, self.grid = config.image_size, config.grid
        self.pe_layer = PositionEmbeddingRandom(config.dim // 2)
        self.invalid_points = nn.Embedding(1, config.dim)
        self.point_embeddings = nn.Embedding(1, config.dim)
        self.bbox_top_left_embeddings = nn.Embedding(1, config.dim)
        self.bbox_bottom_right_embeddings = nn.Embedding(1, config.dim)

    def forward(self, prompts: Prompts) -> Tensor:
        points, labels = _as_points(prompts)
        missing = POINTS - points.shape[1]
        if missing < 0:
            raise ValueError(f"EfficientSAM takes at most {POINTS} points (a box counts as two), got {points.shape[1]}")
        points = F.pad(points, (0, 0, 0, missing), value=-1.0)
        labels = F.pad(labels, (0, missing), value=_FILLING)
        tokens: Tensor = self.pe_layer.forward_with_coords(points + 0.5, (self.side, self.side))
        for label, embedding in (
            (_FILLING, self.invalid_points),
            (_INSIDE, self.point_embeddings),
            (_TOP_LEFT, self.bbox_top_left_embeddings),
            (_BOTTOM_RIGHT, self.bbox_bottom_right_embeddings),
        ):
            tokens = tokens + embedding.weight * (labels == label)[..., None]
        return tokens

    def grid_positions(self) -> Tensor:
        """(1, C, g, g): the same encoding of the middles of the embedding's cells."""
        encoded: Tensor = self.pe_layer((self.grid, self.grid))
        return encoded[None]


def _as_points(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Coordinates (B, N, 2) and labels (B, N): the points, then a box's two corners."""
    coordinates, labels = [], []
    if prompts.points is not None:
        coordinates.append(prompts.points[0])
        labels.append(prompts.points[1])
    if prompts.boxes is not None:
        corners = prompts.boxes.view(-1, 2, 2)
        coordinates.append(corners)
        labels.append(torch.tensor([[_TOP_LEFT, _BOTTOM_RIGHT]], device=corners.device).expand(corners.shape[0], 2))
    return torch.cat(coordinates, 1), torch.cat(labels, 1)


class _MaskDecoder(nn.Module):
    def __init__(self, config: EfficientSamConfig) -> None:
        super().__init__()
        dim, masks = config.dim, config.multimask_outputs + 1
        self.transformer = _TwoWayTransformer(config)
        self.iou_token = nn.Embedding(1, dim)
        self.mask_tokens = nn.Embedding(masks, dim)
        channels = (dim, *config.upscaling)
        last = len(config.upscaling) - 1
        self.final_output_upscaling_layers = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(channels[i], channels[i + 1], 2, stride=2),
                nn.GroupNorm(1, channels[i + 1]) if i < last else nn.Identity(),
                nn.GELU(),
            )
            for i in range(len(config.upscaling))
        )
        self.output_hypernetworks_mlps = nn.ModuleList(_Head(dim, dim, channels[-1], 2) for _ in range(masks))
        self.iou_prediction_head = _Head(dim, config.iou_hidden, masks, config.iou_depth)

    def forward(self, embedding: Tensor, positions: Tensor, prompt_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``embedding`` (1, C, g, g), ``prompt_tokens`` (B, N, C) to masks (B, M, s, s) and their IoU (B, M)."""
        batch = prompt_tokens.shape[0]
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(batch, -1, -1)
        tokens, image = self.transformer(embedding, positions, torch.cat([own, prompt_tokens], 1))
        image = image.transpose(1, 2).unflatten(2, embedding.shape[-2:])
        for level in self.final_output_upscaling_layers:
            image = level(image)
        kernels = torch.stack([mlp(tokens[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)], 1)
        masks = (kernels @ image.flatten(2)).unflatten(2, image.shape[-2:])
        return masks, self.iou_prediction_head(tokens[:, 0])


class _Head(nn.Module):
    """An MLP whose last layer stands apart, as the keys have it; GELU between."""

    def __init__(self, width: int, hidden: int, out: int, depth: int) -> None:
        super().__init__()
        sizes = (width, *[hidden] * depth)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(sizes[i], sizes[i + 1]), nn.GELU()) for i in range(depth))
        self.fc = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fc(x)  # type: ignore[no-any-return]


class _TwoWayTransformer(nn.Module):
    """Tokens attend to the embedding and the embedding to the tokens."""

    def __init__(self, config: EfficientSamConfig) -> None:
        super().__init__()
        dim = config.dim
        self.layers = nn.ModuleList(
            _TwoWayBlock(dim, config.decoder_mlp_dim, first=i == 0) for i in range(config.decoder_depth)
        )
        self.final_attn_token_to_image = _Attention(dim, dim // 2)
        self.norm_final_attn = nn.LayerNorm(dim)

    def forward(self, embedding: Tensor, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        image, where = (t.flatten(2).transpose(1, 2) for t in (embedding, positions))
        queries, keys = tokens, image.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, where)
        found = self.final_attn_token_to_image(queries + tokens, keys + where, keys)
        return self.norm_final_attn(queries + found), keys


class _TwoWayBlock(nn.Module):
    def __init__(self, dim: int, mlp_dim: int, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = _Attention(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.cross_attn_token_to_image = _Attention(dim, dim // 2)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = _Head(dim, mlp_dim, dim, 1)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.cross_attn_image_to_token = _Attention(dim, dim // 2)

    def forward(self, queries: Tensor, keys: Tensor, tokens: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        if not self.first:
            queries = queries + tokens
        queries = self.norm1(queries + self.self_attn(queries, queries, queries))
        queries = self.norm2(queries + self.cross_attn_token_to_image(queries + tokens, keys + where, keys))
        queries = self.norm3(queries + self.mlp(queries))
        keys = self.norm4(keys + self.cross_attn_image_to_token(keys + where, queries + tokens, queries))
        return queries, keys


class _Attention(nn.Module):
    """Multi-head attention within ``inner`` channels."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.q_proj = nn.Linear(dim, inner)
        self.k_proj = nn.Linear(dim, inner)
        self.v_proj = nn.Linear(dim, inner)
        self.out_proj = nn.Linear(inner, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (
            project(t).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for project, t in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        )
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


FAMILY = Family(
    id="efficient_sam",
    recognises=lambda tensors: MARK in tensors,
    read=_read,
    config=EfficientSamConfig,
    network=EfficientSam,
)
