"""What a compression tells of itself: figures for JSON, for tables, and for the artifact's own header."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hypersam.checkpoint import sha256_of
from hypersam.encoding import EncodedTensor, sqnr_db, stream_bytes
from hypersam.errors import artifact_errors
from hypersam.sam.detect import doubts_of
from hypersam.sam.families import FAMILIES
from kernels import artifact as artifact_format
from kernels.codec import BirkhoffTensor, Encoded, LatticeTensor, OrbitTensor, RawTensor


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor.

    ``bits_per_weight`` is that of its stream alone; ``sqnr_db`` and ``relative_error`` (‖w − ŵ‖ / ‖w‖) are None for a
    tensor stored as it is; ``sensitivity`` is the squared movement of the masks for a unit of squared error, None
    where it was not measured; ``mean_error`` (absolute, padding counted) is ``birkhoff``'s own measure.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    bits_per_weight: float
    sqnr_db: float | None
    relative_error: float | None
    sensitivity: float | None
    mean_error: float | None


@dataclass(frozen=True)
class CompressReport:
    """A compression in figures.

    ``ratio``: bytes of the source file over bytes of the artifact; ``fp32_ratio``: of the tensors' fp32 size, which a
    target is about. ``bits_per_weight`` and ``sqnr_db`` (10·log10 of Σw² / Σ(w−ŵ)²) are over all encoded tensors, side
    information counted, tensors stored as they are left out; None where nothing was encoded. ``encoded_share``:
    share of the values that were. ``resident_bytes``: of all tensors once loaded. ``seconds`` is everything,
    ``stage_seconds`` its parts; ``measuring`` and ``comparing`` are what sensitivities and fidelity took.
    ``fidelity``: see ``hypersam.fidelity``; None where it was not asked for. ``notices``: what is odd about the source.
    ``decided_by``: what told ``variant`` from the other ``candidates``, see ``hypersam.sam.detect``.
    """

    codec: str
    codec_version: str
    options: dict[str, Any]
    family: str
    variant: str
    candidates: tuple[str, ...]
    decided_by: str
    parameters: int
    encoded_share: float
    ratio: float
    fp32_ratio: float
    bits_per_weight: float | None
    sqnr_db: float | None
    seconds: float
    stage_seconds: dict[str, float]
    source_bytes: int
    fp32_bytes: int
    artifact_bytes: int
    resident_bytes: int
    source_sha256: str
    artifact_sha256: str
    fidelity: dict[str, Any] | None
    notices: tuple[str, ...]
    tensors: tuple[TensorReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PlanReport:
    """What a compression would give, without its artifact: the same figures, predicted.

    ``artifact_bytes`` is within about half a percent of the real file's.
    """

    codec: str
    codec_version: str
    options: dict[str, Any]
    family: str
    variant: str
    candidates: tuple[str, ...]
    decided_by: str
    parameters: int
    ratio: float
    fp32_ratio: float
    sqnr_db: float | None
    seconds: float
    stage_seconds: dict[str, float]
    source_bytes: int
    fp32_bytes: int
    artifact_bytes: int
    source_sha256: str
    notices: tuple[str, ...]
    tensors: tuple[TensorReport, ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def tensor_report(name: str, encoded: Encoded, sqnr: float | None, sensitivity: float | None = None) -> TensorReport:
    """The report of a tensor. ``sqnr`` in dB."""
    count = max(1, math.prod(encoded.shape))
    return TensorReport(
        name=name,
        shape=tuple(encoded.shape),
        encoding="raw" if isinstance(encoded, RawTensor) else encoded.encoding,
        bits_per_weight=8 * stream_bytes(encoded) / count,
        sqnr_db=sqnr,
        relative_error=None if sqnr is None else 10 ** (-sqnr / 20),
        sensitivity=sensitivity,
        mean_error=encoded.mean_error if isinstance(encoded, BirkhoffTensor) else None,
    )


def sizes(encoded: Mapping[str, Encoded], artifact_bytes: int) -> dict[str, Any]:
    """Bits a weight over all encoded tensors, and their share of all values.

    Everything in the file that is not the bytes of a tensor stored as it is counts as theirs: streams,
    constants, names, checksums, and the header itself.
    """
    weights = sum(math.prod(e.shape) for e in encoded.values() if not isinstance(e, RawTensor))
    raw = [e.tensor for e in encoded.values() if isinstance(e, RawTensor)]
    bits = 8 * (artifact_bytes - sum(t.nbytes for t in raw))
    return {
        "bits_per_weight": bits / weights if weights else None,
        "encoded_share": weights / max(1, weights + sum(t.numel() for t in raw)),
    }


def resident_bytes(encoded: Encoded, *, layer: bool) -> int:
    """Bytes of a tensor in memory once it is loaded: in its resident form as a layer's weight, else as fp32."""
    if isinstance(encoded, RawTensor):
        return encoded.tensor.numel() * (4 if encoded.tensor.is_floating_point() else encoded.tensor.element_size())
    if layer and isinstance(encoded, BirkhoffTensor):
        return 2 * encoded.count + 8 * encoded.table_size
    if layer and isinstance(encoded, LatticeTensor):
        return math.prod(encoded.shape)
    if layer and isinstance(encoded, OrbitTensor):
        return encoded.stream().numel()
    return 4 * math.prod(encoded.shape)


