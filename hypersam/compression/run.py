"""A checkpoint in, a compressed model and a report out; or a plan, which tells what would come out."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hypersam import fidelity, sensitivity
from hypersam.allocation import smallest_within, solve
from hypersam.checkpoint import Source, sha256_of
from hypersam.codecs import CODEC_VERSION, DEFAULT_CODEC
from hypersam.compression.job import Job, Progress, ProgressCallback, open_job
from hypersam.compression.meeting import FIDELITY_BYTES, ROUNDS, SHORTFALL, WITHIN, curves_of, encode
from hypersam.encoding import EncodedTensor, decibels, sqnr_db
from hypersam.errors import InvalidOption, NotFinite, TargetUnreachable, artifact_errors
from hypersam.loading import compressed_model, dense_model
from hypersam.options import check_options
from hypersam.planning import predicted_prefix
from hypersam.reports import (
    CompressReport,
    PlanReport,
    TensorReport,
    fp32_bytes,
    resident_bytes,
    sizes,
    stored_report,
    tensor_report,
)
from hypersam.sam.model import SamModel
from hypersam.soundness import notices_of
from kernels import artifact as artifact_format


def compress(
    source: Path | str,
    target: Path | str,
    *,
    decoder: Path | str | None = None,
    file_name: str | None = None,
    decoder_name: str | None = None,
    codec: str = DEFAULT_CODEC,
    variant: str | None = None,
    options: Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
    sensitivities: Mapping[str, float] | None = None,
    progress: ProgressCallback | None = None,
) -> CompressReport:
    """Compress the checkpoint ``source`` into the artifact ``target``.

    ``decoder``: the second file of a model that is published as two, see ``read_checkpoint``. ``file_name`` and
    ``decoder_name``: what the files are called where their paths do not say, in messages; the source's also decides
    between variants that nothing else tells apart.
    ``options``: see ``hypersam.options``: for ``lattice`` and ``orbit`` one of ``preset``, ``target_ratio``,
    ``target_mb`` and ``max_error``, besides ``policy`` and ``fidelity``. ``sensitivities``: of an earlier report of the
    same checkpoint, which saves measuring them again. The artifact appears under its name only
    when it is whole and its checksums are verified. ``progress`` may raise to stop; nothing is left behind then.
    Raises CheckpointError, InvalidOption and TargetUnreachable.
    """
    began = time.perf_counter()
    source, target = Path(source), Path(target)
    checked = check_options(codec, options)
    if not target.parent.is_dir():
        raise InvalidOption(f"there is no folder {target.parent} for the artifact")
    given = Source(source, decoder, file_name, decoder_name)
    for file in given.paths:
        if file.exists() and target.exists() and target.samefile(file):
            raise InvalidOption(f"the artifact would replace its source {file.name}; give it another name")
    job = open_job(given, checked, codec, variant, device, progress)
    moves = _sensitivities(job, sensitivities)
    budget, reserve = job.goal.budget(fp32_bytes(job.tensors.values())), 0
    for _ in range(ROUNDS):
        found = encode(job, moves, reserve)
        compared = _compare(job, found) if job.goal.fidelity else None
        size = job.prefix_bytes(found, moves, compared) + sum(t.nbytes for t in found.values())
        short = 0 if budget is None else budget - size
        if budget is None or 0 <= short <= WITHIN * budget or (short > 0 and reserve < 0):
            break
        # The fidelity report came out longer or shorter than expected, which the smallest of models feel.
        reserve -= short - int(0.003 * budget) if short > 0 else short - 64
    else:
        raise TargetUnreachable(f"the artifact takes {size} bytes, and {budget} were asked for")
    with job.stage("writing"):
        artifact_sha256, artifact_bytes = _write(job, target, found, moves, compared)
    encoded = {name: t.encoded for name, t in found.items()}
    full = fp32_bytes(job.tensors.values())
    source_bytes = job.source.bytes
    return CompressReport(
        codec=codec, codec_version=CODEC_VERSION, options=checked, family=job.detected.family,
        variant=job.detected.variant, candidates=job.detected.candidates, decided_by=job.detected.decided_by,
        parameters=job.checkpoint.parameters,
        ratio=source_bytes / artifact_bytes, fp32_ratio=full / artifact_bytes, sqnr_db=sqnr_db(found.values()),
        seconds=time.perf_counter() - began, stage_seconds=job.seconds, source_bytes=source_bytes, fp32_bytes=full,
        artifact_bytes=artifact_bytes,
        resident_bytes=sum(
            resident_bytes(e, layer=name in job.roles.layers)
            for name, e in encoded.items() if not job.detected.described.carries(name)
        ),
        source_sha256=job.sha256, artifact_sha256=artifact_sha256, fidelity=compared,
        notices=notices_of(job.checkpoint, job.odd, job.detected), **sizes(encoded, artifact_bytes),
        tensors=tuple(
            tensor_report(name, t.encoded, t.sqnr_db, moves.get(name)) for name, t in found.items()
        ),
    )  # fmt: skip


def plan(
    source: Path | str,
    *,
    decoder: Path | str | None = None,
    file_name: str | None = None,
    decoder_name: str | None = None,
    codec: str = DEFAULT_CODEC,
    variant: str | None = None,
    options: Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
    progress: ProgressCallback | None = None,
) -> PlanReport:
    """What ``compress`` would give, by tensor, without encoding or writing anything.

    Raises the same errors, and InvalidOption for ``birkhoff``, which plans nothing.
    """
    began = time.perf_counter()
    checked = check_options(codec, options)
    if codec == "birkhoff":
        raise InvalidOption("birkhoff decides for each tensor while it encodes; plans are for lattice and orbit")
    given = Source(Path(source), decoder, file_name, decoder_name)
    job = open_job(given, checked, codec, variant, device, progress)
    moves = _sensitivities(job)
    full, source_bytes = fp32_bytes(job.tensors.values()), job.source.bytes
    with job.stage("planning"):
        found = curves_of(job, moves)
        prefix = predicted_prefix(job.tensors, job.header) + (FIDELITY_BYTES if job.goal.fidelity else 0)
        kept = sum(t.nbytes for name, t in job.tensors.items() if name not in found.names)
        budget = job.goal.budget(full)
        aim = None if budget is None else (budget - prefix - kept) * (1 - SHORTFALL)
        made = smallest_within(found) if aim is None else solve(found, aim, policy=job.goal.policy)
    nbytes = int(made.total_bytes) + prefix + kept
    energy = {facts.name: facts.energy for facts in found.tensors}
    rows = []
    for name, tensor in job.tensors.items():
        size, encoding = (made.nbytes[name], made.choices[name].encoding) if name in energy else (tensor.nbytes, "raw")
        sqnr = decibels(energy.get(name, 0.0), made.squared_error.get(name, 0.0))
        error = None if sqnr is None else 10 ** (-sqnr / 20)
        bits = 8 * size / max(1, tensor.numel())
        rows.append(TensorReport(name, tuple(tensor.shape), encoding, bits, sqnr, error, moves.get(name), None))
    return PlanReport(
        codec=codec, codec_version=CODEC_VERSION, options=checked, family=job.detected.family,
        variant=job.detected.variant, candidates=job.detected.candidates, decided_by=job.detected.decided_by,
        parameters=job.checkpoint.parameters,
        ratio=source_bytes / nbytes, fp32_ratio=full / nbytes,
        sqnr_db=decibels(math.fsum(energy.values()), math.fsum(made.squared_error.values())),
        seconds=time.perf_counter() - began, stage_seconds=job.seconds, source_bytes=source_bytes, fp32_bytes=full,
        artifact_bytes=nbytes, source_sha256=job.sha256,
        notices=notices_of(job.checkpoint, job.odd, job.detected), tensors=tuple(rows),
    )  # fmt: skip


# --- stages ----------------------------------------------------------------------------------------------


def _sensitivities(job: Job, known: Mapping[str, float] | None = None) -> dict[str, float]:
    """Of every parameter, where they decide about anything; else none."""
    goal = job.goal
    if goal.config is not None or goal.max_error is not None or goal.policy != "sensitivity":
        return {}
    if known is not None:
        return dict(known)
    with job.stage("measuring"):
        model = dense_model(job.tensors, job.detected, device=job.device)
        moves = sensitivity.measure(model, progress=lambda n, of: job.tell(Progress("measuring", n, of)))
    if not all(math.isfinite(move) for move in moves.values()):
        raise NotFinite("the network answers with NaN or infinity, so where bits matter cannot be measured")
    return moves


def _compare(job: Job, found: Mapping[str, EncodedTensor]) -> dict[str, Any]:
    """The fidelity report, made with the model as the artifact will give it."""
    with job.stage("comparing"), torch.inference_mode():
        original = dense_model(job.tensors, job.detected, device=job.device)

        def compressed() -> SamModel:
            detected = job.detected
            return compressed_model(
                lambda name: found[name].encoded, detected.described, detected.config, detected.variant,
                device=job.device,
            )  # fmt: skip

        # What is only carried is in no model here, neither in the original nor in the yardsticks.
        carries = job.detected.described.carries
        size = job.prefix_bytes(found, {}, None) + sum(t.nbytes for name, t in found.items() if not carries(name))
        report = fidelity.compare(
            original,
            {"compressed": compressed},
            sizes={"compressed": size},
            progress=lambda n, of: job.tell(Progress("comparing", n, of)),
        )
    figures = report.as_dict()
    if not all(math.isfinite(m.mask_iou) and math.isfinite(m.embedding_cosine) for m in report.models.values()):
        raise NotFinite("the network answers with NaN or infinity, so its masks cannot be compared")
    return figures


def _write(
    job: Job, target: Path, found: Mapping[str, EncodedTensor], moves: Mapping[str, float],
    compared: Mapping[str, Any] | None,
) -> tuple[str, int]:  # fmt: skip
    """Write, verify, and only then give the file its name. Returns its SHA-256 and size."""
    job.tell(Progress("writing", 0, 1))
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        with artifact_errors():
            artifact_format.write(
                part,
                {name: t.encoded for name, t in found.items()},
                **job.header,
                report=stored_report(found, moves, compared),
            )
            size = part.stat().st_size
            job.tell(Progress("verifying", 0, size))
            artifact_format.open_artifact(part, verify=True).close()
            digest = sha256_of(part)
            job.tell(Progress("verifying", size, size))
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return digest, size
