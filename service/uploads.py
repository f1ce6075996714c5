"""A checkpoint on its way from the network to the disk."""

from __future__ import annotations

import zipfile
from pathlib import Path

from anyio import to_thread

from hypersam.checkpoint import container_of
from hypersam.errors import CheckpointError, NotACheckpoint
from hypersam.store import ArtifactStore, UploadWriter

BLOCK = 4 << 20  # bytes gathered before a thread writes and hashes them


class UploadSink:
    """Writes a form's file into the store in blocks, off the event loop; memory stays at two blocks.

    A file whose first block already shows that it is no checkpoint is refused before the rest is read.
    """

    def __init__(self, store: ArtifactStore, max_bytes: int) -> None:
        self.writer: UploadWriter = store.new_upload(max_bytes)
        self.complete = False
        self._block = bytearray()
        self._checked = False

    async def write(self, data: bytes) -> None:
        """Take the next bytes. Raises UploadTooLarge, StoreFull, NotACheckpoint."""
        self._block += data
        if len(self._block) >= BLOCK:
            await self._flush()

    async def close(self) -> None:
        """Write what is left and check what can be checked without loading the file."""
        await self._flush(last=True)
        await to_thread.run_sync(self._finish)
        self.complete = True

    async def _flush(self, *, last: bool = False) -> None:
        block, self._block = self._block, bytearray()
        await to_thread.run_sync(self._store, block, last)

    def _store(self, block: bytearray, last: bool) -> None:
        self.writer.write(block)
        if not self._checked and not last:
            self._checked = True
            self.writer.flush()
            _check_container(self.writer.path)

    def _finish(self) -> None:
        self.writer.finish()
        if _check_container(self.writer.path) == "zip" and not _ends_as_zip(self.writer.path):
            raise NotACheckpoint("the file begins as a PyTorch archive and ends otherwise: it is truncated or damaged")


def _ends_as_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # an end that makes no sense, such as one of an archive on several disks
        return False


def _check_container(path: Path) -> str:
    """Tell zip, legacy or safetensors from the first bytes; the message must not show our temporary name."""
    try:
        return container_of(path)
    except CheckpointError as error:
        raise type(error)(str(error).replace(path.name, "the file")) from error