def fp32_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, every floating one counted as fp32: what ratios and targets are about."""
    return sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for t in tensors)


def stored_report(
    found: Mapping[str, EncodedTensor], sensitivities: Mapping[str, float], fidelity: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What of the report goes into the artifact: short, and the same whenever the same is compressed."""
    order = sorted(found)
    stored: dict[str, Any] = {
        "sqnr_db": _short(sqnr_db(found.values())),
        "tensor_sqnr_db": [_short(found[name].sqnr_db) for name in order],
    }
    if sensitivities:
        stored["tensor_sensitivity"] = [_short(sensitivities.get(name)) for name in order]
    if fidelity is not None:
        stored["fidelity"] = dict(fidelity)
    return stored


def _short(value: float | None) -> float | None:
    """Four digits: every one more makes the header longer."""
    return None if value is None else float(f"{value:.4g}")


def describe_artifact(path: Path) -> dict[str, Any]:
    """What an artifact tells of itself, its checksums verified; ready for JSON. Raises ArtifactError."""
    with artifact_errors(), artifact_format.open_artifact(path, verify=True) as artifact:
        encoded = {name: artifact.encoded(name) for name in artifact.names()}
        size = path.stat().st_size
        report = artifact.report
        # Inspecting is for models of unknown families too.
        family = next((f for f in FAMILIES if f.id == artifact.model.get("family")), None)
        needed = [e for name, e in encoded.items() if not (family and family.carries(name))]
        variant, candidates = artifact.model.get("variant"), artifact.model.get("candidates")
        decided_by = artifact.model.get("decided_by", "")
        # An artifact may come from anywhere, and say anything.
        names = tuple(map(str, candidates)) if isinstance(candidates, list) else ()
        doubts = doubts_of(str(variant), names, str(decided_by))
        nothing: list[Any] = [None] * len(encoded)
        ratios, moves = report.get("tensor_sqnr_db", nothing), report.get("tensor_sensitivity", nothing)
        tensors = [asdict(tensor_report(name, e, sqnr, move))
                   for (name, e), sqnr, move in zip(encoded.items(), ratios, moves, strict=True)]  # fmt: skip
        full = sum(e.tensor.nbytes if isinstance(e, RawTensor) and not e.tensor.is_floating_point()
                   else 4 * math.prod(e.shape) for e in encoded.values())  # fmt: skip
        return {
            "kind": "artifact", "format_version": artifact_format.FORMAT_VERSION,
            "family": artifact.model.get("family"), "variant": variant,
            "candidates": candidates, "decided_by": decided_by, "notices": list(doubts),
            "codec": artifact.codec.get("name"), "codec_version": artifact.codec.get("version"),
            "options": artifact.codec.get("options"),
            "parameters": sum(math.prod(t["shape"]) for t in tensors), "bytes": size,
            "ratio": artifact.source.get("bytes", 0) / size, "fp32_ratio": full / size, **sizes(encoded, size),
            "resident_bytes": sum(resident_bytes(e, layer=len(e.shape) == 2) for e in needed),
            "sqnr_db": report.get("sqnr_db"), "sha256": sha256_of(path), "fidelity": report.get("fidelity"),
            "source": artifact.source, "config": artifact.model.get("config"), "tensors": tensors,
        }  # fmt: skip
