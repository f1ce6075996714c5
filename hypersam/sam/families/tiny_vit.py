"""SAM with a TinyViT encoder (Wu et al. 2022): MobileSAM, TinySAM, and SAM-HQ-Tiny with SAM-HQ's decoder.

The image encoder is written from the paper and the checkpoints' keys. Attention takes its biases from their table at
every call; the original keeps a copy made when it is switched to inference, which its own builders do before they
load the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hypersam.errors import LayoutMismatch
from hypersam.sam.families.decoder import (
    DecoderConfig,
    SamDecoding,
    mask_decoder,
    prompt_encoder,
    read_decoder,
    resized_prompts,
)
from hypersam.sam.families.sam_hq import HqDecoding, has_hq, hq_mask_decoder
from hypersam.sam.families.shapes import Shapes, checked, most_of
from hypersam.sam.families.windows import cut, joined
from hypersam.sam.family import Family
from hypersam.sam.network import LARGEST_SIDE, Features, shell
from hypersam.sam.official import LayerNorm2d

_has_tiny_vit = most_of("image_encoder.patch_embed.seq.", "image_encoder.layers.")
_IMAGE_SIZE = 1024
"""No tensor of a TinyViT depends on the size of its pictures, and every published one is for this."""
_STAGES = 4
PATCH = 16
"""Pixels of the picture a side of an embedding's pixel: 4 by the patch embedding, 2 by each of the first mergings."""
_LISTS = ("widths", "depths", "heads", "windows", "mlp_dims")


