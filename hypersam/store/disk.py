"""Uploads, artifacts and the registrations of models, in one folder on disk.

    uploads/<sha256>          checkpoints as sent, named by their content
    artifacts/<sha256>.hsam   compressed models, named by their content
    models/<name>.json        which artifact a name stands for, and the report of its compression
    work/<job>.<random>/      what a running job writes; gone when it ends

Every file appears under its final name by one rename, so a reader sees it whole or not at all. What is half made is
held by its maker (``hypersam.store.held``), so that the next sweep removes what a killed process left, and no more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from hypersam.errors import InvalidName, NameTaken, StoreFull, UnknownModel, UnknownUpload, UploadTooLarge
from hypersam.store.held import PART, is_held_folder, new_folder, new_part, remove_abandoned

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
DIGEST = re.compile(r"[0-9a-f]{64}")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class ModelRecord:
    """A registered model: the name that users give, and what it stands for."""

    name: str
    digest: str  # sha256 of the artifact
    bytes: int  # of the artifact
    request: str  # JobSpec.key of the request that made it: tells whether a second one asks for the same
    source_sha256: str
    created: str  # ISO 8601, UTC
    report: Mapping[str, Any] = field(default_factory=dict)
    object: str = ""  # its key, in an object store


def check_name(name: str) -> str:
    """Return ``name`` if it may name a model, else raise ``InvalidName``."""
    if not NAME.fullmatch(name):
        raise InvalidName(
            f"{name[:140]!r} cannot name a model: 1 to 128 letters, digits, dots, dashes and underscores, "
            "and the first is a letter or a digit"
        )
    return name


@contextlib.contextmanager
def room(what: str) -> Iterator[None]:
    """Turn the system's 'no space left' into ``StoreFull``."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StoreFull(f"no room in the data folder for {what}") from error
        raise


