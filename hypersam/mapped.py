"""Pages of a mapped file: read when looked at, and let go of when they have been used.

A checkpoint's tensors lie in a mapping of its file. Pages that were read count as the process's memory until it ends,
which for a checkpoint of 2.6 GB is most of what a compression takes; a container's limit does not care that they
could be read again.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

_MADV_DONTNEED = 4
_MAPS = Path("/proc/self/maps")


class MappedFile:
    """The mappings of ``path`` that this process had when the object was made. Knows of none but on Linux."""

    def __init__(self, path: Path) -> None:
        self._ranges: tuple[tuple[int, int], ...] = ()
        if not sys.platform.startswith("linux") or not _MAPS.is_file():
            return
        # The fields of proc_pid_maps(5): range, permissions, offset, device, inode, path. The inode and not the path
        # tells the file, which may have been renamed or be known by several names.
        here = path.stat()
        device = f"{here.st_dev >> 8 & 0xFFF:02x}:{here.st_dev & 0xFF | here.st_dev >> 12 & 0xFFF00:02x}"
        found = []
        for line in _MAPS.read_text().splitlines():
            span, _, _, where, inode = line.split(maxsplit=5)[:5]
            if inode == str(here.st_ino) and where == device:
                start, _, end = span.partition("-")
                found.append((int(start, 16), int(end, 16)))
        self._ranges = tuple(found)
        self._libc = ctypes.CDLL(None, use_errno=True)

    def release(self) -> None:
        """Let go of the pages that were read; whoever looks at them again has them read again.

        Only for mappings that nobody has written to: what was written in them would be lost. They must be open still.
        """
        for start, end in self._ranges:
            # A refusal costs memory and nothing else.
            self._libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
