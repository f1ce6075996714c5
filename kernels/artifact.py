"""A compressed model as one safetensors file: written deterministically, read lazily, checked by sha256.

The format is on one screen in this room's README. The file is laid out here and not by ``safetensors``'s
writer, whose metadata comes out in no fixed order and which needs all streams in memory at once; it is read
through ``safetensors.safe_open``, which maps the file.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kernels.artifact_header import (
    DTYPE_NAMES,
    FORMAT,
    FORMAT_VERSION,
    FREE_WEIGHTS,
    MAX_HEADER_BYTES,
    WEIGHTS_PER_BYTE,
    TensorRecord,
    check_declared,
    parse_record,
    read_header,
)
from kernels.codec import ENCODINGS, Encoded, RawTensor, decode
from kernels.errors import ArtifactCorrupt, ArtifactError

_HASH_STEP = 1 << 24


# --- writing ---------------------------------------------------------------------------------------------


def write(
    path: Path,
    tensors: Mapping[str, Encoded],
    *,
    codec: Mapping[str, Any],
    model: Mapping[str, Any],
    source: Mapping[str, Any],
    report: Mapping[str, Any],
) -> None:
    """Write an artifact: under a temporary name beside ``path``, then synced and renamed over it.

    The four mappings go into the header as they are and must be JSON. The same arguments give the same bytes.
    No stream is copied, but one at a time where a tensor is not contiguous or not on the CPU. Raises
    ArtifactError for a tensor or header value that the format cannot hold, OSError when the disk refuses.
    """
    streams, prefix = _laid_out(tensors, {"codec": codec, "model": model, "source": source, "report": report})
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
    try:
        with temporary.open("xb") as file:
            file.write(prefix)
            for stream in streams.values():
                for piece in _pieces(stream):
                    file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def prefix_bytes(
    tensors: Mapping[str, Encoded],
    *,
    codec: Mapping[str, Any],
    model: Mapping[str, Any],
    source: Mapping[str, Any],
    report: Mapping[str, Any],
) -> int:
    """Bytes that ``write`` would put before the first stream; with the streams' own that is the file's size."""
    header = {"codec": codec, "model": model, "source": source, "report": report}
    return len(_laid_out(tensors, header)[1])


def _laid_out(tensors: Mapping[str, Encoded], header: Mapping[str, Any]) -> tuple[dict[str, Tensor], bytes]:
    """The streams in the file's order, and all that stands before them."""
    streams: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    for name in sorted(tensors):
        if not name or name == "__metadata__":
            raise ArtifactError(f"a tensor cannot be named {name!r}")
        streams[name], record = _record(name, tensors[name])
        records.append(record)
    text = _canonical({**header, "tensors": records})
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "header": base64.b64encode(zlib.compress(text.encode(), 9)).decode(),
        "header_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    # Widest elements first, as safetensors has it, so that every tensor is aligned in the mapped file.
    order = sorted(streams, key=lambda name: (-streams[name].element_size(), name))
    return {name: streams[name] for name in order}, _prefix(streams, order, metadata)


def _record(name: str, encoded: Encoded) -> tuple[Tensor, dict[str, Any]]:
    """The stream of a tensor and its record in the header."""
    if isinstance(encoded, RawTensor):
        stream = encoded.tensor.detach()
        if stream.dtype not in DTYPE_NAMES or stream.layout != torch.strided:
            raise ArtifactError(f"{name}: the format has no {stream.layout} tensors of {stream.dtype}")
        shape, dtype = tuple(stream.shape), stream.dtype
        record: dict[str, Any] = {"encoding": "raw"}
    else:
        stream, shape, dtype = encoded.stream(), encoded.shape, encoded.dtype
        record = {**encoded.constants(), "encoding": encoded.encoding}
    record |= {"name": name, "shape": list(shape), "dtype": DTYPE_NAMES[dtype], "sha256": _sha256(stream)}
    return stream, record


def _canonical(header: Mapping[str, Any]) -> str:
    try:
        return json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"the header must be JSON without NaN or infinity: {error}") from error


