"""EdgeSAM (Zhou et al. 2023): SAM's decoder behind RepViT (Wang et al. 2023), convolutions alone.

Written from the two papers and the keys of the checkpoint. RepViT's blocks are trained with parallel branches, each
with a batch norm; for inference they are one convolution (Ding et al. 2021), and here they are joined as they
run: the weights of a checkpoint stay under their keys, and activations pass through memory once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
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
from hypersam.sam.families.shapes import Shapes, checked, most_of
from hypersam.sam.family import Family
from hypersam.sam.network import LARGEST_SIDE, Features, Prompts, shell
from hypersam.sam.official import LayerNorm2d

STRIDE = 32
"""Pixels a side of a cell of the deepest features; the embedding has twice as many cells each way."""
_STAGES = 4
_INPUT = 1024
"""Side of the input in pixels; it is in no checkpoint."""
_UPSAMPLING = "bilinear"
"""Of the deepest features onto the embedding's grid. Neither keys nor shapes tell it."""
_STABILITY_OFFSET = 1.0
"""Logits by which the threshold is raised and lowered for the stability score."""


@dataclass(frozen=True)
class EdgeSamConfig:
    """Sizes of an EdgeSAM. By stage: ``widths``, ``depths`` (blocks that keep the resolution) and ``squeezes``
    (hidden channels of squeeze-and-excitation, 0 where a stage has none). ``excited``: the numbers of the blocks
    that have it, all blocks counted from 1. ``mixers`` (hidden channels of channel mixers) goes by stage too, 0 for a
    first stage without blocks."""

    image_size: int
    stem: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    squeezes: tuple[int, ...]
    excited: tuple[int, ...]
    mixers: tuple[int, ...]
    decoder: DecoderConfig

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; ``from_dict`` reads it."""
        return asdict(self) | {name: list(getattr(self, name)) for name in _LISTS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EdgeSamConfig:
        """The inverse of ``as_dict``. Raises ValueError where a field is missing, unknown or no positive number."""
        found = checked(cls, values, lists=_LISTS)
        if any(len(found[name]) != _STAGES for name in ("widths", "depths", "squeezes", "mixers")):
            raise ValueError(f"widths, depths, squeezes and mixers must have {_STAGES} stages each")
        return cls(**found | {"decoder": DecoderConfig(**checked(DecoderConfig, found["decoder"]))})


_LISTS = ("widths", "depths", "squeezes", "excited", "mixers")


def _read(tensors: Mapping[str, Tensor]) -> EdgeSamConfig:
    shapes = Shapes(tensors, "EdgeSAM")
    widths = [shapes.of("image_encoder.features.0.2.c.weight", 4)[0]]
    depths, squeezes, mixers, excited = [0], [0], [0], []
    for number, keys in enumerate(shapes.layers("image_encoder.features.")[1:], 1):
        mixer = f"image_encoder.features.{number}.token_mixer"
        # A stage begins with the block that halves the resolution.
        if any(key.startswith("token_mixer.2.") for key in keys):
            widths.append(shapes.of(f"{mixer}.2.c.weight", 4)[0])
            depths.append(0)
            squeezes.append(0)
            mixers.append(0)
        else:
            depths[-1] += 1
        if not mixers[-1]:
            mixers[-1] = shapes.of(f"image_encoder.features.{number}.channel_mixer.m.0.c.weight", 4)[0]
        if any(key.startswith("token_mixer.1.") for key in keys):
            squeezes[-1] = shapes.of(f"{mixer}.1.fc1.weight", 4)[0]
            excited.append(number)
    if len(widths) != _STAGES:
        raise LayoutMismatch(f"an EdgeSAM encoder has {_STAGES} stages, this one {len(widths)}")
    return EdgeSamConfig(
        image_size=_INPUT,
        stem=shapes.of("image_encoder.features.0.0.c.weight", 4)[0],
        widths=tuple(widths),
        depths=tuple(depths),
        squeezes=tuple(squeezes),
        excited=tuple(excited),
        mixers=tuple(mixers),
        decoder=read_decoder(shapes),
    )


def _carries(key: str) -> bool:
    """A head that proposes regions in training is not asked for masks."""
    return any(part.startswith("rpn") for part in key.split("."))


class EdgeSam(SamDecoding):
    """The whole network; every key as in the official checkpoints."""

    family = "edge_sam"
    config: EdgeSamConfig
    image_encoder: _RepViT

    def __init__(self, config: EdgeSamConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = _RepViT(config)
        self.prompt_encoder = prompt_encoder(config.decoder, grid=self.grid, image_size=config.image_size)
        self.mask_decoder = mask_decoder(config.decoder)

    @property
    def grid(self) -> int:
        """Side of the embedding."""
        return 2 * (self.config.image_size // STRIDE)

    def encode(self, pixels: Tensor, *, recompute: bool = False) -> Features:
        """The embedding alone."""
        return (self.image_encoder(pixels, recompute=recompute),)

    def decode(self, features: Features, prompts: Prompts, *, multimask: bool) -> tuple[Tensor, Tensor]:
        """As SAM, but scored by stability: the distillation teaches masks, and no predicted IoU of its own."""
        masks, _ = super().decode(features, prompts, multimask=multimask)
        return masks, stability(masks)

    def affordable_side(self) -> int:
        """The model's own up to 256 pixels, else 256."""
        return min(self.config.image_size, LARGEST_SIDE)

    def reduced(self, side: int) -> EdgeSam:
        """For ``side`` pixels, a multiple of 32, at most its own side; convolutions do not mind."""
        if side % STRIDE or not STRIDE <= side <= self.config.image_size:
            raise ValueError(f"the side must be a multiple of {STRIDE} up to {self.config.image_size}, not {side}")
        if side == self.config.image_size:
            return self
        small = shell(self)
        small.config = replace(self.config, image_size=side)
        small.prompt_encoder = shell(self.prompt_encoder)
        resized_prompts(self.prompt_encoder, small.prompt_encoder, grid=small.grid, side=side)
        return small


