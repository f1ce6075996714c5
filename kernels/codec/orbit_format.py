"""The coded tensor of ``orbit`` and its stream of bytes.

The stream: row scales (fp16, little-endian), the rows' digits, then the outliers' gaps and values. See
docs/codec-v1.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from kernels.codec.hadamard import MAX_BLOCK, MIN_BLOCK
from kernels.codec.orbit_tables import BITS, LAWS
from kernels.codec.types import CODED_DTYPES

_ESCAPE = 255
# An exponent beyond these turns every fp16 into zero or beyond fp32.
_EXPONENTS = range(-400, 400)


def saturate(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``x`` to a floating ``dtype``; what would overflow becomes its largest finite number."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype) if limit < torch.finfo(x.dtype).max else x.to(dtype)


def row_bytes(columns: int, k: int) -> int:
    """Bytes of one row's digits."""
    return (columns * k + 7) // 8


@dataclass(frozen=True, eq=False)
class Outliers:
    """The weights kept apart, as what must be added to the decoded ones.

    ``positions``: flat, int64 (m,), ascending. ``values``: (w − ŵ)/2^exponent, (m,), float16; or float32 with exponent
    0 where halves would lose the smaller ones.
    """

    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    values: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float16))
    exponent: int = 0

    def __post_init__(self) -> None:
        if self.positions.dtype != torch.int64 or self.values.dtype not in (torch.float16, torch.float32):
            raise ValueError("positions of outliers must be int64 and their values float16 or float32")
        if self.positions.dim() != 1 or self.positions.shape != self.values.shape:
            raise ValueError("positions and values of outliers must be vectors of one length")
        if self.exponent not in _EXPONENTS or (self.values.dtype == torch.float32 and self.exponent):
            raise ValueError(f"the exponent of outliers cannot be {self.exponent}")
        if not bool(self.values.isfinite().all()):
            raise ValueError("the values of outliers must be finite")
        if self.positions.numel() and (self.positions[0] < 0 or bool((self.positions.diff() < 1).any())):
            raise ValueError("the positions of outliers must ascend")

    @property
    def full_values(self) -> Tensor:
        """What to add, fp32 (m,): values·2^exponent, kept to fp32's range."""
        return saturate(self.values.to(torch.float64) * 2.0**self.exponent, torch.float32)

    def gaps(self) -> Tensor:
        """The positions as bytes, uint8: the distance to the one before, less 1, 255 for each whole 255 in it."""
        skipped = np.diff(self.positions.numpy(), prepend=-1) - 1
        whole = skipped // _ESCAPE
        places = np.cumsum(whole + 1) - 1
        gaps = np.full(int(places[-1]) + 1 if len(places) else 0, _ESCAPE, np.uint8)
        gaps[places] = skipped % _ESCAPE
        return torch.from_numpy(gaps)

    @staticmethod
    def positions_of(gaps: Tensor, count: int, numel: int) -> Tensor:
        """Undo ``gaps``. Raises ValueError unless they name ``count`` positions under ``numel``."""
        array = gaps.numpy()
        ends = np.flatnonzero(array != _ESCAPE)
        if len(ends) != count or (len(array) and array[-1] == _ESCAPE):
            raise ValueError(f"the gaps must name {count} outliers, not {len(ends)}")
        positions = np.cumsum(array, dtype=np.int64)[ends] + np.arange(count)
        if count and positions[-1] >= numel:
            raise ValueError(f"an outlier at {positions[-1]} is beyond the tensor's {numel} weights")
        return torch.from_numpy(positions)


