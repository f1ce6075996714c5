"""Whose a half-made file is: its maker holds a lock on it, which the system frees however the maker ends.

So what a killed process left is told from what another is writing, at once and whatever the clocks say.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import uuid
from pathlib import Path
from typing import BinaryIO

PART = ".part"
_LOCK = ".lock"


def new_part(folder: Path) -> BinaryIO:
    """Open a new file ``folder/<random>.part`` for writing; it is held until it is closed. Raises OSError."""
    while True:
        file = (folder / f"{uuid.uuid4().hex}{PART}").open("xb")
        if _held(file):
            return file


def new_folder(parent: Path, name: str) -> tuple[Path, BinaryIO]:
    """Make ``parent/<name>.<random>``; it is held until the file that comes with it is closed. Raises OSError."""
    while True:
        folder = parent / f"{name}.{uuid.uuid4().hex}"
        folder.mkdir()
        # A folder without the file may be one that is made in this moment, so its age decides about it.
        file = (folder / _LOCK).open("xb")
        if _held(file):
            return folder, file


def is_held_folder(path: Path) -> bool:
    """Whether a folder is of ``new_folder``'s, its maker alive or not."""
    return (path / _LOCK).exists()


def remove_abandoned(path: Path) -> bool:
    """Delete a half-made file or folder whose maker has ended; whether it had. One that is gone is fine."""
    try:
        with (path / _LOCK if path.is_dir() else path).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def _held(file: BinaryIO) -> bool:
    """Take the lock. False if somebody took the file for abandoned before we had it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        with contextlib.suppress(OSError):
            file.close()
        raise
    if os.fstat(file.fileno()).st_nlink:
        return True
    file.close()
    return False