def stability(logits: Tensor) -> Tensor:
    """How little a mask depends on its threshold (Kirillov et al. 2023): the IoU of the masks at a threshold one
    logit higher and one lower. (…, h, w) to (…), 0 where even the larger is empty."""
    inner = (logits > _STABILITY_OFFSET).sum((-2, -1), dtype=torch.float32)
    outer = (logits > -_STABILITY_OFFSET).sum((-2, -1), dtype=torch.float32)
    return inner / outer.clamp_min(1)


class _RepViT(nn.Module):
    """(B, 3, S, S) normalised pixels to (B, C, S/16, S/16): the last two stages' features, projected and added."""

    def __init__(self, config: EdgeSamConfig) -> None:
        super().__init__()
        out = config.decoder.dim
        features: list[nn.Module] = [_Stem(config.stem, config.widths[0])]
        width = config.widths[0]
        ends = []
        for stage, depth in enumerate(config.depths):
            for step in range(depth + (stage > 0)):
                squeeze = config.squeezes[stage] if len(features) in config.excited else 0
                narrow, width = width, config.widths[stage]
                halves = stage > 0 and step == 0
                features.append(_Block(narrow, width, config.mixers[stage], squeeze, halves=halves))
            ends.append(len(features) - 1)
        self.features = nn.ModuleList(features)
        self.shallow = ends[-2]
        self.fuse_stage2 = nn.Conv2d(config.widths[-2], out, 1, bias=False)
        self.fuse_stage3 = _Deep(config.widths[-1], out)
        self.neck = nn.Sequential(
            nn.Conv2d(out, out, 1, bias=False),
            LayerNorm2d(out),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            LayerNorm2d(out),
        )

    def forward(self, x: Tensor, *, recompute: bool = False) -> Tensor:
        shallow = x
        for i, block in enumerate(self.features):
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
            if i == self.shallow:
                shallow = x
        deep = F.interpolate(self.fuse_stage3.op_list[0](x), shallow.shape[-2:], mode=_UPSAMPLING, align_corners=False)
        neck: Tensor = self.neck(self.fuse_stage2(shallow) + deep)
        return neck


