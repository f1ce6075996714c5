"""What goes in and out as JSON."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hypersam.codecs import DEFAULT_CODEC
from hypersam.job_spec import JobState
from hypersam.jobs import JobView
from hypersam.sam.registry import Variant, family_row
from hypersam.settings import Name
from hypersam.store import ModelRecord


class Strict(BaseModel):
    """Refuses what it does not know, so that a misspelt field is an error and not a surprise."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Source(Strict):
    """Where a checkpoint comes from: exactly one of upload, url and known; with an upload its ``decoder``, if it is
    published as two files."""

    upload: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    decoder: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
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


class Fault(BaseModel):
    """Where in the request something is wrong, and what."""

    loc: list[str]
    msg: str


class Problem(BaseModel):
    """RFC 9457, with a stable code. ``errors`` where the fault lies in certain fields."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[Fault] = Field(default_factory=list)


class Readiness(BaseModel):
    """Which requests can be served, and why not."""

    status: Literal["ok", "degraded", "not ready"]
    ready: bool = Field(description="whether masks can be asked for")
    can: dict[Literal["segment", "compress"], bool]
    engine: Literal["ok", "closing", "dead"]
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
        """Make one from what the board tells. Results of older versions do not say what decided about the variant."""
        result = None if view.result is None else {"decided_by": "", **view.result}
        return cls.model_validate(replace(view, result=result), from_attributes=True)


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
        # Registrations of older versions do not say what decided about the variant.
        report = {"decided_by": "", **record.report}
        if not tensors:
            report.pop("tensors", None)
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


class VariantBody(BaseModel):
    """A published model that can be compressed, and what it can be asked."""

    id: str
    family: str
    title: str
    file: str = Field(description="its official name")
    parameters: int | None = Field(description="values in the official file")
    fp32_bytes: int | None = Field(description="bytes of these values as fp32, to which ratios are counted")
    mask_input: bool = Field(description="whether it takes the logits of an earlier answer")
    background_points: bool = Field(description="whether it takes points with label 0")
    most_points: int | None = Field(description="of one prompt, a box counted as two; null for any number")
    checked_against: str | None = Field(
        description="the package whose network gives the same answers; null where none was compared"
    )
    url: str | None = Field(description="where its authors offer the file; `hypersam fetch` takes it from there")
    page: str | None = Field(
        description="the project that offers the file, where no address of the file itself is known"
    )
    sha256: str | None = Field(description="of the official file, where it is known")

    @classmethod
    def of(cls, row: Variant) -> VariantBody:
        """Make one from the registry's rows."""
        family = family_row(row.family)
        return cls(
            id=row.id,
            family=row.family,
            title=row.title,
            file=row.file,
            parameters=row.parameters,
            fp32_bytes=4 * row.parameters if row.parameters is not None else None,
            mask_input=family.mask_input,
            background_points=family.background,
            most_points=family.most_points,
            checked_against=family.oracle,
            url=row.url,
            page=row.page,
            sha256=row.sha256,
        )


class Variants(BaseModel):
    """Every published model that is supported, and of which families other sizes are taken too."""

    variants: list[VariantBody]
    other_sizes: dict[str, str] = Field(description="family id to a description of what else it takes")
