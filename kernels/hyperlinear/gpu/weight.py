"""What the GPU's kernels know of a compressed weight: three forms, one set of arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Numbers of the forms, as the kernels know them.
BIRKHOFF, LATTICE, ORBIT = 0, 1, 2


@dataclass(frozen=True, eq=False)
class CompressedWeight:
    """A weight (out, in) in one of the resident forms, on one device.

    ``form``: BIRKHOFF, LATTICE or ORBIT. ``bits``: k of an orbit, else 0. ``columns``: in. ``codes``: (out, n), dense
    rows: int16 indices, int8 levels or uint8 digits. ``table``: int64 pairs, None, or int8 (4^k,). ``scales``: fp32
    (out,), a factor a row, or None; ``step``: a factor for all. ``index``, ``values``: corrections, int64 and fp32
    (n,), ascending flat positions: what stands there instead, or with ``added`` what is added; or None.
    ``block``, ``signs``: of the rotation, 1 and None for none.
    """

    form: int
    bits: int
    columns: int
    codes: Tensor
    table: Tensor | None = None
    scales: Tensor | None = None
    step: float = 1.0
    index: Tensor | None = None
    values: Tensor | None = None
    added: bool = False
    block: int = 1
    signs: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return self.codes.shape[0]

    @property
    def name(self) -> str:
        """The form as the table of paths names it: birkhoff, lattice, orbit3 … orbit6."""
        return f"orbit{self.bits}" if self.form == ORBIT else ("birkhoff", "lattice")[self.form]

    @classmethod
    def birkhoff(cls, indices: Tensor, pairs: Tensor, columns: int) -> CompressedWeight:
        """Arguments: see ``naive``; ``columns`` because the last of an odd row is padding."""
        return cls(BIRKHOFF, 0, columns, _dense_rows(indices), table=pairs)

    @classmethod
    def lattice(cls, levels: Tensor, step: float, index: Tensor, values: Tensor) -> CompressedWeight:
        """Arguments: see ``lattice``."""
        index_or_none, values_or_none = _corrections(index, values)
        return cls(
            LATTICE, 0, levels.shape[1], _dense_rows(levels), step=step, index=index_or_none, values=values_or_none
        )

    @classmethod
    def orbit(
        cls, codes: Tensor, bits: int, table: Tensor, scales: Tensor, block: int, signs: Tensor, index: Tensor,
        values: Tensor,
    ) -> CompressedWeight:  # fmt: skip
        """Arguments: see ``orbit.Weight``."""
        index_or_none, values_or_none = _corrections(index, values)
        return cls(
            ORBIT, bits, signs.shape[0], _dense_rows(codes), table=table, scales=scales.view(torch.float32),
            index=index_or_none, values=values_or_none, added=True, block=block, signs=signs if block > 1 else None,
        )  # fmt: skip


def _corrections(index: Tensor, values: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    return (index, values.view(torch.float32)) if index.numel() else (None, None)


def _dense_rows(codes: Tensor) -> Tensor:
    return codes if codes.stride(1) == 1 or codes.shape[1] == 1 else codes.contiguous()
