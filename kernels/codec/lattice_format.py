"""The coded tensor of ``lattice`` and its stream of bytes.

The stream: a class a row (int8), the words of each segment (uint32), each segment's states (uint32, segments × lanes),
the words (uint16), the escapes (fp32), all little-endian and without gaps. See docs/codec-v1.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.codec import rans
from kernels.codec.lattice_tables import BETAS, HIGHEST, LOWEST, ZERO_ROW
from kernels.codec.types import CODED_DTYPES

_LEAST_STEP = 2.0**-126


@dataclass(frozen=True, eq=False)
class Parts:
    """The stream taken apart. ``classes``: int8 (rows,). ``escapes``: fp32, the values of the weights that no level
    gives, in row-major order."""

    classes: NDArray[np.int8]
    segments: rans.Segments
    escapes: NDArray[np.float32]

    def data(self) -> Tensor:
        """The stream, uint8."""
        s = self.segments
        parts = (
            self.classes, s.counts.astype("<u4", copy=False), s.states.astype("<u4", copy=False).reshape(-1),
            s.words.astype("<u2", copy=False), self.escapes.astype("<f4", copy=False),
        )  # fmt: skip
        return torch.from_numpy(np.concatenate([part.view(np.uint8) for part in parts]))


@dataclass(frozen=True, eq=False)
class LatticeTensor:
    """A tensor as whole multiples of one step, entropy-coded row by row.

    ``shape``, ``dtype``: the source's. ``columns``: of the matrix view. ``step``: Δ, exact in fp32 and no subnormal.
    ``offset``: what is added to every multiple, exact in fp32. ``beta``: index into ``BETAS``. ``data``: the stream,
    a uint8 vector on the CPU.

    Raises ValueError where these do not agree. Whether the words decode is only known when they are decoded.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    columns: int
    step: float
    offset: float
    beta: int
    data: Tensor

    encoding: ClassVar[str] = "lattice"

    def __post_init__(self) -> None:
        check_arguments(self.shape, self.dtype, self.columns, self.step, self.offset, self.beta)
        if self.data.dtype != torch.uint8 or self.data.dim() != 1 or self.data.device.type != "cpu":
            raise ValueError("a stream is a uint8 vector on the CPU")
        self._check_stream()

    @property
    def rows(self) -> int:
        """Rows of the matrix view."""
        return math.prod(self.shape) // self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the stream."""
        return self.data.numel()

    @functools.cached_property
    def _ends(self) -> tuple[int, int, int, int]:
        """Where classes, counts, states and words end in the stream."""
        segments = rans.segment_count(self.rows, self.columns)
        lanes = rans.lane_count(self.rows, self.columns)
        # Compared with the length before anything of that size is made.
        states_end = self.rows + 4 * segments * (1 + lanes)
        if self.nbytes < states_end:
            raise ValueError(f"{self.rows} rows take at least {states_end} bytes, not {self.nbytes}")
        counts_end = self.rows + 4 * segments
        words = int(self._array(self.rows, counts_end, "<u4").sum(dtype=np.uint64))
        return self.rows, counts_end, states_end, states_end + 2 * words

    def _array(self, start: int, end: int, kind: str) -> NDArray[Any]:
        """A part of the stream. A copy, because it may begin at an odd byte."""
        return self.data[start:end].numpy().copy().view(kind).astype(kind[1:], copy=False)

    def _check_stream(self) -> None:
        rows, counts_end, states_end, words_end = self._ends
        if self.nbytes < words_end or (self.nbytes - words_end) % 4:
            raise ValueError(f"the words of all segments end at byte {words_end}, but the stream has {self.nbytes}")
        classes = self.data[:rows].view(torch.int8)
        if not bool((((classes >= LOWEST) & (classes <= HIGHEST)) | (classes == ZERO_ROW)).all()):
            raise ValueError(f"the class of a row is from {LOWEST} to {HIGHEST}, or {ZERO_ROW} for a row of zeros")
        if bool((self._array(counts_end, states_end, "<u4") < rans.INITIAL).any()):
            raise ValueError(f"a state is at least {rans.INITIAL}")
        escapes = self._array(words_end, self.nbytes, "<f4")
        if escapes.size > math.prod(self.shape) or not bool(np.isfinite(escapes).all()):
            raise ValueError("escapes must be finite and no more than there are weights")

    def parts(self) -> Parts:
        """The stream taken apart, as copies."""
        rows, counts_end, states_end, words_end = self._ends
        counts = self._array(rows, counts_end, "<u4")
        states = self._array(counts_end, states_end, "<u4").reshape(len(counts), -1)
        segments = rans.Segments(counts, states, self._array(states_end, words_end, "<u2"))
        return Parts(self._array(0, rows, "|i1"), segments, self._array(words_end, self.nbytes, "<f4"))

    def nearest(self, values: NDArray[np.float32]) -> NDArray[np.int8]:
        """The levels nearest to weights that are stored as they are, kept to ±127: int8 of the same shape."""
        with np.errstate(over="ignore"):
            exact = np.rint((values - np.float32(self.offset)) / np.float32(self.step))
        found: NDArray[np.int8] = np.clip(exact, -127, 127).astype(np.int8)
        return found

    def constants(self) -> dict[str, Any]:
        """Everything but shape, dtype and the stream."""
        return {"columns": self.columns, "step": self.step, "offset": self.offset, "beta": self.beta}

    def stream(self) -> Tensor:
        """All bytes."""
        return self.data

    @classmethod
    def parse(cls, shape: tuple[int, ...], dtype: torch.dtype, constants: Mapping[str, Any], stream: Tensor) -> Self:
        """Undo ``constants`` and ``stream``. Raises ValueError or KeyError; ``data`` is ``stream`` itself."""
        columns, beta = constants["columns"], constants["beta"]
        step, offset = constants["step"], constants["offset"]
        for name, value in (("columns", columns), ("beta", beta)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be a whole number, not {value!r}")
        for name, value in (("step", step), ("offset", offset)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
                raise ValueError(f"{name} must be a number that fp32 holds, not {value!r}")
        return cls(shape, dtype, columns, float(step), float(offset), beta, stream)


def exact_in_fp32(number: float) -> bool:
    """Whether a number is finite and one that fp32 has."""
    return (
        math.isfinite(number) and abs(number) <= float(np.finfo(np.float32).max) and float(np.float32(number)) == number
    )


def check_arguments(
    shape: tuple[int, ...], dtype: torch.dtype, columns: int, step: float, offset: float, beta: int
) -> None:
    """Raise ValueError, naming what is wrong, for what no ``lattice`` tensor has."""
    if any(size < 1 for size in shape):
        raise ValueError(f"a coded tensor has no empty dimension, but shape is {shape}")
    if dtype not in CODED_DTYPES:
        raise ValueError(f"the dtype of a coded tensor is a floating one, not {dtype}")
    if columns < 1 or math.prod(shape) % columns:
        raise ValueError(f"columns must divide {math.prod(shape)} weights, not be {columns}")
    if not (exact_in_fp32(step) and step >= _LEAST_STEP):
        raise ValueError(f"step must be a normal positive fp32 number (from 2^−126), not {step!r}")
    if not exact_in_fp32(offset):
        raise ValueError(f"offset must be a finite fp32 number, not {offset!r}")
    if not 0 <= beta < len(BETAS):
        raise ValueError(f"beta must be from 0 to {len(BETAS) - 1}, not {beta}")