class _Deep(nn.Module):
    """The projection of the deepest features, under the key that it has in the checkpoint."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.op_list = nn.ModuleList([nn.Conv2d(width, out, 1, bias=False)])


class _ConvNorm(nn.Module):
    """A convolution without bias and a batch norm with its fixed statistics, run as one convolution."""

    def __init__(self, narrow: int, wide: int, kernel: int = 1, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.c = nn.Conv2d(narrow, wide, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(wide)

    def joined(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the one convolution, in fp32 or better."""
        bn = self.bn
        wide = torch.promote_types(self.c.weight.dtype, torch.float32)
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = bn.weight.to(wide) * torch.rsqrt(bn.running_var.to(wide) + bn.eps)
        weight = self.c.weight.to(wide) * scale[:, None, None, None]
        return weight, bn.bias.to(wide) - bn.running_mean.to(wide) * scale

    def forward(self, x: Tensor) -> Tensor:
        conv: nn.Module = self.c
        if not isinstance(conv, nn.Conv2d):  # its weight is compressed: there is none to join the norm with
            normed: Tensor = self.bn(conv(x))
            return normed
        return _convolved(conv, x, *self.joined())


def _convolved(like: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), like.stride, like.padding, groups=like.groups)


class _Stem(nn.Sequential):
    """To a quarter of the side."""

    def __init__(self, narrow: int, wide: int) -> None:
        super().__init__(_ConvNorm(3, narrow, 3, stride=2), nn.GELU(), _ConvNorm(narrow, wide, 3, stride=2))


class _Block(nn.Module):
    """A token mixer within channels, then a channel mixer within pixels."""

    def __init__(self, narrow: int, wide: int, hidden: int, squeeze: int, *, halves: bool) -> None:
        super().__init__()
        excitation: nn.Module = _SqueezeExcite(narrow, squeeze) if squeeze else nn.Identity()
        mixer: list[nn.Module] = [
            _ConvNorm(narrow, narrow, 3, stride=2, groups=narrow) if halves else _Branches(narrow),
            excitation,
        ]
        if halves:
            mixer.append(_ConvNorm(narrow, wide))
        self.token_mixer = nn.Sequential(*mixer)
        self.channel_mixer = _ChannelMixer(wide, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(self.token_mixer(x))  # type: ignore[no-any-return]


class _Branches(nn.Module):
    """Depthwise 3x3, depthwise 1x1 and the input itself, added: one depthwise 3x3 convolution when it runs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = _ConvNorm(width, width, 3, groups=width)
        self.conv1 = _ConvNorm(width, width, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.conv.joined()
        point, point_bias = self.conv1.joined()
        middle = F.pad(point + 1, (1, 1, 1, 1))  # the 1x1 branch and the input's own one, at the middle tap
        return _convolved(self.conv.c, x, weight + middle, bias + point_bias)


class _SqueezeExcite(nn.Module):
    """Channels scaled by what their means say (Hu et al. 2018)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * torch.sigmoid(gate)


class _ChannelMixer(nn.Module):
    """Two 1x1 convolutions about a GELU, with the residual."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.m = nn.Sequential(_ConvNorm(width, hidden), nn.GELU(), _ConvNorm(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.m(x)
        return x + mixed


FAMILY = Family(
    id="edge_sam",
    recognises=most_of("image_encoder.features.", "image_encoder.fuse_stage2.", "image_encoder.fuse_stage3."),
    read=_read,
    config=EdgeSamConfig,
    network=EdgeSam,
    carries=_carries,
)
