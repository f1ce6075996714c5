"""Where the tensors of a checkpoint lie in its file: PyTorch's zip and legacy files, and safetensors.

The file is mapped, and a tensor is a window of the mapping: what it declares is held against what is there before
anything of that size exists.
"""

from __future__ import annotations

import io
import json
import math
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hypersam.checkpoint_pickle import MAX_PICKLE_BYTES, read_pickle
from hypersam.checkpoint_tensors import TensorPlan
from hypersam.errors import CheckpointError, NotACheckpoint

MAX_HEADER_BYTES = 2 << 20
"""Of a safetensors header; the largest official checkpoint's would take 80 kB. As Python's objects JSON takes up to 70
times as much."""
MAX_DIRECTORY_BYTES = 8 << 20
"""Of a zip file's list of members."""
MAX_REUSE = 4
"""All tensors together may be this many times as large as their file: some are rightly stored once and used twice."""

_LEGACY_NUMBERS = (0x1950A86A20F9469CFC6C, 1001)
_LARGEST_EMPTY_SIDE = 1 << 31


class _Archive(io.BufferedReader):
    """A zip file of which no more is read at once than its list of members, or a pickle, may take.

    How long that list is, an archive says in places among which readers choose differently; a read is what counts.
    """

    def read(self, size: int | None = -1) -> bytes:
        """Read; without a size, which zipfile does at the end alone, up to the limit."""
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise ValueError(f"it lists its members in {_figure(size)} bytes; at most {MAX_DIRECTORY_BYTES} are read")
        return super().read(MAX_DIRECTORY_BYTES if size is None or size < 0 else size)


@dataclass(frozen=True)
class Pickled:
    """What a pickle describes, and the bytes (first, length) of each storage it names; ``name`` is the file's, for
    messages."""

    path: Path
    name: str
    content: Any
    spans: Mapping[str, tuple[int, int]]


# --- PyTorch's zip files ------------------------------------------------------------------------------------


def read_zip(path: Path, name: str) -> Pickled:
    """The pickle of an archive of ``torch.save`` and where its storages are. Raises CheckpointError's kinds."""
    try:
        with _Archive(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
            _check_no_program(archive, name)
            spans = _member_spans(archive, file, name)
            root = _root_of(archive, name)
            pickled = archive.read(f"{root}data.pkl")
            order = f"{root}byteorder"
            if order in spans and spans[order][1] < 16 and archive.read(order) != b"little":
                raise NotACheckpoint(f"{name} is of a big-endian machine; little-endian ones are read")
    except (zipfile.BadZipFile, OSError, ValueError, struct.error, NotImplementedError, EOFError) as error:
        raise NotACheckpoint(f"{name} is a truncated or damaged archive: {error}") from error
    start = f"{root}data/"
    storages = {member.removeprefix(start): span for member, span in spans.items() if member.startswith(start)}
    return Pickled(path, name, read_pickle(io.BytesIO(pickled), name), storages)


def _check_no_program(archive: zipfile.ZipFile, name: str) -> None:
    if any(member.endswith("/constants.pkl") and member.count("/") == 1 for member in archive.namelist()):
        raise NotACheckpoint(
            f"{name} is a TorchScript program, of which nothing is run or read; "
            "save the state dict alone: torch.save(model.state_dict(), …)"
        )


def _member_spans(archive: zipfile.ZipFile, file: BinaryIO, name: str) -> dict[str, tuple[int, int]]:
    """First byte and length of every member. Refuses what torch.save does not write: two of a name, compressed ones
    (which could be bombs), encrypted ones, and ones that share bytes."""
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for member in sorted(archive.infolist(), key=lambda m: m.header_offset):
        if member.filename in spans:
            raise NotACheckpoint(f"{name} holds two members called {ascii(member.filename)[:128]}")
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise NotACheckpoint(f"{name} holds compressed members; torch.save stores them uncompressed")
        if member.flag_bits & 1:
            raise NotACheckpoint(f"{name} holds encrypted members")
        file.seek(member.header_offset)
        header = file.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise NotACheckpoint(f"{name} is a truncated or damaged archive: a member is not where it is listed")
        first = member.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))
        if member.header_offset < end or first + member.file_size > archive.start_dir:
            raise NotACheckpoint(f"{name} holds members that overlap or reach beyond the archive")
        end = first + member.file_size
        spans[member.filename] = (first, member.file_size)
    return spans


def _root_of(archive: zipfile.ZipFile, name: str) -> str:
    """What stands before ``data.pkl``: a folder's name and a slash."""
    found = [m for m in archive.infolist() if m.filename.endswith("/data.pkl") and m.filename.count("/") == 1]
    if not found:
        raise NotACheckpoint(
            f"{name} is a zip file but no PyTorch checkpoint (it holds no data.pkl); "
            "if the checkpoint lies inside it, unpack it first"
        )
    if len(found) > 1:
        raise NotACheckpoint(f"{name} holds {len(found)} checkpoints; one was expected")
    if found[0].file_size > MAX_PICKLE_BYTES:
        raise NotACheckpoint(
            f"{name} describes its tensors in {found[0].file_size} bytes; at most {MAX_PICKLE_BYTES} are read"
        )
    return found[0].filename.removesuffix("data.pkl")


# --- PyTorch's legacy files ---------------------------------------------------------------------------------


