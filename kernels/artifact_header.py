"""What stands before an artifact's streams: read within bounds, and nothing in it believed before it is checked."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from kernels.codec import ENCODINGS
from kernels.errors import ArtifactCorrupt, ArtifactError, ArtifactVersion

FORMAT = "hypersam"
FORMAT_VERSION = "1"

# Names of dtypes in safetensors' header and in ours.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MAX_HEADER_BYTES = 2 << 20
"""Of the header, packed or not; that of SAM ViT-H takes 0.3 MB. As Python's objects JSON takes up to 70 times
as much."""
MAX_DIMENSIONS = 64
"""As PyTorch has it."""
WEIGHTS_PER_BYTE, FREE_WEIGHTS = 32, 1 << 24
"""How many weights a file may declare: so many for each of its bytes (a quarter of a bit each), and these besides.
A stream of zeros or of one value takes next to nothing, so its length alone would not bound what decoding allocates."""


@dataclass(frozen=True)
class TensorRecord:
    """What the header says of one tensor. ``dtype`` and ``shape`` are the source's; ``constants`` are the
    codec's, empty for a raw tensor; ``sha256`` is of the stream's bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    encoding: str
    sha256: str
    constants: Mapping[str, Any]


def read_header(path: Path) -> dict[str, Any]:
    """The checked header of the file at ``path``; reads the prefix alone."""
    size = path.stat().st_size
    with path.open("rb") as file:
        entries = _read_prefix(file, size, path.name)
    metadata = entries.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ArtifactError(f"{path.name} is a safetensors file, but no compressed model of {FORMAT}")
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise ArtifactVersion(
            f"{path.name} is of format version {version}; this release reads version {FORMAT_VERSION}"
        )
    text = _unpacked(metadata.get("header"), path.name)
    if hashlib.sha256(text).hexdigest() != metadata.get("header_sha256"):
        raise ArtifactCorrupt(f"{path.name}: the checksum of the header does not match")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactCorrupt(f"{path.name}: the header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise ArtifactCorrupt(f"{path.name}: the header is no JSON object")
    return header


def _unpacked(packed: object, name: str) -> bytes:
    """The header's JSON from its deflated form, never more than a header may have."""
    try:
        if not isinstance(packed, str):
            raise ValueError("it is missing")
        inflate = zlib.decompressobj()
        deflated = base64.b64decode(packed, validate=True)
        text = inflate.decompress(deflated, MAX_HEADER_BYTES)
        if not inflate.eof or inflate.unused_data:
            raise ValueError("it does not end where it should")
        if base64.b64encode(deflated).decode() != packed or _padded(deflated, text):
            raise ValueError("bits that say nothing are not zero")
    except (ValueError, zlib.error) as error:
        raise ArtifactCorrupt(f"{name}: the header cannot be unpacked: {error}") from error
    return text


def _padded(deflated: bytes, text: bytes) -> bool:
    """Whether the bits between the end of deflate's last block and the next byte are others than zeros.

    They are if the text stays the same without the last bit that is set before zlib's checksum.
    """
    last = deflated[-5]
    without = bytes([last & ~(1 << (last.bit_length() - 1))]) if last else b"\0"
    try:
        return bool(last) and zlib.decompress(deflated[:-5] + without + deflated[-4:]) == text
    except zlib.error:
        return False


def check_declared(records: tuple[TensorRecord, ...], path: Path, max_weights: int | None) -> None:
    """Raise ArtifactError for more weights than a file of that size, or the caller, allows."""
    declared = sum(math.prod(record.shape) for record in records)
    size = path.stat().st_size
    allowed = WEIGHTS_PER_BYTE * size + FREE_WEIGHTS
    if declared > allowed:
        shown = f"{declared:.4g}" if declared < 1 << 1000 else "more than 1e300"
        raise ArtifactError(f"{path.name} declares {shown} weights in {size} bytes; at most {allowed} are read")
    if max_weights is not None and declared > max_weights:
        raise ArtifactError(f"{path.name} declares {declared} weights; at most {max_weights} are read here")


def _read_prefix(file: BinaryIO, size: int, name: str) -> dict[str, Any]:
    """Safetensors' own JSON; tells a file that is no safetensors from one that was cut off."""
    start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    opening = file.read(1)
    if opening == b"{" and MAX_HEADER_BYTES < length < size:
        raise ArtifactError(f"{name} has a header of {length} bytes; {MAX_HEADER_BYTES} are read at most")
    if not 2 <= length <= MAX_HEADER_BYTES or opening != b"{":
        raise ArtifactError(f"{name} is no safetensors file, so no compressed model")
    text = opening + file.read(length - 1)
    if len(text) < length:
        raise ArtifactCorrupt(f"{name} is cut off within its header: {size} of {8 + length} bytes")
    try:
        entries = json.loads(text)
        end = max((entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"), default=0)
        expected = 8 + length + int(end)
    except (ValueError, RecursionError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ArtifactError(f"{name} is no safetensors file, so no compressed model: {error}") from error
    if size != expected:
        raise ArtifactCorrupt(f"{name} has {size} bytes, but its header says {expected}; it was cut off or appended to")
    return dict(entries)


def parse_record(record: Mapping[str, Any]) -> TensorRecord:
    """A record as the header has it. Raises ArtifactVersion for an unknown encoding, else KeyError, TypeError or
    ValueError."""
    encoding = record["encoding"]
    if encoding != "raw" and encoding not in ENCODINGS:
        raise ArtifactVersion(f"{record['name']}: this release does not read the encoding {encoding!r}")
    shape = tuple(record["shape"])
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
        raise ValueError(f"the shape of {record['name']}")
    known = ("name", "shape", "dtype", "encoding", "sha256")
    constants = {key: value for key, value in record.items() if key not in known}
    return TensorRecord(
        str(record["name"]), shape, _DTYPES[record["dtype"]], encoding, str(record["sha256"]), constants
    )
