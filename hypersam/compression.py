"""A checkpoint in, a compressed model and a report out; or a plan, which tells what would come out."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hypersam import fidelity, sensitivity
from hypersam.allocation import Choice, Curves, smallest_within, solve
from hypersam.checkpoint import Checkpoint, Source, sha256_of
from hypersam.codecs import CODEC_VERSION, DEFAULT_CODEC
from hypersam.encoding import EncodedTensor, decibels, encode_all, encode_birkhoff, sqnr_db
from hypersam.errors import InvalidOption, NotFinite, TargetUnreachable, artifact_errors
from hypersam.loading import compressed_model, dense_model, is_artifact, resolve_device
from hypersam.mapped import MappedFile
from hypersam.options import Goal, check_options, goal_of
from hypersam.planning import Roles, every_choice, measured_curves, predicted_prefix, roles_of
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
from hypersam.sam.detect import Detected, detect
from hypersam.sam.model import SamModel
from hypersam.soundness import check_measurable, not_finite, notices_of
from kernels import artifact as artifact_format

_FIDELITY_BYTES = 1500  # that the fidelity report takes in the header, about
_SHORTFALL = 0.003  # share of the budget that the first plan leaves, because estimates err by as much
_ROUNDS = 6
_WITHIN = 0.0085  # share of the budget that may be left over


@dataclass(frozen=True)
class Progress:
    """How far a compression is: ``done`` of ``total`` of the named stage (``reading``, ``measuring``, ``planning``,
    ``encoding``, ``comparing``, ``writing``, ``verifying``): bytes, or passes of ``measuring`` and ``comparing``."""

    stage: str
    done: int
    total: int


ProgressCallback = Callable[[Progress], None]


@dataclass
class _Job:
    """What the stages of one compression share."""

    source: Source
    checkpoint: Checkpoint
    detected: Detected
    sha256: str
    goal: Goal
    device: torch.device
    options: dict[str, Any]
    roles: Roles
    tell: ProgressCallback
    odd: tuple[str, ...]  # tensors with NaN or infinity
    seconds: dict[str, float] = field(default_factory=dict)
    encoded: int = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.checkpoint.tensors

    @property
    def header(self) -> dict[str, Any]:
        """The artifact's own mappings, but for the report."""
        detected, checkpoint = self.detected, self.checkpoint
        return {
            "codec": {"name": self.goal.codec, "version": CODEC_VERSION, "options": self.options},
            "model": {"family": detected.family, "variant": detected.variant, "candidates": list(detected.candidates),
                      "decided_by": detected.decided_by, "config": detected.config.as_dict()},
            "source": {"sha256": self.sha256, "bytes": self.source.bytes, "container": checkpoint.container,
                       "wrapper": checkpoint.wrapper, "prefix": checkpoint.prefix},
        }  # fmt: skip

    def prefix_bytes(
        self, found: Mapping[str, EncodedTensor], moves: Mapping[str, float], compared: Mapping[str, Any] | None
    ) -> int:
        """Bytes of the artifact before its first stream."""
        encoded = {name: t.encoded for name, t in found.items()}
        return artifact_format.prefix_bytes(encoded, **self.header, report=stored_report(found, moves, compared))


