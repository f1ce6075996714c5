"""What the stages of one compression share, and how it begins: the checkpoint is read and known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hypersam.checkpoint import Checkpoint, Source, sha256_of
from hypersam.codecs import CODEC_VERSION
from hypersam.encoding import EncodedTensor
from hypersam.errors import InvalidOption
from hypersam.loading import is_artifact, resolve_device
from hypersam.mapped import MappedFile
from hypersam.options import Goal, goal_of
from hypersam.planning import Roles, roles_of
from hypersam.reports import stored_report
from hypersam.sam.detect import Detected, detect
from hypersam.soundness import check_measurable, not_finite
from kernels import artifact as artifact_format


@dataclass(frozen=True)
class Progress:
    """How far a compression is: ``done`` of ``total`` of the named stage (``reading``, ``measuring``, ``planning``,
    ``encoding``, ``comparing``, ``writing``, ``verifying``): bytes, or passes of ``measuring`` and ``comparing``."""

    stage: str
    done: int
    total: int


ProgressCallback = Callable[[Progress], None]


@dataclass
class Job:
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


def open_job(
    given: Source, options: dict[str, Any], codec: str, variant: str | None, device: str | torch.device,
    progress: ProgressCallback | None,
) -> Job:  # fmt: skip
    """Read the checkpoint, recognise its network, and refuse what the options cannot be met with.

    Raises CheckpointError and InvalidOption.
    """
    source = given.path
    tell = progress or (lambda _: None)
    place = resolve_device(device)
    if source.is_file() and is_artifact(source):
        raise InvalidOption(f"{given.name} is a compressed model already; compress takes a checkpoint")
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
    job = Job(given, checkpoint, detected, sha256, goal, place, options, roles, told, odd)
    job.seconds["reading"] = time.perf_counter() - began
    return job
