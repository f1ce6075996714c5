"""EfficientSAM's prompt encoder and mask decoder (Xiong et al. 2023), asked by points alone.

A box is two points with labels of their own, every prompt is filled up to six points, and there is no mask input and
no embedding of background points. The two-way transformer differs from SAM's: its first self-attention keeps the
residual, positions are added to the values too, and its MLPs are GELU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hypersam.sam.families.decoder import HEADS
from hypersam.sam.families.mask_decoder import RemembersPositions, plus_tokens, to_pixels
from hypersam.sam.network import Prompts
from hypersam.sam.official import PositionEmbeddingRandom

if TYPE_CHECKING:
    from hypersam.sam.families.efficient_sam import EfficientSamConfig

POINTS = 6
"""Of every prompt: what is missing is filled up with points that say so. In no checkpoint."""
_FILLING, _INSIDE, _TOP_LEFT, _BOTTOM_RIGHT = -1, 1, 2, 3


class PromptEncoder(RemembersPositions, nn.Module):
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

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the embedding, whose cells' middles have positions."""
        return self.grid, self.grid


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


class MaskDecoder(nn.Module):
    """SAM's decoder without a dense prompt; GELU and one group of norms where SAM normalises by pixel."""

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
        """``embedding`` (1, C, g, g), its ``positions`` (1, g·g, C) and ``prompt_tokens`` (B, N, C) to masks
        (B, M, s, s) and their IoU (B, M)."""
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
        # One for all prompts before the first layer, (1, N, C), and one a prompt after it, (B, N, C).
        queries, keys = tokens, embedding.flatten(2).transpose(1, 2)
        for layer in self.layers:
            queries, keys = layer(queries, keys, tokens, positions)
        found = to_pixels(self.final_attn_token_to_image, HEADS, queries + tokens, keys + positions, keys)
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
        placed = keys + where
        queries = self.norm2(queries + to_pixels(self.cross_attn_token_to_image, HEADS, queries + tokens, placed, keys))
        queries = self.norm3(queries + self.mlp(queries))
        told = self.cross_attn_image_to_token
        keys = self.norm4(plus_tokens(keys, told, HEADS, placed, queries + tokens, queries))
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