@dataclass(frozen=True)
class TinyViTConfig:
    """Sizes of a SAM with a TinyViT. One of ``widths`` and ``depths`` for each of four stages; one of ``heads`` and
    ``windows`` (sides, in tokens) for each of the last three, which attend, and of ``mlp_dims``, the hidden channels
    of their perceptrons; ``bottleneck``: those of the first stage's inverted bottlenecks."""

    image_size: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    windows: tuple[int, ...]
    bottleneck: int
    mlp_dims: tuple[int, ...]
    decoder: DecoderConfig

    @property
    def grid(self) -> int:
        """Side of the embedding."""
        return self.image_size // PATCH

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; ``from_dict`` reads it."""
        return asdict(self) | {name: list(getattr(self, name)) for name in _LISTS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TinyViTConfig:
        """The inverse of ``as_dict``. Raises ValueError where a field is missing, unknown or no positive number."""
        found = checked(cls, values, lists=_LISTS)
        for name in _LISTS:
            count = _STAGES if name in ("widths", "depths") else _STAGES - 1
            if len(found[name]) != count or 0 in found[name]:
                raise ValueError(f"{name} must be {count} positive numbers, not {list(found[name])}")
        if any(width % heads for width, heads in zip(found["widths"][1:], found["heads"], strict=True)):
            raise ValueError(f"the heads {found['heads']} do not divide the widths {found['widths'][1:]}")
        return cls(**found | {"decoder": DecoderConfig(**checked(DecoderConfig, found["decoder"]))})


def _read_tiny_vit(tensors: Mapping[str, Tensor], title: str) -> TinyViTConfig:
    shapes = Shapes(tensors, title)
    layer = "image_encoder.layers.{}."
    attention = layer + "blocks.0.attn.attention_biases"
    widths = [shapes.of("image_encoder.patch_embed.seq.2.c.weight", 4)[0]]
    widths += [shapes.of(layer.format(i) + "downsample.conv1.c.weight", 4)[0] for i in range(_STAGES - 1)]
    depths = [shapes.depth(layer.format(i) + "blocks.") for i in range(_STAGES)]
    tables = [shapes.of(attention.format(i), 2) for i in range(1, _STAGES)]
    for i, ((heads, _), width) in enumerate(zip(tables, widths[1:], strict=True), 1):
        if width % heads:
            raise LayoutMismatch(f"{heads} heads ({attention.format(i)!r}) do not divide a width of {width}")
    return TinyViTConfig(
        image_size=_IMAGE_SIZE,
        widths=tuple(widths),
        depths=tuple(depths),
        heads=tuple(heads for heads, _ in tables),
        # A bias for every pair of distances down and across.
        windows=tuple(math.isqrt(offsets) for _, offsets in tables),
        bottleneck=shapes.of(layer.format(0) + "blocks.0.conv1.c.weight", 4)[0],
        mlp_dims=tuple(shapes.of(layer.format(i) + "blocks.0.mlp.fc1.weight", 2)[0] for i in range(1, _STAGES)),
        decoder=read_decoder(shapes),
    )


class SamTinyViT(SamDecoding):
    """MobileSAM and TinySAM; every key as in the official checkpoints but the classifier's."""

    family = "sam_tiny_vit"
    config: TinyViTConfig
    image_encoder: TinyViT

    def __init__(self, config: TinyViTConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = TinyViT(config)
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
        """At most 256 pixels."""
        return min(self.config.image_size, LARGEST_SIDE)

    def reduced(self, side: int) -> SamTinyViT:
        """For ``side`` pixels, a multiple of 16 up to its own side: nothing but the prompts' scale depends on it."""
        config = self.config
        if side % PATCH or not PATCH <= side <= config.image_size:
            raise ValueError(f"the side must be a multiple of {PATCH} up to {config.image_size}, not {side}")
        if side == config.image_size:
            return self
        small = shell(self)
        small.config = replace(config, image_size=side)
        small.prompt_encoder = shell(self.prompt_encoder)
        resized_prompts(self.prompt_encoder, small.prompt_encoder, grid=side // PATCH, side=side)
        return small


class SamHqTinyViT(HqDecoding, SamTinyViT):
    """SAM-HQ-Tiny; its early features are what the first stage that attends hands on."""

    family = "sam_hq_tiny_vit"

    def __init__(self, config: TinyViTConfig) -> None:
        super().__init__(config)
        self.mask_decoder = hq_mask_decoder(config.decoder, config.widths[2])

    def encode(self, pixels: Tensor, *, recompute: bool = False) -> Features:
        """Embedding and fine features."""
        embedding, early = self.image_encoder.with_early(pixels, recompute=recompute)
        embedding = embedding.float()
        return embedding, self.mask_decoder.fine_features(embedding, early.float())


class TinyViT(nn.Module):
    """(B, 3, S, S) normalised pixels to (B, C, S / 16, S / 16): a stage of convolutions, three of attention."""

    def __init__(self, config: TinyViTConfig) -> None:
        super().__init__()
        first, out = config.widths[0], config.decoder.dim
        self.patch_embed = _PatchEmbed(first)
        self.layers = nn.ModuleList(_Stage(config, i) for i in range(_STAGES))
        self.neck = nn.Sequential(
            nn.Conv2d(config.widths[-1], out, 1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            LayerNorm2d(out),
        )

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        """Embed a batch of padded pictures. ``recompute``: see ``SamNetwork.encode``."""
        return self.with_early(x, recompute=recompute)[0]

    def with_early(self, x: Tensor, *, recompute: bool = False) -> tuple[Tensor, Tensor]:
        """The embedding, and what the second stage hands on, (B, C, S / 16, S / 16) both."""
        x = self.patch_embed(x)
        early = x
        for i, stage in enumerate(self.layers):
            x = stage(x, recompute)
            early = x if i == 1 else early
        neck: Tensor = self.neck(x)
        return neck, early


class _ConvNorm(nn.Module):
    """Convolution without a bias, then batch normalisation."""

    def __init__(self, inner: int, outer: int, side: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(inner, outer, side, stride, padding=side // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outer)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.bn(self.c(x))
        return normed


class _PatchEmbed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            _ConvNorm(3, width // 2, 3, stride=2), nn.GELU(), _ConvNorm(width // 2, width, 3, stride=2)
        )

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.seq(x)
        return patches


class _Stage(nn.Module):
    """Blocks over (B, C, H, W), then all but in the last stage a merging to the next width; only the first two
    mergings halve the sides, for a SAM wants its embedding at a sixteenth of the picture."""

    def __init__(self, config: TinyViTConfig, number: int) -> None:
        super().__init__()
        width = config.widths[number]
        blocks: list[nn.Module] = []
        for _ in range(config.depths[number]):
            if number:
                heads, window = config.heads[number - 1], config.windows[number - 1]
                blocks.append(_Block(width, heads, window, config.mlp_dims[number - 1]))
            else:
                blocks.append(_InvertedBottleneck(width, config.bottleneck))
        self.blocks = nn.ModuleList(blocks)
        self.downsample: nn.Module | None = None
        if number + 1 < _STAGES:
            self.downsample = _Merging(width, config.widths[number + 1], stride=2 if number < 2 else 1)

    def forward(self, x: Tensor, recompute: bool) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x if self.downsample is None else self.downsample(x)


class _InvertedBottleneck(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(width, hidden, 1)
        self.conv2 = _ConvNorm(hidden, hidden, 3, groups=hidden)
        self.conv3 = _ConvNorm(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.conv2(F.gelu(self.conv1(x))))
        return F.gelu(x + self.conv3(inner))


class _Merging(nn.Module):
    def __init__(self, inner: int, outer: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = _ConvNorm(inner, outer, 1)
        self.conv2 = _ConvNorm(outer, outer, 3, stride=stride, groups=outer)
        self.conv3 = _ConvNorm(outer, outer, 1)

    def forward(self, x: Tensor) -> Tensor:
        merged: Tensor = self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))
        return merged


class _Block(nn.Module):
    """Attention within windows, a depthwise convolution, a perceptron; (B, C, H, W) in and out."""

    def __init__(self, width: int, heads: int, window: int, mlp_dim: int) -> None:
        super().__init__()
        self.window = window
        self.attn = _Attention(width, heads, window)
        self.local_conv = _ConvNorm(width, width, 3, groups=width)
        self.mlp = _Perceptron(width, mlp_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._windowed(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        tokens = self.local_conv(x).permute(0, 2, 3, 1)
        tokens = tokens + self.mlp(tokens)
        result: Tensor = tokens.permute(0, 3, 1, 2)
        return result

    def _windowed(self, x: Tensor) -> Tensor:
        """(B, H, W, C), cut into windows; the last ones are padded with zeros before they are normalised."""
        _, h, w, _ = x.shape
        windows, layout = cut(x, self.window)
        attended = self.attn(windows.flatten(1, 2)).view(windows.shape)
        return joined(attended, layout)[:, :h, :w]


class _Attention(nn.Module):
    """Multi-head attention over a window of tokens (B, N, C), with a learned bias for every distance."""

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.side = heads, side
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, side * side))

    def forward(self, x: Tensor) -> Tensor:
        b, tokens, width = x.shape
        # Each head's query, key and value lie side by side.
        qkv = self.qkv(self.norm(x)).view(b, tokens, self.heads, 3, width // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4).unbind(0)
        bias = self.attention_biases[:, _distances(self.side, self.attention_biases.device)].to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])
        projected: Tensor = self.proj(attended.transpose(1, 2).reshape(b, tokens, width))
        return projected


@lru_cache(maxsize=32)
def _distances(side: int, device: torch.device) -> Tensor:
    """(N, N) int64, N = side²: which bias a pair of tokens takes, |rows apart| * side + |columns apart|."""
    with torch.inference_mode(False):
        steps = torch.arange(side, device=device)
        apart = (steps[:, None] - steps).abs()
        index = apart[:, None, :, None] * side + apart[None, :, None, :]
        return index.reshape(side * side, side * side)


class _Perceptron(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.fc2(F.gelu(self.fc1(self.norm(x))))
        return projected


def _classifier(key: str) -> bool:
    return key.startswith(("image_encoder.norm_head.", "image_encoder.head."))


FAMILY = Family(
    id="sam_tiny_vit",
    recognises=lambda keys: _has_tiny_vit(keys) and not has_hq(keys),
    read=lambda tensors: _read_tiny_vit(tensors, "MobileSAM or TinySAM"),
    config=TinyViTConfig,
    network=SamTinyViT,
    carries=_classifier,
)

HQ_FAMILY = Family(
    id="sam_hq_tiny_vit",
    recognises=lambda keys: _has_tiny_vit(keys) and has_hq(keys),
    read=lambda tensors: _read_tiny_vit(tensors, "SAM-HQ-Tiny"),
    config=TinyViTConfig,
    network=SamHqTinyViT,
    carries=_classifier,
)
