"""HyperLinear: a linear layer whose weight exists only in compressed form."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from kernels.codec import BirkhoffTensor, Coded, LatticeTensor, OrbitTensor, lattice, pair_table, unpack_indices
from kernels.codec.hadamard import signs
from kernels.codec.orbit_tables import table
from kernels.hyperlinear import lattice as lattice_product
from kernels.hyperlinear import naive
from kernels.hyperlinear import orbit as orbit_product
from kernels.hyperlinear import stream as stream_product
from kernels.hyperlinear.op import birkhoff_linear, lattice_linear, orbit_linear, stream_linear


class HyperLinear(nn.Module, ABC):
    """A linear layer with a compressed weight; made by ``from_encoded``, one subclass a codec. For inference.

    ``int8``: whether activations may be rounded to int8, a scale a token, where the device is faster then; see
    ``allow_int8``.
    ``bias``: (out,) or None, in the dtype it came in. ``weight_dtype``: the source's. Buffers are not part of a
    state dict: the artifact is what is kept. Weights are kept in integer buffers, the bits of an fp32 number
    where need be, so that ``model.half()`` and its like, which cast floating ones, leave them as they were.
    """

    bias: Tensor | None
    int8 = False

    def __init__(
        self, in_features: int, out_features: int, bias: Tensor | None, weight_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        if bias is not None and tuple(bias.shape) != (out_features,):
            raise ValueError(f"bias must have shape ({out_features},), not {tuple(bias.shape)}")
        self.in_features = in_features
        self.out_features = out_features
        self.weight_dtype = weight_dtype
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    @staticmethod
    def from_encoded(
        encoded: Coded, bias: Tensor | None, *, device: torch.device | str | None = None, stream: bool = False
    ) -> HyperLinear:
        """A layer that keeps a coded (out, in) weight as it is.

        ``device``: where it is made; default the stream's. ``stream``: keep the entropy-coded bytes of a ``lattice``
        weight instead of its levels, which takes less memory and more time; on the CPU only. Raises ValueError for a
        tensor that is no coded matrix, ArtifactCorrupt or ValueError for a stream that does not decode.
        """
        match encoded:
            case BirkhoffTensor():
                made: HyperLinear = BirkhoffLinear.of(encoded, bias)
            case LatticeTensor():
                made = (StreamLinear if stream else LatticeLinear).of(encoded, bias)
            case OrbitTensor():
                made = OrbitLinear.of(encoded, bias)
            case _:
                raise ValueError(f"no linear layer multiplies with a {type(encoded).__name__}")
        return made.to(device) if device is not None else made

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out), in ``x``'s dtype."""

    @abstractmethod
    def _decoded(self) -> Tensor:
        """The weight (out, in) in fp32."""

    def dense(self) -> Tensor:
        """The decoded weight (out, in), bit for bit as the codec decodes it. Nothing keeps it."""
        return self._decoded().to(self.weight_dtype)

    def transposed(self, x: Tensor) -> Tensor:
        """``x`` (…, out) times the weight, not its transpose, without the bias: (…, in), in ``x``'s dtype.

        The weight is decoded as a whole for as long as it takes, which suits layers of a decoder's size. Not for
        compilation: there is no operator for it.
        """
        return x @ self._decoded().to(x.dtype)

    def resident_bytes(self) -> int:
        """Bytes that the layer holds."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def extra_repr(self) -> str:
        """The sizes, for ``repr``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def allow_int8(model: nn.Module, allowed: bool = True) -> None:
    """Allow every compressed layer of a model int8 operands, or forbid them again (the default).

    Int8 activations with a scale a token lose some 33 to 37 dB a layer: little beside the rounding of weights at
    4 and 5 bits, much beside that at 6 and more.
    """
    for module in model.modules():
        if isinstance(module, HyperLinear):
            module.int8 = allowed


