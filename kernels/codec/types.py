"""What goes into the codecs and what comes out of them."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from kernels.codec.packing import MAX_BITS, stream_bytes

#: An index must fit the int16 that layers keep in memory.
MAX_INDICES = 1 << 15

#: Source types that are coded; everything else is kept as it is.
CODED_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


_LARGEST = sys.float_info.max


def shown(value: object) -> str:
    """A value in a message: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 200:  # Python does not write thousands of digits
        return "one of many digits"
    return repr(value)[:64] if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


def _is_square(nodes: int) -> bool:
    return nodes >= 1 and math.isqrt(nodes) ** 2 == nodes


@runtime_checkable
class Coded(Protocol):
    """A coded tensor, as every codec gives it and as the artifact stores it: constants and one stream of bytes.

    ``encoding``: its name in the artifact. ``shape``, ``dtype``: the source's.
    """

    encoding: ClassVar[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's."""

    @property
    def dtype(self) -> torch.dtype:
        """The source's."""

    def constants(self) -> dict[str, Any]:
        """Everything but shape, dtype and the stream, as JSON."""

    def stream(self) -> Tensor:
        """All its bytes: a uint8 vector on the CPU."""

    @classmethod
    def parse(cls, shape: tuple[int, ...], dtype: torch.dtype, constants: Mapping[str, Any], stream: Tensor) -> Self:
        """Undo ``constants`` and ``stream``. Raises ValueError, TypeError or KeyError for what cannot be."""


def stored_bits(coded: Coded) -> int:
    """Bits that a coded tensor's stream takes."""
    return 8 * coded.stream().numel()


@dataclass(frozen=True)
class BirkhoffConfig:
    """Options of the codec; the defaults are the published ones.

    ``side``: l, the side of the square about the centre, in units of the weights. ``nodes``: the node counts
    U that are tried in turn, squares of whole numbers. ``max_classes``: K_max, the most outer classes.
    ``target_error``: mean absolute error that ends the search. ``raw_above``: mean absolute error over which
    a tensor is stored as it is. ``min_elements``: tensors of fewer elements are stored as they are.

    Raises ValueError, naming the option, for a value outside its range.
    """

    side: float = 0.1
    nodes: tuple[int, ...] = (1225, 1600)
    max_classes: int = 3
    target_error: float = 0.001
    raw_above: float = 0.006
    min_elements: int = 10

    def __post_init__(self) -> None:
        for name in ("side", "target_error", "raw_above"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ValueError(f"{name} must be a number, not {shown(value)}")
            if not 0 < value <= _LARGEST:  # compared as it is: a whole number may be too long for a float
                raise ValueError(f"{name} must be a finite number over 0, not {shown(value)}")
            object.__setattr__(self, name, float(value))
        if not 1e-30 <= self.side <= 1e30:
            raise ValueError(f"side must be from 1e-30 to 1e30, not {self.side!r}")
        for name in ("max_classes", "min_elements"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 63:
                raise ValueError(f"{name} must be a whole number from 1, not {shown(value)}")
        object.__setattr__(self, "nodes", tuple(self.nodes))
        if not self.nodes:
            raise ValueError("nodes must name at least one node count")
        for count in self.nodes:
            if isinstance(count, bool) or not isinstance(count, int) or count >= 1 << 63 or not _is_square(count):
                raise ValueError(f"nodes must be squares of whole numbers, not {shown(count)}")
            if count * (self.max_classes + 1) > MAX_INDICES:
                raise ValueError(
                    f"nodes × (max_classes + 1) must be at most {MAX_INDICES}, not {count} × {self.max_classes + 1}"
                )


@dataclass(frozen=True, eq=False)
class BirkhoffTensor:
    """A tensor as indices of the winding's nodes, with the constants that give the nodes their places.

    ``shape``, ``dtype``: the source's. ``by_row``: whether the points are neighbours along the rows of a
    matrix, else of the flattened tensor. ``centre``: c, exact in fp32. ``radius``: R, in units of the weights.
    ``side``: l. ``nodes``: U. ``classes``: K. ``bits``: of one index in ``indices``, a packed uint8 tensor on
    the CPU (least significant bit first). ``mean_error``: mean absolute error of all coordinates of the
    points, padding counted.

    Raises ValueError where the constants do not agree with each other or with the stream's length.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    by_row: bool
    centre: tuple[float, float]
    radius: float
    side: float
    nodes: int
    classes: int
    bits: int
    indices: Tensor
    mean_error: float

    encoding: ClassVar[str] = "birkhoff"

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.shape):
            raise ValueError(f"a coded tensor has no empty dimension, but shape is {self.shape}")
        if self.by_row and len(self.shape) != 2:
            raise ValueError(f"coding by row needs a matrix, but shape is {self.shape}")
        if self.dtype not in CODED_DTYPES:
            raise ValueError(f"the dtype of a coded tensor is a floating one, not {self.dtype}")
        numbers = (*self.centre, self.radius, self.side, self.mean_error)
        if len(self.centre) != 2 or not all(math.isfinite(number) for number in numbers):
            raise ValueError("centre, radius, side and mean_error must be finite, and centre a pair")
        if self.side <= 0 or self.radius < 0 or self.mean_error < 0:
            raise ValueError("side must be over 0, radius and mean_error at least 0")
        if not _is_square(self.nodes) or self.classes < 0:
            raise ValueError(f"nodes must be a square and classes at least 0, not {self.nodes} and {self.classes}")
        if self.table_size > MAX_INDICES:
            raise ValueError(f"nodes × (classes + 1) must be at most {MAX_INDICES}, not {self.table_size}")
        if not 0 <= self.bits <= MAX_BITS:
            raise ValueError(f"bits must be from 0 to {MAX_BITS}, not {self.bits}")
        if self.indices.dtype != torch.uint8 or self.indices.dim() != 1:
            raise ValueError("the stream of indices must be a uint8 vector")
        expected = stream_bytes(self.count, self.bits)
        if self.indices.numel() != expected:
            raise ValueError(
                f"{self.count} indices of {self.bits} bits take {expected} bytes, not {self.indices.numel()}"
            )

    @property
    def table_size(self) -> int:
        """Number of pairs that an index can name: (K + 1)·U."""
        return (self.classes + 1) * self.nodes

    @property
    def rows(self) -> int:
        """Number of rows of points."""
        return self.shape[0] if self.by_row else 1

    @property
    def columns(self) -> int:
        """Number of weights in a row, padding not counted."""
        return self.shape[1] if self.by_row else math.prod(self.shape)

    @property
    def points_per_row(self) -> int:
        """Number of points in a row: half the columns, rounded up."""
        return (self.columns + 1) // 2

    @property
    def count(self) -> int:
        """Number of points, and of indices, in all."""
        return self.rows * self.points_per_row

    def constants(self) -> dict[str, Any]:
        """The constants as JSON."""
        return {
            "by_row": self.by_row, "centre": list(self.centre), "radius": self.radius, "side": self.side,
            "nodes": self.nodes, "classes": self.classes, "bits": self.bits, "mean_error": self.mean_error,
        }  # fmt: skip

    def stream(self) -> Tensor:
        """The packed indices."""
        return self.indices

    @classmethod
    def parse(cls, shape: tuple[int, ...], dtype: torch.dtype, constants: Mapping[str, Any], stream: Tensor) -> Self:
        """Undo ``constants`` and ``stream``. Raises KeyError, TypeError or ValueError."""
        x, y = constants["centre"]
        by_row = constants["by_row"]
        nodes, classes, bits = (constants[key] for key in ("nodes", "classes", "bits"))
        if not isinstance(by_row, bool) or not all(isinstance(value, int) for value in (nodes, classes, bits)):
            raise ValueError("by_row must be a bool, and nodes, classes and bits whole numbers")
        return cls(
            shape=shape, dtype=dtype, by_row=by_row, centre=(float(x), float(y)), radius=float(constants["radius"]),
            side=float(constants["side"]), nodes=nodes, classes=classes, bits=bits, indices=stream,
            mean_error=float(constants["mean_error"]),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class HalfTensor:
    """A tensor of a wider floating type, each value rounded to fp16.

    ``half``: float16, in the source's shape. ``dtype``: the source's.
    """

    half: Tensor
    dtype: torch.dtype

    encoding: ClassVar[str] = "half"

    @classmethod
    def of(cls, tensor: Tensor) -> HalfTensor | None:
        """Round a tensor; None where one of its values is beyond fp16 (over 65504, NaN, infinity)."""
        half = tensor.detach().to("cpu", torch.float16)
        return cls(half, tensor.dtype) if bool(half.isfinite().all()) else None

    @property
    def shape(self) -> tuple[int, ...]:
        """The source's."""
        return tuple(self.half.shape)

    def constants(self) -> dict[str, Any]:
        """None are needed."""
        return {}

    def stream(self) -> Tensor:
        """The values, little-endian."""
        return self.half.contiguous().reshape(-1).view(torch.uint8)

    @classmethod
    def parse(cls, shape: tuple[int, ...], dtype: torch.dtype, constants: Mapping[str, Any], stream: Tensor) -> Self:
        """Undo ``stream``. Raises ValueError for a stream of another length than the shape's, or another dtype."""
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"a tensor of {dtype} is not stored as halves")
        if stream.numel() != 2 * math.prod(shape):
            raise ValueError(f"{math.prod(shape)} halves take {2 * math.prod(shape)} bytes, not {stream.numel()}")
        # A copy, because a stream may begin at an odd byte.
        return cls(stream.clone().view(torch.float16).view(shape), dtype)


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A tensor stored as it is."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)


Encoded = Coded | RawTensor
