"""HyperConv2d: a convolution that is a linear layer on patches, with a compressed weight."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor, nn

from kernels.codec import Coded
from kernels.hyperlinear.module import HyperLinear


class HyperConv2d(nn.Module):
    """A convolution whose patches do not overlap: 1x1, or a patch embedding. For inference, on any device.

    ``linear``: from the channels and pixels of a patch, channels first, to the output channels.
    """

    def __init__(self, linear: HyperLinear, kernel: tuple[int, ...]) -> None:
        super().__init__()
        self.linear = linear
        self.kernel = kernel

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether a module is such a convolution."""
        return (
            conv.groups == 1 and conv.kernel_size == conv.stride
            and conv.padding in ((0, 0), "valid") and conv.dilation == (1, 1)
        )  # fmt: skip

    @classmethod
    def from_encoded(
        cls, encoded: Coded, bias: Tensor | None, kernel: tuple[int, ...], *, stream: bool = False
    ) -> HyperConv2d:
        """For a coded (out, channels, kernel) weight. Raises ValueError where it is not coded by whole rows of a
        matrix, and as ``HyperLinear.from_encoded`` does."""
        out, *rest = encoded.shape
        # Every coded tensor is a dataclass.
        matrix: Coded = dataclasses.replace(encoded, shape=(out, math.prod(rest)))  # type: ignore[type-var]
        return cls(HyperLinear.from_encoded(matrix, bias, stream=stream), kernel)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, H, W) → (B, out, H // kernel, W // kernel), in ``x``'s dtype."""
        high, wide = self.kernel
        x = x[..., : x.shape[2] // high * high, : x.shape[3] // wide * wide]
        patches = x.unflatten(3, (-1, wide)).unflatten(2, (-1, high)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        found: Tensor = self.linear(patches)
        return found.permute(0, 3, 1, 2)
