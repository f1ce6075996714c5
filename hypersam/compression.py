"""A checkpoint in, a compressed model and a report out."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypersam.checkpoint import read_checkpoint, sha256_of
from hypersam.errors import InvalidOption, artifact_errors
from hypersam.loading import is_artifact, resolve_device
from hypersam.sam.detect import Detected, detect, linear_weights
from hypersam.sam.families.sam_vit import SamViT
from kernels import artifact as artifact_format
from kernels.codec import BirkhoffConfig, BirkhoffTensor, Encoded, RawTensor, decode, encode

CODECS = ("birkhoff",)
MAX_NODE_COUNTS = 16
CODEC_VERSION = "1"
"""Counts up when the same checkpoint and options would give other bytes."""


@dataclass(frozen=True)
class Progress:
    """How far a compression is: ``done`` of ``total`` bytes of the named stage
    (``reading``, ``encoding``, ``writing``, ``verifying``)."""

    stage: str
    done: int
    total: int


ProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor. ``bits_per_weight`` is that of its stream alone; ``sqnr_db`` and
    ``mean_error`` (absolute, padding counted) are None for a tensor stored as it is."""

    name: str
    shape: tuple[int, ...]
    encoding: str
    bits_per_weight: float
    mean_error: float | None
    sqnr_db: float | None