@dataclass(frozen=True, eq=False)
class OrbitTensor:
    """A tensor as rows of k-bit digits, a scale a row, and a few weights kept apart.

    ``shape``, ``dtype``: the source's. ``columns``: of the matrix view. ``k``: bits a weight. ``law``: index into
    ``LAWS``. ``block``, ``seed``: of the Hadamard rotation, block 1 for none. ``exponent``: the unit of the scales is
    2^exponent. ``scales``: fp16 (rows,), from 0. ``codes``: uint8 (rows, ⌈columns·k/8⌉), most significant bit first,
    unused bits 0. ``outliers``: none beside a rotation. Tensors are on the CPU.

    Raises ValueError where these do not agree.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    columns: int
    k: int
    law: int
    block: int
    seed: int
    exponent: int
    scales: Tensor
    codes: Tensor
    outliers: Outliers = field(default_factory=Outliers)

    encoding: ClassVar[str] = "orbit"

    def __post_init__(self) -> None:
        _check_constants(self.shape, self.dtype, self.columns, self.k, self.law, self.block, self.seed, self.exponent)
        if self.scales.dtype != torch.float16 or tuple(self.scales.shape) != (self.rows,):
            raise ValueError(f"scales must be {self.rows} halves")
        if not bool((self.scales.isfinite() & (self.scales >= 0)).all()):
            raise ValueError("scales must be finite and at least 0")
        if self.codes.dtype != torch.uint8 or tuple(self.codes.shape) != (self.rows, row_bytes(self.columns, self.k)):
            raise ValueError(f"codes must be {self.rows} rows of {row_bytes(self.columns, self.k)} bytes")
        unused = -self.columns * self.k % 8
        if unused and bool((self.codes[:, -1] & ((1 << unused) - 1)).any()):
            raise ValueError("the unused bits of a row must be 0")
        if self.outliers.positions.numel():
            if self.block != 1:
                raise ValueError("a rotated tensor has no outliers")
            if int(self.outliers.positions[-1]) >= self.rows * self.columns:
                raise ValueError("an outlier is beyond the tensor")

    @property
    def rows(self) -> int:
        """Rows of the matrix view."""
        return math.prod(self.shape) // self.columns

    @property
    def row_scales(self) -> Tensor:
        """scales·2^exponent in fp32 (rows,): exact but for underflow; kept to fp32's range."""
        return saturate(self.scales.to(torch.float64) * 2.0**self.exponent, torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of the stream."""
        outliers = self.outliers
        return (
            2 * self.scales.numel() + self.codes.numel() + outliers.gaps().numel()
            + outliers.values.element_size() * outliers.values.numel()
        )  # fmt: skip

    def constants(self) -> dict[str, Any]:
        """Everything but shape, dtype and the stream."""
        found: dict[str, Any] = {
            "columns": self.columns, "k": self.k, "law": self.law, "block": self.block, "seed": self.seed,
            "exponent": self.exponent,
        }  # fmt: skip
        outliers = self.outliers
        if outliers.positions.numel():
            found["outliers"] = {
                "count": outliers.positions.numel(), "exponent": outliers.exponent,
                "wide": outliers.values.dtype == torch.float32,
            }  # fmt: skip
        return found

    def stream(self) -> Tensor:
        """All bytes: scales, codes, gaps, values."""
        parts = [self.scales.view(torch.uint8), self.codes.reshape(-1)]
        if self.outliers.positions.numel():
            parts += [self.outliers.gaps(), self.outliers.values.view(torch.uint8)]
        return torch.cat(parts)

    @classmethod
    def parse(cls, shape: tuple[int, ...], dtype: torch.dtype, constants: Mapping[str, Any], stream: Tensor) -> Self:
        """Undo ``constants`` and ``stream``. Raises ValueError or KeyError; ``codes`` remains a view of ``stream``."""
        if stream.dtype != torch.uint8 or stream.dim() != 1:
            raise ValueError("a stream is a uint8 vector")
        names = ("columns", "k", "law", "block", "seed", "exponent")
        whole = {name: _whole(name, constants[name]) for name in names}
        _check_constants(shape, dtype, **whole)
        rows = math.prod(shape) // whole["columns"]
        width = row_bytes(whole["columns"], whole["k"])
        apart = constants.get("outliers")
        start, end = 2 * rows, 2 * rows + rows * width
        if stream.numel() < end or (apart is None and stream.numel() > end):
            raise ValueError(f"{rows} rows of {width} bytes and their scales take {end} bytes, not {stream.numel()}")
        # Copies, because a stream may begin at an odd byte.
        scales = stream[:start].clone().view(torch.float16)
        codes = stream[start:end].view(rows, width)
        outliers = Outliers() if apart is None else _outliers(apart, stream[end:], shape)
        return cls(
            shape=shape, dtype=dtype, columns=whole["columns"], k=whole["k"], law=whole["law"], block=whole["block"],
            seed=whole["seed"], exponent=whole["exponent"], scales=scales, codes=codes, outliers=outliers,
        )  # fmt: skip


def _outliers(constants: Any, stream: Tensor, shape: tuple[int, ...]) -> Outliers:
    if not isinstance(constants, Mapping):
        raise ValueError("outliers must be an object")
    count, exponent = (_whole(name, constants[name]) for name in ("count", "exponent"))
    wide = constants["wide"]
    if not isinstance(wide, bool):
        raise ValueError(f"wide must be true or false, not {wide!r}")
    kind = torch.float32 if wide else torch.float16
    value_bytes = kind.itemsize * count
    # Each outlier takes a gap of at least one byte: the stream bounds how many there can be.
    if count < 1 or stream.numel() < value_bytes + count:
        raise ValueError(f"{count} outliers do not fit {stream.numel()} bytes")
    split = stream.numel() - value_bytes
    positions = Outliers.positions_of(stream[:split], count, math.prod(shape))
    return Outliers(positions, stream[split:].clone().view(kind), exponent)


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, not {value!r}")
    return value


def _check_constants(
    shape: tuple[int, ...], dtype: torch.dtype, columns: int, k: int, law: int, block: int, seed: int, exponent: int
) -> None:
    if any(size < 1 for size in shape):
        raise ValueError(f"a coded tensor has no empty dimension, but shape is {shape}")
    if dtype not in CODED_DTYPES:
        raise ValueError(f"the dtype of a coded tensor is a floating one, not {dtype}")
    if columns < 1 or math.prod(shape) % columns:
        raise ValueError(f"columns must divide {math.prod(shape)} weights, not be {columns}")
    if k not in BITS or not 0 <= law < len(LAWS):
        raise ValueError(f"k must be from {BITS[0]} to {BITS[-1]} and law from 0 to {len(LAWS) - 1}, not {k} and {law}")
    if block != 1 and (block not in range(MIN_BLOCK, MAX_BLOCK + 1) or block & (block - 1) or columns % block):
        raise ValueError(f"block must be 1 or a power of two from {MIN_BLOCK} to {MAX_BLOCK} in a row, not {block}")
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be from 0 to 2^64 − 1, not {seed}")
    if exponent not in _EXPONENTS:
        raise ValueError(f"exponent must be from {_EXPONENTS[0]} to {_EXPONENTS[-1]}, not {exponent}")
