"""Label Studio's brush masks: the run-length packing of @thi.ng/rle-pack over RGBA bytes.

A stream of bits: the number of values (32), the bits of a value less one (5), four run widths less one (4 each); then
runs, each a 1, the number of its width (2), its length less one in that width, and its value.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_WIDTHS = (3, 4, 8, 16)
_LONGEST = 1 << _WIDTHS[-1]
_CHANNELS = 4  # red, green, blue and alpha have the same value


def pack(mask: NDArray[np.bool_]) -> list[int]:
    """A mask (H, W) as the bytes that Label Studio keeps under ``rle``: 255 inside, 0 outside."""
    flat = mask.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = _CHANNELS * np.diff(np.append(starts, flat.size))
    bits = [f"{_CHANNELS * flat.size:032b}", f"{7:05b}", *(f"{width - 1:04b}" for width in _WIDTHS)]
    for inside, length in zip(flat[starts].tolist(), lengths.tolist(), strict=True):
        value = "11111111" if inside else "00000000"
        while length:
            part = min(length, _LONGEST)
            index = next(i for i, width in enumerate(_WIDTHS) if part <= 1 << width)
            bits.append(f"1{index:02b}{part - 1:0{_WIDTHS[index]}b}{value}")
            length -= part
    joined = "".join(bits)
    joined += "0" * (-len(joined) % 8)
    return list(int(joined, 2).to_bytes(len(joined) // 8, "big"))