@dataclass(frozen=True)
class CompressReport:
    """A compression in figures.

    ``ratio``: bytes of the source file over bytes of the artifact. ``bits_per_weight`` and ``sqnr_db``
    (10·log10 of Σw² / Σ(w−ŵ)²) are over all encoded tensors, side information counted, tensors stored as
    they are left out; None where nothing was encoded. ``encoded_share``: share of the values that were.
    """

    codec: str
    codec_version: str
    options: dict[str, Any]
    family: str
    variant: str
    candidates: tuple[str, ...]
    parameters: int
    encoded_share: float
    ratio: float
    bits_per_weight: float | None
    sqnr_db: float | None
    seconds: float
    source_bytes: int
    artifact_bytes: int
    source_sha256: str
    artifact_sha256: str
    tensors: tuple[TensorReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def check_options(codec: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options of a codec with its defaults filled in, ready for JSON.

    Raises InvalidOption for an unknown codec, an unknown option or a value outside its range.
    """
    if codec not in CODECS:
        raise InvalidOption(f"unknown codec {codec!r}; known: {', '.join(CODECS)}")
    return asdict(_config(options or {}))


def _config(options: Mapping[str, Any]) -> BirkhoffConfig:
    known = {f.name for f in fields(BirkhoffConfig)}
    if unknown := sorted(set(options) - known):
        raise InvalidOption(f"birkhoff has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    values = dict(options)
    if "nodes" in values:
        nodes = values["nodes"]
        values["nodes"] = (
            (nodes,) if isinstance(nodes, int) else tuple(nodes) if isinstance(nodes, (list, tuple)) else nodes
        )
    if isinstance(values.get("nodes"), tuple) and len(values["nodes"]) > MAX_NODE_COUNTS:
        raise InvalidOption(f"birkhoff: nodes may name at most {MAX_NODE_COUNTS} node counts")
    try:
        return BirkhoffConfig(**values)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidOption(f"birkhoff: {error}") from error


def compress(
    source: Path | str,
    target: Path | str,
    *,
    codec: str = "birkhoff",
    variant: str | None = None,
    options: Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
    progress: ProgressCallback | None = None,
) -> CompressReport:
    """Compress the checkpoint ``source`` into the artifact ``target``.

    The artifact appears under its name only when it is whole and its checksums are verified. ``progress``
    may raise to stop; nothing is left behind then. Raises CheckpointError and InvalidOption.
    """
    began = time.perf_counter()
    source, target = Path(source), Path(target)
    checked = check_options(codec, options)
    config = _config(checked)
    tell = progress or (lambda _: None)
    place = resolve_device(device)
    if source.exists() and target.exists() and target.samefile(source):
        raise InvalidOption(f"the artifact would replace its source {source.name}; give it another name")
    if source.is_file() and is_artifact(source):
        raise InvalidOption(f"{source.name} is a compressed model already; compress takes a checkpoint")
    checkpoint = read_checkpoint(source)
    detected = detect(checkpoint.tensors, variant=variant)
    source_bytes = source.stat().st_size
    source_sha256 = sha256_of(source, lambda n: tell(Progress("reading", n, source_bytes)))

    encoded: dict[str, Encoded] = {}
    squares: dict[str, tuple[float, float]] = {}
    by_row, keep_raw = _roles(detected)
    total = sum(t.numel() * t.element_size() for t in checkpoint.tensors.values())
    done = 0
    with torch.inference_mode():
        for key, tensor in checkpoint.tensors.items():
            tell(Progress("encoding", done, total))
            encoded[key] = encode(tensor.to(place), config, by_row=key in by_row, keep_raw=key in keep_raw)
            if isinstance(encoded[key], BirkhoffTensor):
                squares[key] = _squares(tensor, decode(encoded[key]))
            done += tensor.numel() * tensor.element_size()
    tell(Progress("encoding", total, total))

    tell(Progress("writing", 0, 1))
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with artifact_errors():
            artifact_format.write(
                part,
                encoded,
                codec={"name": codec, "version": CODEC_VERSION, "options": checked},
                model={"family": detected.family, "variant": detected.variant,
                       "candidates": list(detected.candidates), "config": detected.config.as_dict()},
                source={"sha256": source_sha256, "bytes": source_bytes, "container": checkpoint.container,
                        "wrapper": checkpoint.wrapper, "prefix": checkpoint.prefix},
                report={"sqnr_db": _sqnr(squares.values()),
                        "tensors": {name: _sqnr([pair]) for name, pair in squares.items()}},
            )  # fmt: skip
            artifact_bytes = part.stat().st_size
            tell(Progress("verifying", 0, artifact_bytes))
            artifact_format.open_artifact(part, verify=True).close()
            artifact_sha256 = sha256_of(part)
            tell(Progress("verifying", artifact_bytes, artifact_bytes))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return CompressReport(
        codec=codec,
        codec_version=CODEC_VERSION,
        options=checked,
        family=detected.family,
        variant=detected.variant,
        candidates=detected.candidates,
        parameters=checkpoint.parameters,
        ratio=source_bytes / artifact_bytes,
        sqnr_db=_sqnr(squares.values()),
        seconds=time.perf_counter() - began,
        source_bytes=source_bytes,
        artifact_bytes=artifact_bytes,
        source_sha256=source_sha256,
        artifact_sha256=artifact_sha256,
        **_sizes(encoded, artifact_bytes),
        tensors=tuple(_tensor_report(name, e, squares.get(name)) for name, e in encoded.items()),
    )


def describe_artifact(path: Path) -> dict[str, Any]:
    """What an artifact tells of itself, its checksums verified; ready for JSON. Raises ArtifactError."""
    with artifact_errors(), artifact_format.open_artifact(path, verify=True) as artifact:
        encoded = {name: artifact.encoded(name) for name in artifact.names()}
        size = path.stat().st_size
        ratios = artifact.report.get("tensors", {})
        tensors = [asdict(_tensor_report(name, e, None)) | {"sqnr_db": ratios.get(name)}
                   for name, e in encoded.items()]  # fmt: skip
        return {
            "kind": "artifact", "format_version": artifact_format.FORMAT_VERSION,
            "family": artifact.model.get("family"), "variant": artifact.model.get("variant"),
            "candidates": artifact.model.get("candidates"),
            "codec": artifact.codec.get("name"), "codec_version": artifact.codec.get("version"),
            "options": artifact.codec.get("options"),
            "parameters": sum(math.prod(t["shape"]) for t in tensors), "bytes": size,
            "ratio": artifact.source.get("bytes", 0) / size, **_sizes(encoded, size),
            "sqnr_db": artifact.report.get("sqnr_db"), "sha256": sha256_of(path),
            "source": artifact.source, "config": artifact.model.get("config"), "tensors": tensors,
        }  # fmt: skip


def _roles(detected: Detected) -> tuple[frozenset[str], frozenset[str]]:
    """The weights of linear layers, which are coded row by row, and the buffers, which are kept as they are."""
    with torch.device("meta"):
        network = SamViT(detected.config)
    return linear_weights(network), frozenset(name for name, _ in network.named_buffers())


def _squares(weight: Tensor, decoded: Tensor) -> tuple[float, float]:
    """Σw² and Σ(w−ŵ)² in float64, in pieces, so that no whole copy in float64 is made."""
    signal = error = 0.0
    for w, d in zip(weight.flatten().split(1 << 22), decoded.flatten().split(1 << 22), strict=True):
        w64 = w.double()
        signal += float(w64.square().sum())
        error += float((w64 - d.to(w.device).double()).square().sum())
    return signal, error


def _sqnr(squares: Iterable[tuple[float, float]]) -> float | None:
    """10·log10 of the quotient of the sums; None where it is no finite number."""
    pairs = list(squares)
    signal, error = math.fsum(s for s, _ in pairs), math.fsum(e for _, e in pairs)
    return 10 * math.log10(signal / error) if signal > 0 and error > 0 else None


def _sizes(encoded: Mapping[str, Encoded], artifact_bytes: int) -> dict[str, Any]:
    """Bits a weight over all encoded tensors, and their share of all values.

    Everything in the file that is not the bytes of a tensor stored as it is counts as theirs: streams,
    constants, names, checksums, and the header itself.
    """
    weights = sum(math.prod(e.shape) for e in encoded.values() if isinstance(e, BirkhoffTensor))
    raw = [e.tensor for e in encoded.values() if isinstance(e, RawTensor)]
    bits = 8 * (artifact_bytes - sum(t.nbytes for t in raw))
    return {
        "bits_per_weight": bits / weights if weights else None,
        "encoded_share": weights / max(1, weights + sum(t.numel() for t in raw)),
    }


def _tensor_report(name: str, encoded: Encoded, squares: tuple[float, float] | None) -> TensorReport:
    sqnr = _sqnr([squares]) if squares else None
    if isinstance(encoded, BirkhoffTensor):
        return TensorReport(name, encoded.shape, "birkhoff", encoded.bits / 2, encoded.mean_error, sqnr)
    shape = tuple(encoded.tensor.shape)
    return TensorReport(name, shape, "raw", 8.0 * encoded.tensor.element_size(), None, None)
