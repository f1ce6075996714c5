"""What goes in and out as JSON."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hypersam.codecs import DEFAULT_CODEC
from hypersam.jobs import JobState, JobView
from hypersam.settings import Name
from hypersam.store import ModelRecord

Pair = tuple[float, float]
Box = tuple[float, float, float, float]
MaskFormat = Literal["rle", "png"]
MASK_SIDE = 1024  # at most, of a mask input
# Far beyond what a model answers, and far below what overflows in one.
Logit = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]
# The first error is enough: a list of millions of wrong values must not make millions of messages.
Row = Annotated[list[Logit], Field(fail_fast=True, min_length=1, max_length=MASK_SIDE)]
Logits = Annotated[list[Row], Field(fail_fast=True, min_length=1, max_length=MASK_SIDE)]


class Strict(BaseModel):
    """Refuses what it does not know, so that a misspelt field is an error and not a surprise."""

    model_config = ConfigDict(extra="forbid")


class Source(Strict):
    """Where a checkpoint comes from: exactly one of the three."""

    upload: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    url: str | None = None
    known: str | None = None


class CompressFields(Strict):
    """How to compress; the same in a form and in JSON."""

    name: Name | None = Field(None, description="the model's id; default: the file's name without its ending")
    variant: str | None = Field(None, description="refuse the checkpoint unless it is of this variant")
    codec: str = Field(DEFAULT_CODEC, description="lattice, orbit or birkhoff")
    preset: str | None = Field(None, description="4x, 5x, 6.5x or 8x; default 5x for lattice and 8x for orbit")
    target_ratio: float | None = Field(None, description="of the tensors' fp32 size to the whole artifact")
    target_mb: float | None = Field(None, description="size of the whole artifact, in millions of bytes")
    max_error: float | None = Field(None, description="relative error of every tensor, at most")
    policy: str | None = Field(
        None, description="sensitivity (bits where the masks feel them), equal_error or equal_bits"
    )
    fidelity: bool | None = Field(None, description="whether the result is compared with the original; default yes")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="birkhoff: side, nodes, max_classes, target_error, raw_above, min_elements",
    )


class CompressRequest(CompressFields):
    """POST /compress as JSON."""

    source: Source


class Problem(BaseModel):
    """RFC 9457, with a stable code."""

    type: str
    title: str
    status: int
    detail: str
    code: str


class Readiness(BaseModel):
    """Whether requests can be served, and why not."""

    ready: bool
    redis: str
    store: str
    workers: int | None
    jobs_waiting: int | None


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str


class Job(BaseModel):
    """A job as it stands."""

    id: str
    state: JobState
    name: str
    codec: str
    source_sha256: str
    progress: float = Field(ge=0, le=1)
    stage: str
    eta_s: float | None
    attempt: int
    result: dict[str, Any] | None
    error: JobError | None
    created_at: str | None
    started_at: str | None
    ended_at: str | None

    @classmethod
    def of(cls, view: JobView) -> Job:
        """Make one from what the board tells."""
        return cls.model_validate(view, from_attributes=True)


class Jobs(BaseModel):
    """The newest jobs, newest first."""

    jobs: list[Job]


class Model(BaseModel):
    """A compressed model. ``report`` is what its compression measured."""

    id: str
    artifact_sha256: str
    artifact_bytes: int
    source_sha256: str
    created_at: str
    report: dict[str, Any]

    @classmethod
    def of(cls, record: ModelRecord, *, tensors: bool) -> Model:
        """Make one from the store's record; ``tensors`` keeps the error of each tensor."""
        report = {key: value for key, value in record.report.items() if tensors or key != "tensors"}
        return cls(
            id=record.name,
            artifact_sha256=record.digest,
            artifact_bytes=record.bytes,
            source_sha256=record.source_sha256,
            created_at=record.created,
            report=report,
        )


class Models(BaseModel):
    """All models, without the figures of each tensor."""

    models: list[Model]


class PromptBody(Strict):
    """One thing to find, in pixels of the picture as sent."""

    points: list[Pair] = Field(default_factory=list, fail_fast=True)
    point_labels: list[int] = Field(
        default_factory=list, fail_fast=True, description="1 inside, 0 outside; one a point"
    )
    box: Box | None = Field(None, description="x0, y0, x1, y1")
    mask_input: Logits | None = Field(
        None, description="rows of logits, above 0 inside; as many rows and columns as the model's own low masks"
    )

    @field_validator("mask_input")
    @classmethod
    def _rectangular(cls, rows: list[list[float]] | None) -> list[list[float]] | None:
        if rows is not None and any(len(row) != len(rows[0]) for row in rows):
            raise ValueError("the rows of a mask input are equally long")
        return rows


class SegmentRequest(Strict):
    """POST /segment as JSON."""

    model: str
    image: str | None = Field(None, description="base64 of a PNG, JPEG, WebP, … file")
    image_id: str | None = Field(None, description="of a picture sent before, while its embedding is held")
    prompts: list[PromptBody] = Field(min_length=1, fail_fast=True)
    multimask: bool = False
    format: MaskFormat = "rle"


class MaskBody(BaseModel):
    """One mask: COCO's compressed RLE as an object, or a PNG (0 and 255) in base64."""

    prompt: int
    score: float
    bbox: tuple[int, int, int, int]
    area: int
    segmentation: dict[str, Any] | str


class SegmentResponse(BaseModel):
    """Masks. Timings are milliseconds."""

    model: str
    image_id: str
    width: int
    height: int
    cached: bool
    masks: list[MaskBody]
    timings: dict[str, float]
