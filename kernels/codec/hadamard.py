"""The random-sign Hadamard rotation of ``orbit``: spreads outliers over a block, so that rows look Gaussian.

Natural (Sylvester) order, 1/√h, h the largest power of two that divides the row, at most 128; under 4 there is none.
The rotation is orthonormal: W·x = rotate(W)·rotate(x), so a layer may keep its weight rotated and rotate activations.

Arithmetic is fp32 in a fixed order, butterflies of stride 1, 2, 4, …, h/2, then one product with fp32(1/√h): equal bits
everywhere.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_BLOCK = 128
MIN_BLOCK = 4
_MASK = (1 << 64) - 1


def block_size(columns: int) -> int:
    """The block h for rows of ``columns`` weights; 1 where there is none."""
    block = min(columns & -columns, MAX_BLOCK)
    return block if block >= MIN_BLOCK else 1


def splitmix64(seed: int, index: int) -> int:
    """Output number ``index`` (from 0) of SplitMix64 begun at ``seed`` (Steele, Lea and Flood, OOPSLA 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


@functools.lru_cache(maxsize=64)
def signs(columns: int, seed: int) -> NDArray[np.float32]:
    """The sign of each column, fp32 ±1 (columns,), read-only: −1 where bit i mod 64 of output i // 64 is set."""
    words = np.array([splitmix64(seed, index) for index in range(-(-columns // 64))], dtype="<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:columns]
    found = 1 - 2 * bits.astype(np.float32)
    found.flags.writeable = False
    return found


def norm(block: int) -> np.float32:
    """fp32(1/√block)."""
    return np.float32(1 / np.sqrt(np.float64(block)))


def butterflies(x: Tensor, block: int) -> Tensor:
    """The Hadamard matrix of each block of the last dimension of ``x`` (…, n), natural order, without 1/√block."""
    shape = x.shape
    stride = 1
    while stride < block:
        pairs = x.reshape(*shape[:-1], -1, 2, stride)
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack((upper + lower, upper - lower), dim=-2)
        stride *= 2
    return x.reshape(shape)


def _signs_like(x: Tensor, seed: int) -> Tensor:
    return torch.from_numpy(signs(x.shape[-1], seed).copy()).to(x.device)


def _check(x: Tensor, block: int) -> None:
    if block < 1 or block & (block - 1) or block > MAX_BLOCK or x.shape[-1] % block:
        raise ValueError(f"a block is a power of two up to {MAX_BLOCK} that divides the row, not {block}")


def rotate(x: Tensor, block: int, seed: int) -> Tensor:
    """Rotate the last dimension of ``x`` (…, n) by blocks: fp32, on its device, then cast to the dtype of ``x``.

    ``block`` 1 gives ``x`` back. Raises ValueError for a block that is no power of two or does not divide n.
    """
    _check(x, block)
    if block == 1:
        return x
    turned = butterflies(x.to(torch.float32) * _signs_like(x, seed), block) * float(norm(block))
    return turned.to(x.dtype)


def unrotate(x: Tensor, block: int, seed: int) -> Tensor:
    """The inverse of ``rotate``, up to fp32 rounding: butterflies, 1/√block, then the signs."""
    _check(x, block)
    if block == 1:
        return x
    turned = butterflies(x.to(torch.float32), block) * float(norm(block)) * _signs_like(x, seed)
    return turned.to(x.dtype)