def read_legacy(path: Path, name: str) -> Pickled:
    """The same of a file as ``torch.save`` wrote them before 1.6: five pickles, then the storages one after another."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = io.BytesIO(file.read(MAX_PICKLE_BYTES))
        numbers = [read_pickle(head, name)]
        if numbers[0] != _LEGACY_NUMBERS[0]:
            raise NotACheckpoint(f"{name} is a bare pickle; torch.save makes a checkpoint of a state dict")
        numbers.append(read_pickle(head, name))
        machine = read_pickle(head, name)
        if (
            numbers[1] != _LEGACY_NUMBERS[1]
            or not isinstance(machine, dict)
            or machine.get("little_endian") is not True
        ):
            raise NotACheckpoint(f"{name} is of an unknown version or of a big-endian machine")
        content = read_pickle(head, name)
        keys = read_pickle(head, name)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise NotACheckpoint(f"{name} is truncated or damaged: it does not list its storages")
        itemsizes = _itemsizes(content)
        spans: dict[str, tuple[int, int]] = {}
        place = head.tell()
        for key in keys:
            file.seek(place)
            raw = file.read(8)
            count = int.from_bytes(raw, "little")
            first, length = place + 8, count * itemsizes.get(key, 1)
            if len(raw) < 8 or first + length > size or key in spans:
                raise NotACheckpoint(f"{name} is truncated or damaged: a storage does not lie within it")
            spans[key] = (first, length)
            place = first + length
    if place != size:
        raise NotACheckpoint(f"{name} is damaged: {size - place} bytes follow its last storage")
    return Pickled(path, name, content, spans)


def _itemsizes(content: Any) -> dict[str, int]:
    """Bytes a value of every storage that the tensors in a nest of containers name."""
    found: dict[str, int] = {}
    seen: set[int] = set()
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, TensorPlan):
            found[value.storage.key] = value.storage.dtype.itemsize
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return found


# --- tensors of both ----------------------------------------------------------------------------------------


def tensors_of(pickled: Pickled, plans: Mapping[str, TensorPlan]) -> dict[str, Tensor]:
    """The tensors as windows of the mapped file; where it does not align their values, copies.

    Raises NotACheckpoint for a tensor that reaches beyond its storage or a storage beyond the file, CheckpointError
    for one whose values overlap and for tensors much larger than their file.
    """
    path, name = pickled.path, pickled.name
    size = path.stat().st_size
    total = sum(math.prod(plan.shape) * plan.dtype.itemsize for plan in plans.values())
    if total > MAX_REUSE * size:
        raise CheckpointError(
            f"the tensors of {name} take {_figure(total)} bytes, more than {MAX_REUSE} times the file's {size}"
        )
    mapped = torch.UntypedStorage.from_file(str(path), False, size)
    pieces: dict[str, torch.UntypedStorage] = {}
    found = {}
    for key, plan in plans.items():
        first, length = _span(pickled, key, plan)
        _check_window(name, key, plan, length)
        if 0 in plan.shape:
            found[key] = torch.empty(plan.shape, dtype=plan.dtype)
            continue
        if plan.storage.key not in pieces:
            piece = mapped[first : first + length]
            pieces[plan.storage.key] = piece.clone() if first % plan.dtype.itemsize else piece
        window = torch.empty(0, dtype=plan.dtype)
        found[key] = window.set_(pieces[plan.storage.key], plan.offset, plan.shape, plan.stride)
    return found


def _span(pickled: Pickled, key: str, plan: TensorPlan) -> tuple[int, int]:
    storage = plan.storage
    if storage.key not in pickled.spans:
        raise NotACheckpoint(f"{pickled.name} is truncated or damaged: the values of {key!r} are missing")
    first, length = pickled.spans[storage.key]
    if storage.count * storage.dtype.itemsize != length:
        raise NotACheckpoint(
            f"{pickled.name} is damaged: the storage of {key!r} should have "
            f"{_figure(storage.count * storage.dtype.itemsize)} bytes and has {length}"
        )
    return first, length


def _check_window(name: str, key: str, plan: TensorPlan, length: int) -> None:
    if 0 in plan.shape:
        if any(side >= _LARGEST_EMPTY_SIDE for side in plan.shape) or len([s for s in plan.shape if s > 1]) > 2:
            raise NotACheckpoint(f"{name} is damaged: {key!r} is empty and of an impossible shape")
        return
    reached = 1  # values from the first to the last, dimension by dimension
    for stride, side in sorted(zip(plan.stride, plan.shape, strict=True)):
        if side > 1 and stride < reached:
            raise CheckpointError(
                f"{name}: the values of {key!r} overlap; give it a storage of its own (.contiguous())"
            )
        reached += (side - 1) * stride
    if (plan.offset + reached) * plan.dtype.itemsize > length:
        raise NotACheckpoint(
            f"{name} is damaged: {key!r} takes {_figure((plan.offset + reached) * plan.dtype.itemsize)} bytes of a "
            f"storage of {length}"
        )


def _figure(number: int) -> str:
    return str(number) if number < 10**18 else "more than 10^18"


# --- safetensors --------------------------------------------------------------------------------------------


def read_safetensors(path: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, mapped. Raises NotACheckpoint."""
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise NotACheckpoint(f"{name} is a damaged safetensors file: {ascii(str(error))[1:-1][:300]}") from error


def _check_header(path: Path) -> None:
    """Refuse a header that would take long to read, and names that come twice, of which one would be lost."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"its header takes {length} bytes; at most {MAX_HEADER_BYTES} are read")
        json.loads(file.read(length), object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the name {key[:128]!r} comes twice")
        found[key] = value
    return found
