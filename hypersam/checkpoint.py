"""Reading checkpoints that nobody vouches for.

A checkpoint is a PyTorch archive (``.pth``, ``.pt``, ``.bin``) or a safetensors file. Pickles are read as data by
``hypersam.checkpoint_pickle``, which knows tensors and plain containers: whatever else a pickle asks for is refused,
never run. Files are memory-mapped, so that one of many gigabytes costs no more memory than the tensor at hand; reading
one takes at most ``MEMORY_FACTOR`` times its size and ``MEMORY_FLOOR`` bytes, whatever it declares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypersam.checkpoint_files import Pickled, read_legacy, read_safetensors, read_zip, tensors_of
from hypersam.checkpoint_tensors import Other, TensorPlan
from hypersam.errors import CheckpointError, EmptyCheckpoint, NotACheckpoint

MEMORY_FACTOR = 2
MEMORY_FLOOR = 256 << 20
MAX_KEY = 512
"""Characters of a tensor's name."""

_DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
})  # fmt: skip
"""Those that an artifact holds and a network computes with."""
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module", "net", "sam", "sam_model", "ema", "model_ema")
"""Where scripts keep a state dict beside other things; of several in one file the first counts, so that averaged
weights are taken where there are no others."""
_MOST_WRAPPERS = 4
"""One within the other; a pickle's dictionary can hold itself."""
_PREFIXES = ("module.", "model.", "net.", "sam.", "sam_model.", "_orig_mod.")
"""What all keys begin with where a network was an attribute of another: of nn.DataParallel, of a training script's
module, or of what torch.compile gives."""
_PLAIN = (int, float, str, type(None))
_DECODER_PARTS = {"PromtEncoder": "prompt_encoder.", "PromptEncoder": "prompt_encoder.", "MaskDecoder": "mask_decoder."}
"""How MobileSAMv2's file of a decoder alone is laid out (its spelling), and what its keys begin with in a whole SAM."""
_ENCODER = "image_encoder."
_HASH_BLOCK = 4 << 20
_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e"
"""How torch.save began files before its zip format: protocol 2, the long 0x1950a86a20f9469cfc6c, stop."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, and what was around them.

    ``tensors`` maps a key, wrappers and prefix removed, to a CPU tensor, often memory-mapped. ``container`` is
    ``zip``, ``legacy`` or ``safetensors``. ``wrapper`` tells where the state dict lay (``""``, ``"model"``,
    ``"state_dict.model"`` for one within another; ``"parts"`` for a decoder's file that has a state dict a part),
    ``prefix`` what every key began with (``"module."``, ``"model._orig_mod."``). ``passed_over`` names the numbers and
    strings that lay among the tensors. Where there were two files ``path``, ``container`` and ``wrapper`` are the
    encoder's, and ``prefix`` is empty, for their keys became those of one.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    container: str
    wrapper: str
    prefix: str
    passed_over: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(t.numel() for t in self.tensors.values())


@dataclass(frozen=True)
class Source:
    """The file, or the two files, of a model; all but ``path`` as ``compress`` takes them."""

    path: Path
    decoder: Path | str | None = None
    file_name: str | None = None
    decoder_name: str | None = None

    @property
    def name(self) -> str:
        """What the first file is called, fit for messages."""
        return _printable(self.file_name or self.path.name)

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files."""
        return (self.path, Path(self.decoder)) if self.decoder else (self.path,)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(path.stat().st_size for path in self.paths)

    def read(self) -> Checkpoint:
        """See ``read_checkpoint``."""
        return read_checkpoint(self.path, self.decoder, name=self.file_name, decoder_name=self.decoder_name)


