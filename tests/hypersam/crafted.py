"""Checkpoints put together by hand: pickles, archives and headers that no library would write."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

START, END = b"\x80\x02", b"."
NONE, TRUE, FALSE, MARK = b"N", b"\x88", b"\x89", b"("


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if 0 <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = pickle.encode_long(value)  # type: ignore[attr-defined]
    return b"\x8a" + bytes([len(data)]) + data


def tuple_of(*items: bytes) -> bytes:
    return MARK + b"".join(items) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + b"R"


def storage(key: str, count: int, kind: str = "FloatStorage") -> bytes:
    return tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), number(count)) + b"Q"


def tensor(
    shape: tuple[int, ...], stride: tuple[int, ...], *, count: int, key: str = "0", offset: int = 0,
    kind: str = "FloatStorage",
) -> bytes:  # fmt: skip
    sizes = [tuple_of(*map(number, numbers)) for numbers in (shape, stride)]
    hooks = called(name("collections", "OrderedDict"))
    return called(
        name("torch._utils", "_rebuild_tensor_v2"), storage(key, count, kind), number(offset), *sizes, FALSE, hooks
    )


def state(**tensors: bytes) -> bytes:
    return dictionary(*((key, value) for key, value in tensors.items()))


def dictionary(*items: tuple[str, bytes]) -> bytes:
    return b"}" + MARK + b"".join(text(key) + value for key, value in items) + b"u"


def archive(
    path: Path, content: bytes, storages: Mapping[str, bytes] | None = None, *,
    compression: int = zipfile.ZIP_STORED,
) -> Path:  # fmt: skip
    """A file like torch.save's, of a pickle's instructions."""
    with zipfile.ZipFile(path, "w", compression) as target:
        target.writestr("archive/data.pkl", START + content + END)
        target.writestr("archive/byteorder", b"little")
        for key, data in (storages or {}).items():
            target.writestr(f"archive/data/{key}", data)
        target.writestr("archive/version", b"3\n")
    return path


def safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path
