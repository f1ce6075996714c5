"""The store in an S3-compatible object store, which several hosts share.

    uploads/<sha256>                    checkpoints as sent
    artifacts/<sha256>/<random>.hsam    compressed models; each belongs to one registration
    models/<name>.json                  registrations, made by a put that fails where the name is taken

An object of S3 appears whole or not at all, a multipart one too. The data folder holds copies of what this host uses
and what its jobs write. docs/adr/0008-object-store.md says why it is so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
import uuid
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError, NotModifiedError
from obstore.store import S3Store

from hypersam.errors import BadSettings, NameTaken, StoreUnavailable, UnknownModel, UnknownUpload
from hypersam.settings import Settings
from hypersam.store.cache import DiskCache
from hypersam.store.disk import DIGEST, NAME, ArtifactStore, ModelRecord, UploadWriter, check_name, room
from hypersam.store.held import PART, remove_abandoned

log = logging.getLogger(__name__)

ABSENT = (NotFoundError, FileNotFoundError)  # obstore raises the one or the other
BLOCK = 16 << 20  # bytes of one request


def connect(settings: Settings) -> S3Store:
    """Return a client for ``store_url``. Credentials come from AWS_* variables. Nothing is sent yet.

    Raises BadSettings where there can be no client.
    """
    config: Any = {"aws_checksum_algorithm": "SHA256"}
    if settings.store_endpoint:
        config["aws_endpoint"] = settings.store_endpoint
    if settings.store_region:
        config["aws_region"] = settings.store_region
    try:
        return S3Store.from_url(
            settings.store_url,
            config=config,
            client_options={"allow_http": settings.store_allow_http, "connect_timeout": "3s", "timeout": "60s"},
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=20)},
        )
    except BaseError as error:
        why = str(error).partition("\n")[0]  # the client's own state follows
        raise BadSettings(f"HYPERSAM_STORE_URL cannot be used: {why}") from error


def reach(settings: Settings) -> None:
    """Ask the object store for one thing that need not be there. Raises StoreUnavailable; leaves nothing behind."""
    with contextlib.suppress(*ABSENT), _reached("ask for an object"):
        obstore.head(connect(settings), "models/.check")


@contextlib.contextmanager
def _reached(what: str) -> Iterator[None]:
    """Turn what the client raises, but for the answers that are asked for, into ``StoreUnavailable``."""
    try:
        yield
    except (AlreadyExistsError, NotModifiedError, *ABSENT):
        raise
    except (BaseError, OSError) as error:
        log.warning("object store: %s: %s", what, type(error).__name__)
        log.debug("object store: %s", error)
        raise StoreUnavailable(f"the object store does not let us {what}; try again") from error


class ObjectUploadWriter(UploadWriter):
    """An upload that goes to the object store once it is whole."""

    def __init__(self, store: ObjectStore, max_bytes: int) -> None:
        super().__init__(store.uploads, max_bytes)
        self._store = store

    def stage(self) -> None:
        """Send the upload, unless an equal one is there. Raises StoreUnavailable."""
        key = f"uploads/{self.digest}"
        if self._store.size(key) != self.bytes:
            self._store.send(self.path, key)

    def commit(self) -> Path:
        """See that the upload is there; the copy on this disk goes."""
        self.stage()
        self.discard()
        return self.path


class ObjectStore(ArtifactStore):
    """The same methods over an object store. They block on the network, and may raise StoreUnavailable."""

    def __init__(self, data_dir: Path, remote: S3Store, *, cache_bytes: int) -> None:
        super().__init__(data_dir)
        self.remote = remote
        self._known: dict[str, tuple[str, ModelRecord]] = {}  # by name, with its ETag
        self._cache = DiskCache(self.artifacts, self.root / "locks", cache_bytes)
        self._sources = DiskCache(self.uploads, self.root / "locks", 1 << 62)  # they go with their jobs

    # objects

    def size(self, key: str) -> int | None:
        """Bytes of an object, None if it is not there."""
        try:
            with _reached("ask for an object"):
                return int(obstore.head(self.remote, key)["size"])
        except ABSENT:
            return None

    def send(self, path: Path, key: str) -> None:
        """Upload a file in parts; the object appears when all are there, and its size is compared."""
        with _reached("send a file"):
            obstore.put(self.remote, key, path, chunk_size=BLOCK, max_concurrency=4)
        if self.size(key) != path.stat().st_size:
            raise StoreUnavailable("the object store holds another number of bytes than were sent")

    def _blocks(self, key: str, size: int) -> Iterator[bytes]:
        for start in range(0, size, BLOCK):
            with _reached("read an object"):
                yield bytes(obstore.get_range(self.remote, key, start=start, end=min(start + BLOCK, size)))

    def _delete(self, key: str) -> None:
        with contextlib.suppress(*ABSENT), _reached("delete an object"):
            obstore.delete(self.remote, key)

    def _listed(self, prefix: str) -> Iterator[Mapping[str, Any]]:
        with _reached("list objects"):
            for page in obstore.list(self.remote, prefix):
                yield from page

    # uploads

    def new_upload(self, max_bytes: int) -> UploadWriter:
        return ObjectUploadWriter(self, max_bytes)

    def require_upload(self, digest: str) -> None:
        if not DIGEST.fullmatch(digest) or self.size(f"uploads/{digest}") is None:
            raise UnknownUpload(f"no upload with sha256 {digest[:64]!r} is held; send the file")

    def upload(self, digest: str) -> Path:
        self.require_upload(digest)
        key = f"uploads/{digest}"
        try:
            size = self.size(key) or 0
            with room("a copy of an upload"):
                return self._sources.get(digest, digest, size, self._blocks(key, size))
        except ABSENT:
            raise UnknownUpload(f"the upload with sha256 {digest} was deleted; send the file") from None

    def remove_upload(self, digest: str) -> None:
        super().remove_upload(digest)
        if DIGEST.fullmatch(digest):
            self._delete(f"uploads/{digest}")

    # models

    def register(self, name: str, artifact: Path, *, digest: str, request: str, source_sha256: str,
                 report: Mapping[str, Any]) -> ModelRecord:  # fmt: skip
        """Send a finished artifact, then let ``name`` stand for it unless it is taken; see ``ArtifactStore``."""
        check_name(name)
        if (existing := self.find(name)) is not None:
            return _same(existing, request)
        record = ModelRecord(
            name=name, digest=digest, bytes=artifact.stat().st_size, request=request, source_sha256=source_sha256,
            created=datetime.now(UTC).isoformat(timespec="seconds"), report=dict(report),
            object=f"artifacts/{digest}/{uuid.uuid4().hex}.hsam",
        )  # fmt: skip
        self.send(artifact, record.object)
        body = json.dumps(asdict(record), sort_keys=True).encode()
        try:
            with _reached("register a model"):
                obstore.put(self.remote, f"models/{name}.json", body, mode="create", use_multipart=False)
        except AlreadyExistsError:
            # Ours too, if the client sent it a second time because the first answer was lost.
            winner = self.model(name)
            if winner.object != record.object:
                self._delete(record.object)
            return _same(winner, request)
        return record

    def find(self, name: str) -> ModelRecord | None:
        if not NAME.fullmatch(name):
            return None
        held = self._known.get(name)
        try:
            with _reached("read a registration"):
                options: Any = {} if held is None else {"if_none_match": held[0]}
                answer = obstore.get(self.remote, f"models/{name}.json", options=options)
                body, tag = bytes(answer.bytes()), answer.meta["e_tag"] or ""
        except NotModifiedError:
            assert held is not None
            return held[1]
        except ABSENT:
            self._known.pop(name, None)
            return None
        except StoreUnavailable:
            # What this host has seen it goes on serving: a copy of the artifact is on its disk, or in its memory.
            if held is None:
                raise
            return held[1]
        record = ModelRecord(**json.loads(body))
        if tag:
            self._known[name] = (tag, record)
        return record

    def models(self) -> list[ModelRecord]:
        names = sorted(str(each["path"]).removeprefix("models/")[: -len(".json")] for each in self._listed("models/"))
        return [record for record in map(self.find, names) if record is not None]

    def artifact(self, record: ModelRecord) -> Path:
        """Return where this host's copy lies, after fetching it if need be. Raises UnknownModel if it is gone."""
        name = f"{record.digest}.hsam"
        try:
            with room("a copy of an artifact"):
                return self._cache.get(name, record.digest, record.bytes, self._blocks(record.object, record.bytes))
        except ABSENT:
            raise UnknownModel(f"the artifact of {record.name!r} is gone from the object store") from None

    def remove(self, name: str) -> ModelRecord:
        """Forget a name and delete the artifact that belongs to it."""
        record = self.model(name)
        self._delete(f"models/{name}.json")
        self._delete(record.object)
        return record

    # upkeep

    def sweep(self, max_age: float, keep: Container[str] | None = None) -> None:
        """As on disk; besides, artifacts that no registration has. What cannot be reached is left for next time."""
        super().sweep(max_age, keep)
        oldest = datetime.fromtimestamp(time.time() - max_age, UTC)
        try:
            for each in self._listed("uploads/"):
                digest = str(each["path"]).removeprefix("uploads/")
                if keep is not None and digest not in keep and each["last_modified"] < oldest:
                    self._delete(f"uploads/{digest}")
            old = [str(each["path"]) for each in self._listed("artifacts/") if each["last_modified"] < oldest]
            if old:  # listed before the registrations are read: what is registered meanwhile is younger
                owned = {record.object for record in self.models()}
                for key in set(old) - owned:
                    self._delete(key)
        except StoreUnavailable as error:
            log.warning("the object store is not swept this time: %s", error)

    def _sweep_models(self, oldest: float) -> None:
        for part in self.artifacts.glob(f"*{PART}"):  # of a fetch that was killed
            remove_abandoned(part)

    def check(self) -> None:
        """Raise unless the data folder can be written and the object store answers (one HEAD request)."""
        super().check()
        self.size("models/.check")


def _same(record: ModelRecord, request: str) -> ModelRecord:
    if record.request != request:
        raise NameTaken(f"the name {record.name!r} belongs to another model; delete that one or choose another")
    return record