def _prefix(streams: Mapping[str, Tensor], order: list[str], metadata: Mapping[str, str]) -> bytes:
    """All that stands before the first stream: the length and safetensors' own JSON, padded to 8 bytes."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        start, end = end, end + streams[name].nbytes
        entries[name] = {
            "dtype": DTYPE_NAMES[streams[name].dtype],
            "shape": list(streams[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise ArtifactError(f"the header takes {len(text)} bytes; {MAX_HEADER_BYTES} are read at most")
    return struct.pack("<Q", len(text)) + text


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in pieces, without a copy where it is contiguous and on the CPU."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, data.size, _HASH_STEP):
        yield data[start : start + _HASH_STEP].data


def _sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    for piece in _pieces(tensor):
        digest.update(piece)
    # Half of it: small tensors are many, and 128 bits find every accident.
    return digest.hexdigest()[:32]


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` last; file systems that cannot sync folders are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --- reading ---------------------------------------------------------------------------------------------


def open_artifact(path: Path, *, verify: bool = True, max_weights: int | None = None) -> Artifact:
    """Open an artifact. ``verify``: check all streams now; else each when it is first read.

    ``max_weights``: how many values its tensors may declare together; None: as many as the file's size allows
    (``WEIGHTS_PER_BYTE``, ``FREE_WEIGHTS``), which holds in any case. Nothing of a declared size is allocated before.

    Raises ArtifactError for a file that is none, ArtifactVersion for another version of the format,
    ArtifactCorrupt for a damaged one, FileNotFoundError and other OSErrors as they come.
    """
    artifact = Artifact(Path(path), max_weights)
    if verify:
        try:
            artifact.verify()
        except BaseException:
            artifact.close()
            raise
    return artifact


class Artifact:
    """An open artifact; a context manager. Use ``open_artifact``.

    ``codec``, ``model``, ``source``, ``report``: the header's own mappings. ``records``: one a tensor, in order
    of names. Streams are mapped and read when asked for.
    """

    def __init__(self, path: Path, max_weights: int | None = None) -> None:
        self.path = path
        header = read_header(path)
        try:
            self.codec: dict[str, Any] = dict(header["codec"])
            self.model: dict[str, Any] = dict(header["model"])
            self.source: dict[str, Any] = dict(header["source"])
            self.report: dict[str, Any] = dict(header["report"])
            self.records = tuple(parse_record(record) for record in header["tensors"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactCorrupt(f"{path.name}: the header lacks or misstates {error}") from error
        check_declared(self.records, path, max_weights)
        self._by_name = {record.name: record for record in self.records}
        self._verified: set[str] = set()
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
            stored = set(self._file.keys())
        except SafetensorError as error:
            raise ArtifactCorrupt(f"{path.name}: {error}") from error
        if len(self._by_name) != len(self.records):
            self.close()
            raise ArtifactCorrupt(f"{path.name}: the header names a tensor twice")
        if stored != set(self._by_name):
            self.close()
            name = min(stored ^ set(self._by_name))
            where = "has no stream in the file" if name in self._by_name else "is not in the header"
            raise ArtifactCorrupt(f"{path.name}: tensor {name!r} {where}")

    def names(self) -> tuple[str, ...]:
        """The names of the tensors, sorted."""
        return tuple(record.name for record in self.records)

    def encoded(self, name: str) -> Encoded:
        """One tensor as it is stored, read from the mapped file and checked when it is first asked for.

        Raises KeyError for an unknown name, ArtifactCorrupt, naming the tensor, for a damaged one.
        """
        record = self._by_name[name]
        try:
            stream: Tensor = self._file.get_tensor(name)
        except SafetensorError as error:
            raise ArtifactCorrupt(f"{name}: {error}") from error
        if name not in self._verified:
            if _sha256(stream) != record.sha256:
                raise ArtifactCorrupt(f"{name}: the checksum of its stream does not match the header")
            self._verified.add(name)
        if record.encoding == "raw":
            if stream.dtype != record.dtype or tuple(stream.shape) != record.shape:
                raise ArtifactCorrupt(f"{name}: its stream has another shape or dtype than the header says")
            return RawTensor(stream)
        if stream.dtype != torch.uint8 or stream.dim() != 1:
            raise ArtifactCorrupt(f"{name}: a stream is a uint8 vector, not {stream.dtype} {tuple(stream.shape)}")
        try:
            return ENCODINGS[record.encoding].parse(record.shape, record.dtype, record.constants, stream)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise ArtifactCorrupt(f"{name}: {error}") from error

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors, dense, in the source's shapes and dtypes: bit for bit ``decode`` of each.

        They share no memory with the file. Raises ArtifactCorrupt, naming the tensor.
        """
        state = {}
        for name in self.names():
            encoded = self.encoded(name)
            try:
                state[name] = decode(encoded)
            except (ArtifactCorrupt, ValueError) as error:
                raise ArtifactCorrupt(f"{name}: {error}") from error
        return state

    def verify(self) -> None:
        """Check every stream against its checksum and its record. Raises ArtifactCorrupt, naming the tensor."""
        for name in self.names():
            self.encoded(name)

    def close(self) -> None:
        """Let go of the file. Tensors already given out stay valid."""
        self._file.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


__all__ = [
    "FORMAT", "FORMAT_VERSION", "FREE_WEIGHTS", "MAX_HEADER_BYTES", "WEIGHTS_PER_BYTE", "Artifact", "TensorRecord",
    "open_artifact", "prefix_bytes", "write",
]  # fmt: skip
