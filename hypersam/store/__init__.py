"""Where uploads, artifacts and registrations are kept: a folder on disk, or an object store that hosts share."""

from __future__ import annotations

from hypersam.errors import BadSettings
from hypersam.settings import Settings
from hypersam.store.disk import NAME, NO_ROOM, ArtifactStore, ModelRecord, UploadWriter, check_name

__all__ = ["NAME", "NO_ROOM", "ArtifactStore", "ModelRecord", "UploadWriter", "check_name", "open_at_start",
           "open_store"]  # fmt: skip


def open_at_start(settings: Settings) -> ArtifactStore:
    """Return the store, for a process that starts. Raises BadSettings where the data folder cannot be used."""
    try:
        return open_store(settings)
    except OSError as error:
        raise BadSettings(f"HYPERSAM_DATA_DIR cannot be used: {error.strerror}: {error.filename}") from error


def open_store(settings: Settings) -> ArtifactStore:
    """Return the store that the settings ask for. Nothing is sent yet to an object store."""
    if not settings.store_url:
        return ArtifactStore(settings.data_dir)
    from hypersam.store.objects import ObjectStore, connect

    return ObjectStore(settings.data_dir, connect(settings), cache_bytes=settings.cache_bytes)