def compress(
    source: Path | str,
    target: Path | str,
    *,
    decoder: Path | str | None = None,
    file_name: str | None = None,
    codec: str = DEFAULT_CODEC,
    variant: str | None = None,
    options: Mapping[str, Any] | None = None,
    device: str | torch.device = "auto",
    sensitivities: Mapping[str, float] | None = None,
    progress: ProgressCallback | None = None,
) -> CompressReport:
    """Compress the checkpoint ``source`` into the artifact ``target``.

    ``decoder``: the second file of a model that is published as two, see ``read_checkpoint``. ``file_name``: what the
    source is called where its path does not say; a name decides between variants that nothing else tells apart.
    ``options``: see ``hypersam.options``: for ``lattice`` and ``orbit`` one of ``preset``, ``target_ratio``,
    ``target_mb`` and ``max_error``, besides ``policy`` and ``fidelity``. ``sensitivities``: of an earlier report of the
    same checkpoint, which saves measuring them again. The artifact appears under its name only
    when it is whole and its checksums are verified. ``progress`` may raise to stop; nothing is left behind then.
    Raises CheckpointError, InvalidOption and TargetUnreachable.
    """
    began = time.perf_counter()
    source, target = Path(source), Path(target)
    checked = check_options(codec, options)
    given = Source(source, decoder, file_name)
    for file in given.paths:
        if file.exists() and target.exists() and target.samefile(file):
            raise InvalidOption(f"the artifact would replace its source {file.name}; give it another name")
    job = _open(given, checked, codec, variant, device, progress)
    moves = _sensitivities(job, sensitivities)
    budget, reserve = job.goal.budget(fp32_bytes(job.tensors.values())), 0
    for _ in range(_ROUNDS):
        found = _encode(job, moves, reserve)
        compared = _compare(job, found) if job.goal.fidelity else None
        size = job.prefix_bytes(found, moves, compared) + sum(t.nbytes for t in found.values())
        short = 0 if budget is None else budget - size
        if budget is None or 0 <= short <= _WITHIN * budget or (short > 0 and reserve < 0):
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
        variant=job.detected.variant, candidates=job.detected.candidates, parameters=job.checkpoint.parameters,
        ratio=source_bytes / artifact_bytes, fp32_ratio=full / artifact_bytes, sqnr_db=sqnr_db(found.values()),
        seconds=time.perf_counter() - began, stage_seconds=job.seconds, source_bytes=source_bytes, fp32_bytes=full,
        artifact_bytes=artifact_bytes,
        resident_bytes=sum(
            resident_bytes(e, layer=name in job.roles.layers)
            for name, e in encoded.items() if not job.detected.described.carries(name)
        ),
        source_sha256=job.sha256, artifact_sha256=artifact_sha256, fidelity=compared,
        notices=notices_of(job.tensors, job.odd), **sizes(encoded, artifact_bytes),
        tensors=tuple(
            tensor_report(name, t.encoded, t.sqnr_db, moves.get(name)) for name, t in found.items()
        ),
    )  # fmt: skip


def plan(
    source: Path | str,
    *,
    decoder: Path | str | None = None,
    file_name: str | None = None,
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
    given = Source(Path(source), decoder, file_name)
    job = _open(given, checked, codec, variant, device, progress)
    moves = _sensitivities(job)
    full, source_bytes = fp32_bytes(job.tensors.values()), job.source.bytes
    with job.stage("planning"):
        found = _curves(job, moves)
        prefix = predicted_prefix(job.tensors, job.header) + (_FIDELITY_BYTES if job.goal.fidelity else 0)
        kept = sum(t.nbytes for name, t in job.tensors.items() if name not in found.names)
        budget = job.goal.budget(full)
        aim = None if budget is None else (budget - prefix - kept) * (1 - _SHORTFALL)
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
        variant=job.detected.variant, candidates=job.detected.candidates, parameters=job.checkpoint.parameters,
        ratio=source_bytes / nbytes, fp32_ratio=full / nbytes,
        sqnr_db=decibels(math.fsum(energy.values()), math.fsum(made.squared_error.values())),
        seconds=time.perf_counter() - began, stage_seconds=job.seconds, source_bytes=source_bytes, fp32_bytes=full,
        artifact_bytes=nbytes, source_sha256=job.sha256,
        notices=notices_of(job.tensors, job.odd), tensors=tuple(rows),
    )  # fmt: skip


# --- stages ----------------------------------------------------------------------------------------------


def _open(
    given: Source, options: dict[str, Any], codec: str, variant: str | None, device: str | torch.device,
    progress: ProgressCallback | None,
) -> _Job:  # fmt: skip
    source = given.path
    tell = progress or (lambda _: None)
    place = resolve_device(device)
    if source.is_file() and is_artifact(source):
        raise InvalidOption(f"{source.name} is a compressed model already; compress takes a checkpoint")
    began = time.perf_counter()
    checkpoint = given.read()
    detected = detect(checkpoint.tensors, variant=variant, name=given.name)
    size = source.stat().st_size
    sha256 = sha256_of(source, lambda n: tell(Progress("reading", n, size)))
    detected = detected.told(sha256=sha256, name=given.name, two_files=given.decoder is not None)
    goal, roles = goal_of(codec, options), roles_of(detected)
    pages = MappedFile(given.paths, checkpoint.tensors.values())

    def told(step: Progress) -> None:
        tell(step)
        # So that memory follows what is being worked on, and not what has been looked at.
        pages.release()

    odd = not_finite(checkpoint.tensors, pages.release)
    measured = goal.fidelity or (goal.config is None and goal.max_error is None and goal.policy == "sensitivity")
    network = set(detected.described.layout(detected.config))
    check_measurable(tuple(name for name in odd if name in network), measured=measured)
    job = _Job(given, checkpoint, detected, sha256, goal, place, options, roles, told, odd)
    job.seconds["reading"] = time.perf_counter() - began
    return job


