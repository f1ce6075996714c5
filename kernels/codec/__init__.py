"""The codecs: what turns a tensor into a stream of bytes and back.

``birkhoff`` is the published method (``naive``: as it is written down, the oracle). ``lattice`` and ``orbit`` are
this project's own. ``half`` is fp16. All give ``Coded`` tensors; ``decode`` takes any of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.codec import birkhoff, lattice, orbit
from kernels.codec.birkhoff import encode, pair_table, unpack_indices
from kernels.codec.lattice import LatticeTensor
from kernels.codec.orbit import OrbitTensor
from kernels.codec.types import CODED_DTYPES, BirkhoffConfig, BirkhoffTensor, Coded, Encoded, HalfTensor, RawTensor

ENCODINGS: dict[str, type[Coded]] = {
    kind.encoding: kind for kind in (BirkhoffTensor, LatticeTensor, OrbitTensor, HalfTensor)
}
"""The coded tensors by their names in an artifact."""


def decode(encoded: Encoded, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
    """The dense tensor, in the source's shape, dtype (unless ``dtype`` is given) and on ``device``.

    fp32 arithmetic in a fixed order, then one cast. A raw tensor comes back as a copy. Raises ArtifactCorrupt
    for a stream that does not decode.
    """
    match encoded:
        case RawTensor():
            return encoded.tensor.to(device=device, dtype=dtype, copy=True)
        case HalfTensor():
            return encoded.half.to(device=device, dtype=dtype or encoded.dtype, copy=True)
        case BirkhoffTensor():
            return birkhoff.decode(encoded, dtype=dtype, device=device)
        case LatticeTensor():
            return lattice.decode(encoded, dtype=dtype).to(device)
        case OrbitTensor():
            return orbit.decode(encoded, dtype=dtype).to(device)
    raise TypeError(f"no codec for {type(encoded).__name__}")


__all__ = [
    "CODED_DTYPES",
    "ENCODINGS",
    "BirkhoffConfig",
    "BirkhoffTensor",
    "Coded",
    "Encoded",
    "HalfTensor",
    "LatticeTensor",
    "OrbitTensor",
    "RawTensor",
    "decode",
    "encode",
    "pair_table",
    "unpack_indices",
]
