"""The run lengths of BMPs, which Pillow unpacks in Python: some bytes hold a core for many seconds."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def unpacked(data: NDArray[np.uint8], place: int, width: int, height: int, four_bits: bool) -> NDArray[np.uint8]:
    """The palette's indices from ``place`` on, row after row; fewer than width x height where the data ends before.

    As Pillow has it: the end of a row fills it with zeros, and a run does not go beyond its row.
    """
    out = np.zeros(width * height, np.uint8)
    done = x = 0
    while done < len(out) and place + 1 < len(data):
        count, value = int(data[place]), int(data[place + 1])
        place += 2
        if count:
            count = max(0, min(count, width - x))
            x += count
            for i in range(min(count, len(out) - done)):
                out[done + i] = (value >> 4 if i % 2 == 0 else value & 15) if four_bits else value
            done = min(done + count, len(out))
        elif value == 0:  # the end of the row
            done += -done % width
            x = 0
        elif value == 1:  # the end of the picture
            break
        elif value == 2:  # pixels that are left out
            if place + 1 >= len(data):
                break
            done = min(len(out), done + int(data[place]) + int(data[place + 1]) * width)
            x = done % width
            place += 2
        else:  # single pixels, padded to two bytes
            count = min(value, len(out) - done)
            size = (count + 1) // 2 if four_bits else count
            if place + size > len(data):
                break
            for i in range(count):
                byte = int(data[place + (i // 2 if four_bits else i)])
                out[done + i] = (byte >> 4 if i % 2 == 0 else byte & 15) if four_bits else byte
            done += count
            x += value
            place += size
            place += place % 2
    return out[:done]
