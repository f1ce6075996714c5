"""Pages of a mapped file: read when looked at, and let go of when they have been used.

A checkpoint's tensors lie in a mapping of its file. Pages that were read count as the process's memory until it ends,
which for a checkpoint of 2.6 GB is most of what a compression takes; a container's limit does not care that they
could be read again.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

_MADV_DONTNEED = 4
_MAPS = Path("/proc/self/maps")


class MappedFile:
    """The pages of files that ``tensors`` are windows of. Knows of none but on Linux.

    The tensors are kept, and with them the mapping: an address range that nobody holds may be given to anything, and
    what is done to it is then done to a stranger's memory. For the same reason only the pages that hold these tensors
    are looked at, not every mapping that the process may have of the file.
    """

    def __init__(self, paths: Iterable[Path], tensors: Iterable[Tensor]) -> None:
        self._tensors: tuple[Tensor, ...] = ()
        self._ranges: tuple[tuple[int, int], ...] = ()
        if not sys.platform.startswith("linux") or not _MAPS.is_file():
            return
        mappings = sorted(span for path in paths for span in _mappings_of(path))
        kept, ranges = [], []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            first, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
            if first < end and any(low <= first and end <= high for low, high in mappings):
                kept.append(tensor)
                # A mapping is of whole pages, so the page that a tensor begins or ends in is the file's too.
                ranges.append((first // mmap.PAGESIZE * mmap.PAGESIZE, -(-end // mmap.PAGESIZE) * mmap.PAGESIZE))
        self._tensors = tuple(kept)
        self._ranges = tuple(_joined(sorted(ranges)))
        self._libc = ctypes.CDLL(None, use_errno=True)

    def release(self) -> None:
        """Let go of the pages that were read; whoever looks at them again has them read again.

        Only for tensors that nobody has written to: what was written would be lost.
        """
        for start, end in self._ranges:
            # A refusal costs memory and nothing else.
            self._libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _mappings_of(path: Path) -> list[tuple[int, int]]:
    """The address ranges that the process has of a file now, by the fields of proc_pid_maps(5): range, permissions,
    offset, device, inode, path. The inode tells the file, which may have been renamed or be known by several names."""
    here = path.stat()
    device = f"{here.st_dev >> 8 & 0xFFF:02x}:{here.st_dev & 0xFF | here.st_dev >> 12 & 0xFFF00:02x}"
    found = []
    for line in _MAPS.read_text().splitlines():
        span, _, _, where, inode = line.split(maxsplit=5)[:5]
        if inode == str(here.st_ino) and where == device:
            start, _, end = span.partition("-")
            found.append((int(start, 16), int(end, 16)))
    return found


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges with those that touch made one."""
    found: list[tuple[int, int]] = []
    for start, end in ranges:
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found
