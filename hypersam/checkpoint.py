"""Reading checkpoints that nobody vouches for.

A checkpoint is a PyTorch archive (``.pth``, ``.pt``, ``.bin``) or a safetensors file. Pickles are read with
``weights_only=True`` and nothing else: PyTorch's restricted unpickler knows tensors and plain containers,
and whatever else a pickle asks for is refused, never run. Archives are memory-mapped, so that a file of
many gigabytes costs no more memory than the tensor at hand.
"""

from __future__ import annotations

import hashlib
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hypersam.errors import (
    CheckpointError,
    EmptyCheckpoint,
    NotACheckpoint,
    UnsafeCheckpoint,
)  # fmt: skip

_CALLS = frozenset({"GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "REDUCE", "BUILD"})
_WRAPPERS = ("model", "state_dict")
_HASH_BLOCK = 4 << 20
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e"
"""How torch.save began files before its zip format: protocol 2, the long 0x1950a86a20f9469cfc6c, stop."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, and what was around them.

    ``tensors`` maps a key, wrappers and ``module.`` prefix removed, to a CPU tensor, often memory-mapped.
    ``container`` is ``zip``, ``legacy`` or ``safetensors``. ``wrapper`` tells where the state dict lay
    (``""``, ``"model"``, ``"state_dict"``), ``prefix`` what every key began with.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    container: str
    wrapper: str
    prefix: str

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(t.numel() for t in self.tensors.values())


def container_of(path: Path) -> str:
    """``zip``, ``legacy`` or ``safetensors``, told from the first bytes alone.

    Raises EmptyCheckpoint or NotACheckpoint.
    """
    size = path.stat().st_size
    if size == 0:
        raise EmptyCheckpoint(f"{path.name} is empty; a SAM checkpoint (.pth, .pt, .safetensors) was expected")
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "safetensors"
    if head[: len(_LEGACY_MAGIC)] == _LEGACY_MAGIC or head[:1] == b"\x80":
        return "legacy"
    raise NotACheckpoint(
        f"{path.name} is not a checkpoint: it begins with {head[:8]!r}, which is neither a PyTorch archive "
        "(.pth, .pt) nor a safetensors file"
    )


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Hex SHA-256 of a file, read in blocks of 4 MiB; ``progress`` is told the bytes read so far."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
            done += len(block)
            if progress:
                progress(done)
    return digest.hexdigest()


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read the state dict in a file.

    Raises CheckpointError in one of its kinds: empty, not a checkpoint or damaged, a pickle that asks for
    more than tensors, or one whose content is no state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise NotACheckpoint(f"there is no file {path}")
    container = container_of(path)
    content = _load_safetensors(path) if container == "safetensors" else _load_pickle(path, container)
    wrapper, state = _unwrap(content, path.name)
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    tensors = {key[len(prefix) :]: value for key, value in state.items()}
    return Checkpoint(path, tensors, container, wrapper, prefix)


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise NotACheckpoint(f"{path.name} is a damaged safetensors file: {error}") from error


def _load_pickle(path: Path, container: str) -> Any:
    if container == "zip":
        _check_archive(path)
    try:
        with warnings.catch_warnings():
            # It warns of what the checks that follow decide: foreign pickle protocols, sparse tensors.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=container == "zip")
    except pickle.UnpicklingError as error:
        message = str(error)
        if "Unsupported global" in message or "GLOBAL" in message or "Unsupported class" in message:
            asked = message.partition("GLOBAL ")[2].split(" ")[0] or "something else than tensors"
            raise UnsafeCheckpoint(
                f"{path.name} is a pickle that asks for {asked}; only tensors in plain dictionaries are read. "
                "Nothing was executed. Save the state dict alone: torch.save(model.state_dict(), …)"
            ) from error
        if container == "legacy" and _calls_something(path):
            raise UnsafeCheckpoint(
                f"{path.name} is a bare pickle that asks for more than plain data. Nothing was executed. "
                "Save the state dict alone: torch.save(model.state_dict(), …)"
            ) from error
        raise NotACheckpoint(f"{path.name} is not a readable PyTorch file, or a damaged one") from error
    except (RuntimeError, ValueError, EOFError, KeyError, IndexError, AttributeError, TypeError, OSError,
            AssertionError, UnicodeDecodeError, OverflowError, zipfile.BadZipFile) as error:  # fmt: skip
        # The unpickler of torch lets all of these out when the bytes make no sense.
        raise NotACheckpoint(f"{path.name} is truncated or damaged: {_first_line(error)}") from error


def _calls_something(path: Path) -> bool:
    """Whether the first pickle in a file names a global or calls one, read without executing it."""
    with path.open("rb") as file:
        try:
            return any(op.name in _CALLS for op, _, _ in pickletools.genops(file))
        except (ValueError, IndexError, KeyError, EOFError, UnicodeDecodeError, OverflowError, MemoryError):
            return False


def _check_archive(path: Path) -> None:
    """Refuse zip files that torch.save did not write: cut ones, and compressed ones, which could be bombs."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise NotACheckpoint(f"{path.name} is a truncated or damaged archive: {error}") from error
    if not any(m.filename.endswith("data.pkl") for m in members):
        raise NotACheckpoint(
            f"{path.name} is a zip file but no PyTorch checkpoint (it holds no data.pkl); "
            "if the checkpoint lies inside it, unpack it first"
        )
    if any(m.compress_type != zipfile.ZIP_STORED for m in members):
        raise NotACheckpoint(f"{path.name} holds compressed members; torch.save stores them uncompressed")


def _unwrap(content: Any, name: str) -> tuple[str, dict[str, Tensor]]:
    wrapper = ""
    if isinstance(content, Mapping):
        for key in _WRAPPERS:
            if isinstance(content.get(key), Mapping):
                wrapper, content = key, content[key]
                break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name} holds a {type(content).__name__}; a state dict (names to tensors) was expected")
    if not content:
        raise EmptyCheckpoint(f"{name} holds a state dict without tensors")
    state = dict(content)
    strange = [f"{key!r} ({type(value).__name__})" for key, value in state.items()
               if not isinstance(key, str) or not isinstance(value, Tensor)]  # fmt: skip
    if strange:
        raise CheckpointError(f"{name} is no plain state dict: {', '.join(strange[:5])} should be names with tensors")
    for key, value in state.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise CheckpointError(f"{name}: {key!r} is a sparse, quantised or meta tensor; dense ones are read")
        if value.is_complex():
            raise CheckpointError(f"{name}: {key!r} is complex; real tensors were expected")
    return wrapper, state


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