class UploadWriter:
    """One upload on its way to disk: hashed while it is written, under a temporary name until ``commit``.

    ``write`` and ``finish`` block on the disk; call them from a thread when an event loop is waiting.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self.bytes = 0
        self.digest = ""
        with room("an upload"):
            self._file: BinaryIO = new_part(folder)
        self.path = Path(self._file.name)

    def write(self, data: bytes | bytearray) -> None:
        """Append ``data``. Raises ``UploadTooLarge`` and ``StoreFull``; the caller then calls ``discard``."""
        self.bytes += len(data)
        if self.bytes > self._max_bytes:
            raise UploadTooLarge(f"the checkpoint has more than the {self._max_bytes} bytes accepted here")
        self._hash.update(data)
        with room("the upload"):
            self._file.write(data)

    def flush(self) -> None:
        """Make what was written visible to readers of ``path``."""
        with room("the upload"):
            self._file.flush()

    def finish(self) -> str:
        """Flush to the disk and return the sha256 of everything written, in hexadecimal."""
        with room("the upload"):
            self._file.flush()
            os.fsync(self._file.fileno())
        self.digest = self._hash.hexdigest()
        return self.digest

    def stage(self) -> None:
        """Bring the finished upload where ``commit`` needs little time; nothing to do on a disk."""

    def commit(self) -> Path:
        """Give the upload its final name, its digest. An equal upload that is there already stays."""
        final = self._folder / self.digest
        self.path.replace(final)
        self._file.close()
        return final

    def discard(self) -> None:
        """Forget the upload if it was not committed. Safe to call at any time."""
        with contextlib.suppress(OSError):
            self._file.close()
        self.path.unlink(missing_ok=True)


class ArtifactStore:
    """The data folder. Methods block on the disk and may be called from several processes at once."""

    def __init__(self, data_dir: Path) -> None:
        self.root = data_dir.absolute()
        self.uploads = self.root / "uploads"
        self.artifacts = self.root / "artifacts"
        self.registrations = self.root / "models"
        self.work = self.root / "work"
        self._records: dict[str, tuple[tuple[int, int, int], ModelRecord]] = {}  # by name, with their files' versions
        for folder in (self.uploads, self.artifacts, self.registrations, self.work):
            folder.mkdir(parents=True, exist_ok=True)

    # uploads

    def new_upload(self, max_bytes: int) -> UploadWriter:
        """Open a place for an upload of at most ``max_bytes``."""
        return UploadWriter(self.uploads, max_bytes)

    def upload(self, digest: str) -> Path:
        """Return the path of the upload with that sha256, or raise ``UnknownUpload``."""
        path = self.uploads / digest
        if not DIGEST.fullmatch(digest) or not path.is_file():
            raise UnknownUpload(f"no upload with sha256 {digest[:64]!r} is held; send the file")
        return path

    def require_upload(self, digest: str) -> None:
        """Raise ``UnknownUpload`` unless the upload is held."""
        self.upload(digest)

    def touch_upload(self, digest: str) -> None:
        """Make an upload count as new, if it is there: something refers to it again."""
        if DIGEST.fullmatch(digest):
            with contextlib.suppress(FileNotFoundError):
                os.utime(self.uploads / digest)

    def remove_upload(self, digest: str) -> None:
        """Delete an upload if it is there."""
        if DIGEST.fullmatch(digest):
            (self.uploads / digest).unlink(missing_ok=True)

    # jobs' scratch space

    @contextlib.contextmanager
    def work_dir(self, job_id: str) -> Iterator[Path]:
        """Give an empty folder for what a job writes while it runs. What its earlier tries left goes.

        Each try has a folder of its own: one that was taken for lost may still be running.
        """
        for left in self.work.glob(f"{check_name(job_id)}.*"):
            remove_abandoned(left)
        with room("a job"):
            path, held = new_folder(self.work, job_id)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            held.close()

    # models

    def register(self, name: str, artifact: Path, *, digest: str, request: str, source_sha256: str,
                 report: Mapping[str, Any]) -> ModelRecord:  # fmt: skip
        """Move a finished artifact into the store and let ``name`` stand for it.

        ``artifact`` must lie in the same file system (a folder from ``work_dir``). Raises ``NameTaken`` when
        the name stands for what another request made; the same request again returns the record as it is.
        """
        check_name(name)
        with self._exclusive():
            existing = self.find(name)
            if existing is not None:
                if existing.request != request:
                    raise NameTaken(f"the name {name!r} belongs to another model; delete that one or choose another")
                return existing
            record = ModelRecord(
                name=name, digest=digest, bytes=artifact.stat().st_size, request=request,
                source_sha256=source_sha256, created=datetime.now(UTC).isoformat(timespec="seconds"),
                report=dict(report),
            )  # fmt: skip
            artifact.replace(self.artifacts / f"{digest}.hsam")
            self._write_json(self.registrations / f"{name}.json", asdict(record))
            return record

    def find(self, name: str) -> ModelRecord | None:
        """Return the record of a name, or None."""
        if not NAME.fullmatch(name):
            return None
        try:
            with (self.registrations / f"{name}.json").open(encoding="utf-8") as file:
                # Every request for a mask asks, and a large model's report takes milliseconds to parse.
                seen = os.fstat(file.fileno())
                version = (seen.st_ino, seen.st_mtime_ns, seen.st_size)
                held = self._records.get(name)
                if held is None or held[0] != version:
                    held = self._records[name] = (version, ModelRecord(**json.load(file)))
                return held[1]
        except (FileNotFoundError, NotADirectoryError):
            self._records.pop(name, None)
            return None

    def model(self, name: str) -> ModelRecord:
        """Return the record of a name, or raise ``UnknownModel``."""
        record = self.find(name)
        if record is None:
            raise UnknownModel(f"no model is called {name[:140]!r}")
        return record

    def models(self) -> list[ModelRecord]:
        """Return every registered model, by name."""
        names = sorted(path.stem for path in self.registrations.glob("*.json"))
        records = (self.find(name) for name in names)
        return [record for record in records if record is not None]

    def artifact(self, record: ModelRecord) -> Path:
        """Return where a model's artifact lies."""
        return self.artifacts / f"{record.digest}.hsam"

    def remove(self, name: str) -> ModelRecord:
        """Forget a name, and delete its artifact when no other name stands for it."""
        with self._exclusive():
            record = self.model(name)
            (self.registrations / f"{name}.json").unlink()
            if all(other.digest != record.digest for other in self.models()):
                self.artifact(record).unlink(missing_ok=True)
            return record

    # upkeep

    def sweep(self, max_age: float, keep: Container[str] | None = None) -> None:
        """Delete what killed processes left half made, and uploads that nobody touched for ``max_age`` seconds.

        ``keep`` has the sha256 of every upload that is still wanted, whatever its age; None: all of them stay.
        ``JobBoard.sweep`` knows which are wanted.
        """
        oldest = time.time() - max_age
        for path in (*self.uploads.iterdir(), *self.work.iterdir()):
            wanted = keep is None or path.name in keep
            if (path.parent == self.uploads and path.suffix == PART) or is_held_folder(path):
                remove_abandoned(path)
            elif not (DIGEST.fullmatch(path.name) and wanted):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < oldest:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._sweep_models(oldest)

    def _sweep_models(self, oldest: float) -> None:
        with self._exclusive():  # only who has this lock writes registrations, so what is half written is abandoned
            for part in self.registrations.glob(f".*{PART}"):
                part.unlink(missing_ok=True)
            old = {path for path in self.artifacts.glob("*.hsam") if path.stat().st_mtime < oldest}
            for path in old - {self.artifact(record) for record in self.models()} if old else ():
                path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise ``OSError`` or ``StoreFull`` unless the folder can be written."""
        probe = self.work / f"probe-{uuid.uuid4().hex}{PART}"
        with room("a probe"):
            probe.write_bytes(b"ok")
        probe.unlink()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One process at a time changes registrations. The system frees the lock if its holder dies."""
        with (self.root / "models.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write_json(self, path: Path, value: Mapping[str, Any]) -> None:
        temporary = path.with_name(f".{uuid.uuid4().hex}{PART}")
        with room("a registration"), temporary.open("x", encoding="utf-8") as file:
            json.dump(value, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