class BirkhoffLinear(HyperLinear):
    """``indices``: int16 (out, ⌈in / 2⌉), an index a pair of weights: 8 bits a weight. ``pairs``: int64 (n,), the
    pair of weights of each index, two fp32 numbers in the bits of one integer.
    """

    indices: Tensor
    pairs: Tensor

    def __init__(
        self, in_features: int, out_features: int, indices: Tensor, pairs: Tensor, bias: Tensor | None,
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bias, weight_dtype)
        if indices.dtype != torch.int16 or tuple(indices.shape) != (out_features, (in_features + 1) // 2):
            raise ValueError(f"indices must be int16 ({out_features}, {(in_features + 1) // 2})")
        if pairs.dtype != torch.int64 or pairs.dim() != 1:
            raise ValueError("pairs must be an int64 vector")
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("pairs", pairs, persistent=False)

    @classmethod
    def of(cls, encoded: BirkhoffTensor, bias: Tensor | None) -> BirkhoffLinear:
        """Raises ArtifactCorrupt for an index that names no pair."""
        if not encoded.by_row:
            raise ValueError("a linear layer needs a weight that was encoded by row")
        out_features, in_features = encoded.shape
        pairs = pair_table(encoded).view(torch.int64).view(-1)
        return cls(in_features, out_features, unpack_indices(encoded), pairs, bias, encoded.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out), in ``x``'s dtype."""
        result: Tensor = birkhoff_linear(x, self.indices, self.pairs, self.bias, self.int8)
        return result

    def _decoded(self) -> Tensor:
        return naive.dense(self.indices, self.pairs, self.in_features).contiguous()


class LatticeLinear(HyperLinear):
    """``levels``: int8 (out, in). ``step``: Δ, exact in fp32. ``index``, ``values``: the weights that no level
    gives, see ``lattice``.
    """

    levels: Tensor
    index: Tensor
    values: Tensor

    def __init__(
        self, levels: Tensor, step: float, index: Tensor, values: Tensor, bias: Tensor | None,
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        out_features, in_features = levels.shape
        super().__init__(in_features, out_features, bias, weight_dtype)
        self.step = step
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("values", values, persistent=False)

    @classmethod
    def of(cls, encoded: LatticeTensor, bias: Tensor | None) -> LatticeLinear:
        """Raises ValueError for a stream that does not decode."""
        if len(encoded.shape) != 2 or encoded.offset:
            raise ValueError(f"a linear layer needs a matrix coded without an offset, not {encoded.shape}")
        levels, corrections = lattice.levels(encoded)
        index = corrections.index.to(torch.int64)
        values = corrections.values.view(torch.int32)
        return cls(levels.view(encoded.shape), encoded.step, index, values, bias, encoded.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out), in ``x``'s dtype."""
        result: Tensor = lattice_linear(x, self.levels, self.step, self.index, self.values, self.bias, self.int8)
        return result

    def _decoded(self) -> Tensor:
        return lattice_product.dense(self.levels, self.step, self.index, self.values)


class StreamLinear(HyperLinear):
    """The buffers are the fields of ``stream.Stream``. It has no path with int8 operands."""

    words: Tensor
    states: Tensor
    classes: Tensor
    escapes: Tensor
    starts: Tensor

    def __init__(
        self, held: stream_product.Stream, in_features: int, bias: Tensor | None,
        weight_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__(in_features, len(held.classes) * held.columns // in_features, bias, weight_dtype)
        self.columns, self.step, self.beta = held.columns, held.step, held.beta
        for name in ("words", "states", "classes", "escapes", "starts"):
            self.register_buffer(name, getattr(held, name), persistent=False)

    @classmethod
    def of(cls, encoded: LatticeTensor, bias: Tensor | None) -> StreamLinear:
        """Raises ValueError for a stream that does not decode."""
        return cls(stream_product.Stream.of(encoded), encoded.shape[-1], bias, encoded.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out), in ``x``'s dtype, on the CPU."""
        result: Tensor = stream_linear(
            x, self.words, self.states, self.classes, self.escapes, self.starts, self.columns, self.step, self.beta,
            self.in_features, self.out_features, self.bias,
        )  # fmt: skip
        return result

    def _decoded(self) -> Tensor:
        held = stream_product.Stream(
            self.words, self.states, self.classes, self.escapes, self.starts, self.columns, self.step, self.beta
        )
        return stream_product.dense(held, self.in_features)


class OrbitLinear(HyperLinear):
    """The buffers are the fields of ``orbit.Weight``."""

    codes: Tensor
    table: Tensor
    scales: Tensor
    signs: Tensor
    index: Tensor
    values: Tensor

    def __init__(
        self, weight: orbit_product.Weight, bias: Tensor | None, weight_dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(weight.columns, weight.codes.shape[0], bias, weight_dtype)
        self.bits, self.block = weight.bits, weight.block
        for name in ("codes", "table", "scales", "signs", "index", "values"):
            self.register_buffer(name, getattr(weight, name), persistent=False)

    @classmethod
    def of(cls, encoded: OrbitTensor, bias: Tensor | None) -> OrbitLinear:
        """Keeps the codes as they are."""
        if len(encoded.shape) != 2 or encoded.columns != encoded.shape[1]:
            raise ValueError(f"a linear layer needs a matrix coded by its own rows, not {encoded.shape}")
        outliers = encoded.outliers
        turned = signs(encoded.columns, encoded.seed) if encoded.block > 1 else np.ones(encoded.columns)
        values = (outliers.values.to(torch.float64) * 2.0**outliers.exponent).to(torch.float32)
        levels = table(encoded.k, encoded.law).levels
        weight = orbit_product.Weight(
            codes=encoded.codes.clone(), bits=encoded.k, table=torch.from_numpy(levels.copy()),
            scales=encoded.row_scales.view(torch.int32), block=encoded.block,
            signs=torch.from_numpy(turned.astype(np.int8)), index=outliers.positions, values=values.view(torch.int32),
        )  # fmt: skip
        return cls(weight, bias, encoded.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out), in ``x``'s dtype."""
        result: Tensor = orbit_linear(
            x, self.codes, self.bits, self.table, self.scales, self.block, self.signs, self.index, self.values,
            self.bias, self.int8,
        )  # fmt: skip
        return result

    def _decoded(self) -> Tensor:
        return orbit_product.dense(self._weight())

    def transposed(self, x: Tensor) -> Tensor:
        """``x`` (…, out) times the weight: (…, in)."""
        return orbit_product.transposed(x, self._weight()) if x.device.type == "cpu" else super().transposed(x)

    def _weight(self) -> orbit_product.Weight:
        return orbit_product.Weight(
            self.codes, self.bits, self.table, self.scales, self.block, self.signs, self.index, self.values
        )
