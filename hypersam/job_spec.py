"""What a job is asked to do, and what can become of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from hypersam.sam.registry import VARIANTS, named_by


class JobState(StrEnum):
    """Where a job stands. The last three are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing more will happen."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True)
class JobSpec:
    """One request to compress, or with ``dry_run`` to plan. Equal requests have equal keys, and so are one job."""

    name: str
    source_sha256: str
    codec: str
    codec_version: str
    options: Mapping[str, Any] = field(default_factory=dict)
    variant: str | None = None
    dry_run: bool = False
    decoder_sha256: str | None = None
    """Of the second upload of a model that is published as two files."""
    file_name: str | None = None
    """What the client calls the checkpoint: a hint where nothing else tells which variant it is."""
    decoder_name: str | None = None
    """What it calls the second upload, for messages."""

    @property
    def key(self) -> str:
        """32 hexadecimal digits from what decides about the result: the id of the job. Of a file's name only what it
        may decide counts, so that the same file under two names that say nothing is one job."""
        decisive = {k: v for k, v in asdict(self).items() if k not in ("file_name", "decoder_name")}
        if named := self._named():
            decisive["named"] = named
        text = json.dumps(decisive, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _named(self) -> list[str]:
        """The variants that the file's name may make of it; none where the caller or the file's hash decides."""
        if self.variant is not None or any(row.sha256 == self.source_sha256 for row in VARIANTS):
            return []
        return [row.id for row in named_by(self.file_name or "")]

    @property
    def uploads(self) -> tuple[str, ...]:
        """The digests of the uploads that it reads."""
        return (self.source_sha256,) if self.decoder_sha256 is None else (self.source_sha256, self.decoder_sha256)