def _sensitivities(job: _Job, known: Mapping[str, float] | None = None) -> dict[str, float]:
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


def _curves(job: _Job, moves: Mapping[str, float]) -> Curves:
    return measured_curves(
        job.tensors, job.roles, job.goal, moves, lambda n, of: job.tell(Progress("planning", n, of))
    )  # fmt: skip


def _encode(job: _Job, moves: Mapping[str, float], reserve: int) -> dict[str, EncodedTensor]:
    """All tensors coded as the goal wants it; ``reserve``: bytes to leave besides."""
    total = sum(t.nbytes for t in job.tensors.values())

    def told(done: int) -> None:
        # Of a second round nothing shows but that it can be stopped: progress does not go back.
        job.encoded = max(job.encoded, done)
        job.tell(Progress("encoding", job.encoded, total))

    with torch.inference_mode():
        if job.goal.config is not None:
            with job.stage("encoding"):
                return encode_birkhoff(
                    job.tensors, job.goal.config, layers=job.roles.layers, buffers=job.roles.buffers,
                    device=job.device, progress=told,
                )  # fmt: skip
        with job.stage("planning"):
            found = _curves(job, moves)
        if job.goal.max_error is not None:
            return _within_error(job, found, told)
        return _within_budget(job, found, moves, reserve, told)


def _within_budget(
    job: _Job, found: Curves, moves: Mapping[str, float], reserve: int, told: Callable[[int], None]
) -> dict[str, EncodedTensor]:
    """Encode to the size asked for: plan, encode, see what it takes, and plan again with what was learnt."""
    budget = job.goal.budget(fp32_bytes(job.tensors.values()))
    assert budget is not None
    reserve += _FIDELITY_BYTES if job.goal.fidelity else 0
    kept = sum(t.nbytes for name, t in job.tensors.items() if name not in found.names)
    aim = (budget - reserve - kept - predicted_prefix(job.tensors, job.header)) * (1 - _SHORTFALL)
    choices: dict[str, Choice] = {}
    made: dict[str, EncodedTensor] = {}
    best: dict[str, EncodedTensor] | None = None
    best_size = 0
    for _ in range(_ROUNDS):
        with job.stage("planning"):
            wanted = every_choice(job.tensors, solve(found, aim, policy=job.goal.policy))
        with job.stage("encoding"):
            changed = {name: t for name, t in job.tensors.items() if choices.get(name) != wanted[name]}
            fresh = encode_all(changed, wanted, job.roles.layers, progress=told)
            made = {name: fresh.get(name) or made[name] for name in job.tensors}
            choices = wanted
        size = job.prefix_bytes(made, moves, None) + reserve + sum(t.nbytes for t in made.values())
        if best_size < size <= budget:
            best, best_size = made, size
        if best is not None and (budget - best_size <= _WITHIN * budget or not fresh):
            return best
        # A little less than what is left (or more than what is missing), so that the next size lands below.
        aim += (budget - size) - 0.001 * budget
    if best is None:
        raise TargetUnreachable(f"the artifact takes {size} bytes, and {budget} were asked for")
    return best


def _within_error(job: _Job, found: Curves, told: Callable[[int], None]) -> dict[str, EncodedTensor]:
    """Encode to the error asked for; what a sample made look small enough and is not gets a finer coding."""
    limit = job.goal.max_error
    assert limit is not None
    with job.stage("planning"):
        choices = every_choice(job.tensors, smallest_within(found))
    made: dict[str, EncodedTensor] = {}
    wrong = dict(job.tensors)
    with job.stage("encoding"):
        for attempt in range(_ROUNDS):
            made |= encode_all(wrong, choices, job.roles.layers, progress=told)
            wrong = {name: t for name, t in job.tensors.items() if _relative_error(made[name]) > limit}
            if not wrong:
                break
            for name in wrong:
                choice = choices[name]
                finer = choice.step is not None and attempt < _ROUNDS - 2
                step = None if choice.step is None else choice.step * 0.98 * limit / _relative_error(made[name])
                choices[name] = Choice("lattice", step=step) if finer else Choice("raw")
    return {name: made[name] for name in job.tensors}


def _relative_error(tensor: EncodedTensor) -> float:
    if tensor.signal is None or tensor.error is None or tensor.error == 0:
        return 0.0
    return math.sqrt(tensor.error / tensor.signal) if tensor.signal else math.inf


def _compare(job: _Job, found: Mapping[str, EncodedTensor]) -> dict[str, Any]:
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
    job: _Job, target: Path, found: Mapping[str, EncodedTensor], moves: Mapping[str, float],
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
