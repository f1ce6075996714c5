"""What every family's network can do, whatever its layers are."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from hypersam.sam.rules import Rules

Features = tuple[Tensor, ...]
"""What an image encoder gives its decoder: the embedding (B, C, g, g) first, then whatever else the family's decoder
takes from it (early features of SAM-HQ, high-resolution ones of SAM 2), each with the batch as its first dimension."""

_Module = TypeVar("_Module", bound=nn.Module)

LARGEST_SIDE = 256
"""Passes over pictures of up to this many pixels a side are cheap on a CPU."""


@dataclass(frozen=True)
class Prompts:
    """B prompts of one form, in pixels (x, y) of the network's input.

    ``points``: coordinates (B, N, 2) float32 and labels (B, N), 1 inside and 0 outside. ``boxes``: (B, 4) as x0, y0,
    x1, y1. ``masks``: logits (B, 1, s, s), s the network's ``low_res``. At least one is there.
    """

    points: tuple[Tensor, Tensor] | None = None
    boxes: Tensor | None = None
    masks: Tensor | None = None

    @property
    def count(self) -> int:
        """B. Raises ValueError where its tensors do not agree about it; no prompt at all is one, as SAM has it."""
        given = (self.points and self.points[0], self.points and self.points[1], self.boxes, self.masks)
        counts = {len(t) for t in given if t is not None}
        if len(counts) > 1:
            raise ValueError(f"points, labels, boxes and masks are of {', '.join(map(str, sorted(counts)))} prompts")
        return counts.pop() if counts else 1

    def __getitem__(self, some: slice) -> Prompts:
        """Some of them."""
        points = None if self.points is None else (self.points[0][some], self.points[1][some])
        boxes, masks = (None if t is None else t[some] for t in (self.boxes, self.masks))
        return Prompts(points, boxes, masks)


class Config(Protocol):
    """Sizes of a network, as an artifact keeps them."""

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels."""

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; ``from_dict`` reads it."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``as_dict``. Raises ValueError (or KeyError, TypeError) for what is no such configuration."""


class SamNetwork(nn.Module, ABC):
    """A Segment Anything network under the keys of its official checkpoints, without what pictures do not need.

    Subclasses are made from their configuration alone, ``Network(config)``, and build on the meta device. They are
    plain modules: gradients flow through ``encode`` and ``every_mask``, which is how sensitivities are measured.
    """

    family: ClassVar[str]
    """Id of its family's row in the registry."""
    rules: ClassVar[Rules]
    """What happens to pictures, coordinates and masks outside the network."""

    config: Any
    image_encoder: nn.Module
    """The part that runs in the precision that was asked for; all else is fp32."""

    @property
    @abstractmethod
    def low_res(self) -> int:
        """Side of the low-resolution masks, which are also the mask inputs."""

    @abstractmethod
    def encode(self, pixels: Tensor, *, recompute: bool = False) -> Features:
        """Normalised pixels (B, 3, S, S) to features.

        ``recompute``: keep little for the backward pass and compute blocks twice instead
        (torch.utils.checkpoint).
        """

    @abstractmethod
    def decode(self, features: Features, prompts: Prompts, *, multimask: bool) -> tuple[Tensor, Tensor]:
        """Low-resolution logits (B, M, s, s) and predicted IoU (B, M) for B prompts on one picture, by the family's
        rule of which masks to give: most give M = 3 with ``multimask``, else 1."""

    @abstractmethod
    def every_mask(self, features: Features, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """All masks that the decoder has, (B, M, s, s), and their predicted IoU (B, M'), before any rule chooses."""

    def remembered_bytes(self) -> int:
        """Bytes that its modules keep from call to call beside parameters and buffers."""
        return sum(getattr(module, "positions_bytes", 0) for module in self.modules())

    def affordable_side(self) -> int:
        """Side in pixels at which a pass is cheap on a CPU; ``reduced`` takes it."""
        return int(self.config.image_size)

    def reduced(self, side: int) -> Self:
        """The network for pictures of ``side`` pixels on the same layers. Raises ValueError for another side.

        Sensitivities and fidelity need many passes, and a pass of a large encoder over 1024 pixels takes minutes
        on a CPU. Layers (dense or compressed) are shared; only what depends on the picture's size is cut.
        """
        if side != self.config.image_size:
            raise ValueError(f"the side must be {self.config.image_size}, not {side}")
        return self

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(t for held in (self.parameters(), self.buffers()) for t in held).device

    @property
    def dtype(self) -> torch.dtype:
        """The image encoder's precision."""
        return next(
            (p.dtype for p in self.image_encoder.parameters() if p.is_floating_point()), torch.get_default_dtype()
        )


def sharing(network: Callable[[Any], SamNetwork], config: Config, tensors: Mapping[str, Tensor]) -> SamNetwork:
    """A dense network in fp32 on the storage of a state dict: no copy of what is fp32 already.

    Its parameters are new objects, so that gradients and hooks leave other owners of the storage alone. Tensors
    that the network does not have are passed over.
    """
    with torch.device("meta"):
        made = network(config)
    names = made.state_dict().keys()
    state = {k: v.detach().float() if v.is_floating_point() else v for k, v in tensors.items() if k in names}
    made.load_state_dict(state, strict=True, assign=True)
    return made.eval().requires_grad_(False)


def shell(module: _Module) -> _Module:
    """The same module with tables of its own: parameters and children are shared until they are replaced."""
    made = copy.copy(module)
    made._parameters = dict(module._parameters)
    made._buffers = dict(module._buffers)
    made._modules = dict(module._modules)
    return made


def cut(table: Tensor, part: tuple[slice, ...]) -> nn.Parameter:
    """A part of a table as a parameter, a view."""
    return nn.Parameter(table.detach()[part], requires_grad=table.requires_grad)