def container_of(path: Path, name: str | None = None) -> str:
    """``zip``, ``legacy`` or ``safetensors``, told from the first bytes alone.

    ``name``: what messages call the file, if not as its path does. Raises EmptyCheckpoint or NotACheckpoint.
    """
    name = name or path.name
    size = path.stat().st_size
    if size == 0:
        raise EmptyCheckpoint(f"{name} is empty; a SAM checkpoint (.pth, .pt, .safetensors) was expected")
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if len(head) >= 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size:
        return "safetensors"
    if head[: len(_LEGACY_MAGIC)] == _LEGACY_MAGIC or head[:1] == b"\x80":
        return "legacy"
    raise NotACheckpoint(
        f"{name} is not a checkpoint: it begins with {head[:8]!r}, which is neither a PyTorch archive "
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


def read_checkpoint(
    path: Path | str, decoder: Path | str | None = None, *, name: str | None = None, decoder_name: str | None = None
) -> Checkpoint:
    """Read the state dict in a file, or in two: an image encoder, with or without its prefix, and ``decoder``, the
    prompt encoder and mask decoder that go with it, as MobileSAMv2 is published. ``name`` and ``decoder_name``: what
    messages call the files where their paths do not say.

    Raises CheckpointError in one of its kinds: empty, not a checkpoint or damaged, a pickle that asks for
    more than tensors, or one whose content is no state dict.
    """
    path = Path(path)
    name = _printable(name or path.name)
    if decoder is not None:
        second = _printable(decoder_name or Path(decoder).name)
        return _joined(read_checkpoint(path, name=name), name, read_checkpoint(decoder, name=second), second)
    if not path.is_file():
        raise NotACheckpoint(f"there is no file {path}")
    container = container_of(path, name)
    pickled: Pickled | None = None
    if container == "safetensors":
        content: Any = read_safetensors(path, name)
    else:
        pickled = read_zip(path, name) if container == "zip" else read_legacy(path, name)
        content = pickled.content
    wrapper, state, passed_over = _unwrap(content, name)
    tensors = _checked(state if pickled is None else tensors_of(pickled, state), name)
    prefix = _prefix_of(tensors)
    bare = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return Checkpoint(path, bare, container, wrapper, prefix, passed_over)


def _prefix_of(keys: Collection[str]) -> str:
    """All of ``_PREFIXES``, one after another, that every key begins with and goes on behind."""
    found = ""
    while keys and (more := next((p for p in _PREFIXES if all(k.startswith(p, len(found)) for k in keys)), "")):
        found += more
    return found if all(len(key) > len(found) for key in keys) else ""


def _printable(name: str) -> str:
    """A file's name in a message: whoever uploads a file chooses it."""
    return "".join(each if each.isprintable() else "?" for each in name[:MAX_KEY])


def _joined(encoder: Checkpoint, encoder_name: str, decoder: Checkpoint, decoder_name: str) -> Checkpoint:
    starts = tuple(_DECODER_PARTS.values())
    if strange := [key for key in decoder.tensors if not key.startswith(starts)]:
        raise CheckpointError(
            f"{decoder_name} is no decoder: {strange[0]!r} belongs to none; a prompt encoder and a mask decoder "
            f"({', '.join(sorted(set(starts)))}) were expected"
        )
    if any(key.startswith(starts) for key in encoder.tensors):
        raise CheckpointError(f"{encoder_name} has a decoder of its own; send it without another")
    # Where some keys have the prefix and some do not, they stay as they are, for the layout's check to name them.
    prefixed = any(key.startswith(_ENCODER) for key in encoder.tensors)
    whole = {key if prefixed else _ENCODER + key: value for key, value in encoder.tensors.items()}
    passed_over = encoder.passed_over + decoder.passed_over
    return replace(encoder, tensors=whole | dict(decoder.tensors), prefix="", passed_over=passed_over)


def _unwrap(content: Any, name: str) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Where the state dict lies, what it holds, names to tensors or to the plans of tensors, and the names of what
    else lay among them."""
    wrappers: list[str] = []
    if isinstance(content, Mapping):
        while len(wrappers) < _MOST_WRAPPERS and (inner := _wrapper_in(content)):
            wrappers.append(inner)
            content = content[inner]
        if content and all(key in _DECODER_PARTS and isinstance(part, Mapping) for key, part in content.items()):
            wrappers = ["parts"]
            if len({_DECODER_PARTS[key] for key in content}) < len(content):
                raise CheckpointError(f"{name} has a part twice: {', '.join(map(_shown, content))}")
            content = {
                _DECODER_PARTS[key] + name if isinstance(name, str) else name: value
                for key, part in content.items() for name, value in _without_prefix(part).items()
            }  # fmt: skip
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name} holds {_kind(content)}; a state dict (names to tensors) was expected")
    if not content:
        raise EmptyCheckpoint(f"{name} holds a state dict without tensors")
    for key, value in content.items():
        if isinstance(value, Other) and value.tensor:
            raise CheckpointError(f"{name}: {_shown(key)} is {value.what}; dense ones are read")
    tensors = {key: value for key, value in content.items() if _is_tensor(value)}
    # Scripts put an epoch, a name or a version beside the weights; whatever else is there may be weights of some form.
    passed_over = tuple(key for key, value in content.items() if tensors and isinstance(value, _PLAIN))
    known = tensors.keys() | set(passed_over)
    strange = [f"{_shown(key)} ({_kind(value)})" for key, value in content.items()
               if not isinstance(key, str) or key not in known]  # fmt: skip
    if strange:
        raise CheckpointError(f"{name} is no plain state dict: {', '.join(strange[:5])} should be names with tensors")
    for key in content:
        if not key.isprintable() or len(key) > MAX_KEY:
            raise CheckpointError(f"{name}: {_shown(key)} names no tensor; up to {MAX_KEY} printable characters do")
    return ".".join(wrappers), tensors, passed_over


def _wrapper_in(content: Mapping[Any, Any]) -> str:
    """Under which of ``_WRAPPERS`` the state dict lies; "" where the names of tensors show that this is one."""
    if any(isinstance(key, str) and "." in key and _is_tensor(value) for key, value in content.items()):
        return ""
    found = [key for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
    # Some scripts keep the network's description under the name that others have for its weights.
    return next((key for key in found if _has_weights(content[key])), found[0] if found else "")


def _has_weights(content: Mapping[Any, Any]) -> bool:
    """Whether there are tensors in it, or what may have them in turn."""
    return any(map(_is_tensor, content.values())) or any(
        isinstance(content.get(key), Mapping) for key in (*_WRAPPERS, *_DECODER_PARTS)
    )


def _without_prefix(part: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """A part of a decoder's file, whose tensors may have a prefix of their own."""
    prefix = _prefix_of([key for key, value in part.items() if isinstance(key, str) and _is_tensor(value)])
    return {key.removeprefix(prefix) if isinstance(key, str) else key: value for key, value in part.items()}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Tensor, TensorPlan))


def _checked(tensors: Mapping[str, Tensor], name: str) -> Mapping[str, Tensor]:
    for key, value in tensors.items():
        if value.is_complex():
            raise CheckpointError(f"{name}: {key!r} is complex; real tensors were expected")
        if value.dtype not in _DTYPES:
            raise CheckpointError(f"{name}: {key!r} is of {value.dtype}, which no network here computes with")
    return tensors


def _kind(value: Any) -> str:
    if isinstance(value, Other):
        return value.what
    return "a Tensor" if _is_tensor(value) else f"a {type(value).__name__}"


def _shown(key: Any) -> str:
    """A key in a message: short, and nothing in it that a log or a terminal would obey."""
    text = key if isinstance(key, str) else str(key) if isinstance(key, (int, float)) else type(key).__name__
    return ascii(text[:128])
