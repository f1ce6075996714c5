"""HyperLinear: a linear layer whose weight exists only as indices and a small table."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from kernels.codec import BirkhoffTensor, pair_table, unpack_indices
from kernels.hyperlinear import naive
from kernels.hyperlinear.op import birkhoff_linear


class HyperLinear(nn.Module):
    """A linear layer with a compressed weight; made by ``from_encoded``. For inference.

    ``indices``: int16 (out, ⌈in / 2⌉), an index a pair of weights: 8 bits a weight. ``pairs``: int64 (n,), the
    pair of weights of each index, two fp32 numbers in the bits of one integer. As an integer, ``model.half()``
    and its like, which cast floating buffers, leave the weights as they were decoded. ``bias``: (out,) or
    None, in the dtype it came in. ``weight_dtype``: the source's. Buffers are not part of a state dict: the
    artifact is what is kept.
    """

    indices: Tensor
    pairs: Tensor
    bias: Tensor | None

    def __init__(
        self, in_features: int, out_features: int, indices: Tensor, pairs: Tensor, bias: Tensor | None,
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__()
        if indices.dtype != torch.int16 or tuple(indices.shape) != (out_features, (in_features + 1) // 2):
            raise ValueError(f"indices must be int16 ({out_features}, {(in_features + 1) // 2})")
        if pairs.dtype != torch.int64 or pairs.dim() != 1:
            raise ValueError("pairs must be an int64 vector")
        if bias is not None and tuple(bias.shape) != (out_features,):
            raise ValueError(f"bias must have shape ({out_features},), not {tuple(bias.shape)}")
        self.in_features = in_features
        self.out_features = out_features
        self.weight_dtype = weight_dtype
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("pairs", pairs, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @classmethod
    def from_encoded(
        cls, encoded: BirkhoffTensor, bias: Tensor | None, *, device: torch.device | str | None = None
    ) -> Self:
        """The layer of a weight (out, in) encoded by row, on ``device`` (default: the CPU).

        Raises ValueError for a tensor that was not encoded by row, ArtifactCorrupt for an index that names no pair.
        """
        if not encoded.by_row:
            raise ValueError("a linear layer needs a weight that was encoded by row")
        out_features, in_features = encoded.shape
        indices = unpack_indices(encoded, device)
        pairs = pair_table(encoded).view(torch.int64).view(-1).to(indices.device)
        bias = None if bias is None else bias.to(indices.device)
        return cls(in_features, out_features, indices, pairs, bias, encoded.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out), in ``x``'s dtype."""
        result: Tensor = birkhoff_linear(x, self.indices, self.pairs, self.bias)
        return result

    def dense(self) -> Tensor:
        """The decoded weight (out, in), bit for bit as the codec decodes it. Nothing keeps it."""
        return naive.dense(self.indices, self.pairs, self.in_features).contiguous().to(self.weight_dtype)

    def resident_bytes(self) -> int:
        """Bytes that the layer holds."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        """The sizes, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"pairs={self.pairs.numel()}, bias={self.bias is not None}"
        )
