"""The product with a ``lattice`` weight that stays entropy-coded in memory: its rANS bytes, decoded at each call.

At 5x that is 6.2 bits a weight instead of the 8 of int8 levels, for the price of decoding. CPUs only: segments are
decoded one after another within a thread, which is nothing for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.codec import LatticeTensor, lattice_numba, rans, rans_numba
from kernels.codec.lattice_tables import LOWEST, table
from kernels.hyperlinear import cpu_numba as loops
from kernels.hyperlinear.cpu import SCRATCH_BYTES, array, blockwise, operand
from kernels.hyperlinear.threads import over_rows


@dataclass(frozen=True)
class Stream:
    """A compressed (out, in) weight.

    ``words``: int16 (n,), the bits of the coder's uint16 words. ``states``: int32 (segments, lanes). ``classes``: int8,
    one a row of ``columns`` weights, a multiple of in. ``escapes``: int32, the bits of the fp32 weights that no level
    gives. ``starts``: int64 (segments + 1, 2), the first word and the first escape of each segment, and the ends.
    """

    words: Tensor
    states: Tensor
    classes: Tensor
    escapes: Tensor
    starts: Tensor
    columns: int
    step: float
    beta: int

    @classmethod
    def of(cls, encoded: LatticeTensor) -> Stream:
        """Takes the stream apart and decodes it once. Raises ValueError where it does not decode."""
        if len(encoded.shape) != 2 or encoded.offset:
            raise ValueError(f"a linear layer needs a matrix coded without an offset, not {encoded.shape}")
        parts = encoded.parts()
        counts = parts.segments.counts
        starts = np.zeros((len(counts) + 1, 2), np.int64)
        np.cumsum(counts, out=starts[1:, 0])
        made = cls(
            words=torch.from_numpy(parts.segments.words.view(np.int16)),
            states=torch.from_numpy(parts.segments.states.view(np.int32)),
            classes=torch.from_numpy(parts.classes),
            escapes=torch.from_numpy(parts.escapes.view(np.int32)),
            starts=torch.from_numpy(starts), columns=encoded.columns, step=encoded.step, beta=encoded.beta,
        )  # fmt: skip
        each = rans.segment_rows(encoded.columns)
        levels = np.empty((min(each, encoded.rows), encoded.columns), np.int8)
        none = np.empty(0, np.int64)
        for segment in range(len(counts)):
            rows = min(each, encoded.rows - segment * each)
            made._levels(segment, segment + 1, levels[:rows])
            starts[segment + 1, 1] = starts[segment, 1] + lattice_numba.find(levels[:rows].reshape(-1), none)
        if starts[-1, 1] != len(parts.escapes):
            raise ValueError(f"the levels name {starts[-1, 1]} escapes, but there are {len(parts.escapes)}")
        return made

    def _levels(self, first: int, last: int, out: NDArray[np.int8]) -> None:
        starts = self.starts.numpy()[first : last + 1, 0]
        each = rans.segment_rows(self.columns)
        damaged = rans_numba.decode(
            self.words.numpy().view(np.uint16)[starts[0] : starts[-1]], np.diff(starts).astype(np.uint32),
            self.states.numpy().view(np.uint32)[first:last], self.classes.numpy()[first * each : last * each], LOWEST,
            each, table(self.beta).slots, out,
        )  # fmt: skip
        if damaged >= 0:
            raise ValueError(f"segment {first + damaged} does not decode: its words do not end where its weights do")

    def fill(self, first: int, last: int, out: Tensor) -> None:
        """Decode segments into ``out``, their weights one after another, fp32 or bf16."""
        each = rans.segment_rows(self.columns)
        rows = len(self.classes)
        target = array(out).reshape(-1)
        exact = array(self.escapes.view(torch.float32).to(out.dtype))
        escape_starts = self.starts[:, 1].numpy()
        loop: Callable[..., None] = loops.to_bf16 if out.dtype == torch.bfloat16 else loops.to_fp32

        def some(a: int, b: int) -> None:
            for segment in range(first + a, first + b):
                begin, end = segment * each, min((segment + 1) * each, rows)
                levels = np.empty((end - begin, self.columns), np.int8)
                self._levels(segment, segment + 1, levels)
                place = (begin - first * each) * self.columns
                part = target[place : place + levels.size]
                loop(levels, np.full(len(levels), self.step, np.float32), part.reshape(levels.shape))
                beyond = exact[escape_starts[segment] : escape_starts[segment + 1]]
                if len(beyond):
                    index = np.empty(len(beyond), np.int64)
                    lattice_numba.find(levels.reshape(-1), index)
                    part[index] = beyond

        over_rows(some, last - first, each * self.columns)


def dense(stream: Stream, in_features: int) -> Tensor:
    """The weight: fp32 (out, in), bit for bit as the codec decodes it."""
    weight = torch.empty((len(stream.classes), stream.columns))
    stream.fill(0, len(stream.states), weight)
    return weight.view(-1, in_features)


def linear(x: Tensor, stream: Stream, bias: Tensor | None, *, scratch_bytes: int = SCRATCH_BYTES) -> Tensor:
    """``x`` (…, in) times the transposed weight, plus ``bias``: (…, out) in ``x``'s dtype."""
    columns = x.shape[-1]
    out_features = len(stream.classes) * stream.columns // columns
    kind = torch.bfloat16 if operand(x) == torch.bfloat16 else torch.float32
    each = rans.segment_rows(stream.columns) * (stream.columns // columns)
    at_once = max(1, scratch_bytes // (each * columns * kind.itemsize))
    scratch = torch.empty((min(at_once * each, out_features), columns), dtype=kind)

    def rows(start: int, stop: int) -> Tensor:
        weight = scratch[: stop - start]
        stream.fill(start // each, -(-stop // each), weight)
        return weight

    return blockwise(x, rows, out_features, at_once * each, bias)
