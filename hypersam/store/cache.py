"""A folder of files named by their SHA-256, fetched on first use and held within a bound."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from hypersam.errors import StoreUnavailable
from hypersam.store.held import PART, new_part

GRACE = 60.0  # seconds in which a path that was handed out is sure to be opened


class DiskCache:
    """Copies of objects. Processes and threads that want the same object fetch it once; others do not wait."""

    def __init__(self, folder: Path, locks: Path, max_bytes: int) -> None:
        self.folder, self._locks, self._max_bytes = folder, locks, max_bytes
        locks.mkdir(parents=True, exist_ok=True)

    def held(self, name: str) -> Path | None:
        """Return the path of a file that is there, and count it as used now; else None."""
        path = self.folder / name
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def get(self, name: str, digest: str, size: int, blocks: Iterable[bytes]) -> Path:
        """Return the path of ``name``; if it is not there, write ``blocks`` (not read otherwise) to it.

        The file appears by one rename, after its SHA-256 was compared with ``digest``. Raises StoreUnavailable if
        it differs, and what ``blocks`` raises.
        """
        if (path := self.held(name)) is not None:
            return path
        with self._alone(name):
            if (path := self.held(name)) is not None:
                return path
            self._make_room(size)
            return self._write(name, digest, blocks)

    def _write(self, name: str, digest: str, blocks: Iterable[bytes]) -> Path:
        final, found = self.folder / name, hashlib.sha256()
        file = new_part(self.folder)
        part = Path(file.name)
        try:
            with file:
                for block in blocks:
                    found.update(block)
                    file.write(block)
            if found.hexdigest() != digest:
                raise StoreUnavailable(f"what the object store sent for {name} has another SHA-256 than it should")
            part.replace(final)
        finally:
            part.unlink(missing_ok=True)
        return final

    def _make_room(self, wanted: int) -> None:
        """Delete the least recently used files until ``wanted`` more bytes fit; those in use stay."""
        files: list[tuple[float, int, Path]] = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                seen = path.stat()
                files.append((seen.st_mtime, seen.st_size, path))
        excess = sum(size for _, size, _ in files) + wanted - self._max_bytes
        if excess <= 0:
            return
        busy = _open_here()
        for used, size, path in sorted(files):
            if excess <= 0:
                return
            if used < time.time() - GRACE and str(path) not in busy and path.suffix != PART:
                path.unlink(missing_ok=True)
                excess -= size

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        with (self._locks / name).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # also between threads: each has opened the file anew
            yield


def _open_here() -> set[str]:
    """The files that this process has open or mapped."""
    found: set[str] = set()
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(os.readlink(entry))
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/" in line:
            found.add(line[line.index("/") :])
    return found
