"""The codecs: what turns a tensor into a stream of indices and back.

``naive`` is the published method as it is written down and stays as the oracle; ``birkhoff`` has the same
signatures and is the one to use.
"""

from __future__ import annotations

from kernels.codec.birkhoff import decode, encode, pair_table, unpack_indices
from kernels.codec.types import BirkhoffConfig, BirkhoffTensor, Encoded, RawTensor

__all__ = [
    "BirkhoffConfig",
    "BirkhoffTensor",
    "Encoded",
    "RawTensor",
    "decode",
    "encode",
    "pair_table",
    "unpack_indices",
]
