"""Prompts and pictures as clients send them, and masks as they get them: what documents and checks these bodies."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator

from service.schemas import Strict

Pair = tuple[float, float]
Box = tuple[float, float, float, float]
MaskFormat = Literal["rle", "png", "polygon", "geojson", "npy"]
FoundFormat = Literal["rle", "png", "polygon", "geojson"]
MASK_SIDE = 1024  # at most, of a mask input
# Prompts or pictures, each of which becomes an object before the settings' own limits are looked at.
MOST_LISTED = 1 << 17
MOST_LOGIT = 1e6  # far beyond what a model answers, and far below what overflows in one
Logit = Annotated[float, Field(ge=-MOST_LOGIT, le=MOST_LOGIT, allow_inf_nan=False)]
# The first error is enough: a list of millions of wrong values must not make millions of messages.
Row = Annotated[list[Logit], Field(fail_fast=True, min_length=1, max_length=MASK_SIDE)]
Logits = Annotated[list[Row], Field(fail_fast=True, min_length=1, max_length=MASK_SIDE)]
MaskInput = Annotated[
    Annotated[Logits, Tag("rows")] | Annotated[str, Field(max_length=12 << 20), Tag("npy")],
    Discriminator(lambda given: "npy" if isinstance(given, str) else "rows"),
]
OneOfLogits = Annotated[list[Logits], Field(min_length=1, max_length=1)]  # (1, s, s)
Label = Annotated[int, Field(ge=-1, le=3)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _listed(given: Any) -> Any:
    """Clients of typed languages send null for what they leave out."""
    return [] if given is None else given


Pairs = Annotated[list[Pair], Field(fail_fast=True), BeforeValidator(_listed, json_schema_input_type=list[Pair] | None)]
Labels = Annotated[
    list[Label], Field(fail_fast=True), BeforeValidator(_listed, json_schema_input_type=list[Label] | None)
]


def other_names(model: type[BaseModel]) -> dict[str, str]:
    """The names that a request may have instead of fields' own: to each the field's."""
    return {
        str(choice): name
        for name, field in model.model_fields.items()
        if isinstance(field.validation_alias, AliasChoices)
        for choice in field.validation_alias.choices
        if choice != name
    }


def _describe_other_names(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Say in the schema what validation takes: pydantic describes a field by the first of its names alone."""
    fields = schema["properties"]
    for other, name in other_names(model).items():
        fields[other] = {key: value for key, value in fields[name].items() if key not in ("title", "default")}
        fields[other]["description"] = f"the same as {name}, which is then left out"
        schema.setdefault("allOf", []).append({"not": {"required": [name, other]}})


class PromptBody(Strict):
    """One thing to find, in pixels of the picture as sent.

    The second names are those that other servers' clients send.
    """

    model_config = ConfigDict(json_schema_extra=_describe_other_names)

    points: Pairs = Field(
        default_factory=list,
        description="[[x, y], …]; also as point_coords",
        validation_alias=AliasChoices("points", "point_coords"),
    )
    point_labels: Labels = Field(
        default_factory=list,
        description="one a point: 1 inside, 0 outside, 2 and 3 a box's upper left and lower right corner, "
        "-1 to be ignored; default: all 1; also as labels",
        validation_alias=AliasChoices("point_labels", "labels"),
    )
    box: Box | None = Field(
        None, description="[x0, y0, x1, y1]; also as bbox", validation_alias=AliasChoices("box", "bbox")
    )
    mask_input: MaskInput | None = Field(
        None,
        description="logits of an earlier answer, above 0 inside, as many rows and columns as the model's own "
        "low-resolution masks: rows of numbers, or a .npy file in base64 as the format npy gives it; "
        "(1, s, s), as SAM's predictor takes it, is the same as (s, s)",
    )

    @field_validator("mask_input", mode="before", json_schema_input_type=MaskInput | OneOfLogits | None)
    @classmethod
    def _of_one(cls, given: Any) -> Any:
        if isinstance(given, list) and len(given) == 1 and isinstance(given[0], list):
            rows = given[0]
            return rows if rows and isinstance(rows[0], list) else given
        return given

    @field_validator("mask_input")
    @classmethod
    def _rectangular(cls, given: list[list[float]] | str | None) -> list[list[float]] | str | None:
        if isinstance(given, list) and any(len(row) != len(given[0]) for row in given):
            raise ValueError("the rows of a mask input are equally long")
        return given

    def given(self) -> bool:
        """Whether anything is asked for."""
        return bool(self.points or self.point_labels or self.box is not None or self.mask_input is not None)


class PictureBody(PromptBody):
    """A picture and its prompts; a lone prompt's fields may stand beside the picture instead."""

    image: str | None = Field(None, description="base64 of a PNG, JPEG, WebP, … file, or a data: URI")
    image_id: str | None = Field(
        None, max_length=64, description="of a picture sent before, while its embedding is held"
    )
    prompts: list[PromptBody] | None = Field(None, fail_fast=True, min_length=1, max_length=MOST_LISTED)


class SegmentRequest(PictureBody):
    """POST /segment as JSON: one picture, or several in ``images``."""

    model: str
    images: list[PictureBody] | None = Field(None, fail_fast=True, min_length=1, max_length=MOST_LISTED)
    multimask: bool = Field(
        False,
        description="three masks a prompt, best first, instead of one; also as multimask_output",
        validation_alias=AliasChoices("multimask", "multimask_output"),
    )
    format: MaskFormat = "rle"


class EverythingRequest(Strict):
    """POST /segment/everything as JSON. Names and defaults are those of SamAutomaticMaskGenerator."""

    model: str
    image: str | None = Field(None, description="base64 of a PNG, JPEG, WebP, … file, or a data: URI")
    image_id: str | None = Field(None, max_length=64, description="of a picture sent before")
    points_per_side: int = Field(32, ge=1, description="of the grid; the operator sets a limit")
    pred_iou_thresh: Finite = Field(0.88, description="masks of lower predicted IoU are dropped")
    stability_score_thresh: Finite = Field(0.95, description="masks of lower stability are dropped")
    stability_score_offset: Finite = Field(1.0, ge=0, description="logits by which the threshold is moved")
    box_nms_thresh: Finite = Field(0.7, ge=0, le=1, description="of boxes that overlap more the better stays")
    format: FoundFormat = "rle"


class EmbedRequest(Strict):
    """POST /embed as JSON."""

    model: str
    image: str = Field(description="base64 of a PNG, JPEG, WebP, … file, or a data: URI")


class MaskBody(BaseModel):
    """One mask.

    ``segmentation`` by format: ``rle`` COCO's compressed RLE, an object; ``png`` a PNG (0 and 255) in base64;
    ``polygon`` COCO's polygons, [[x0, y0, x1, y1, …], …], outer rings only; ``geojson`` a MultiPolygon geometry with
    holes; ``npy`` the low-resolution logits as a .npy file in base64. ``bbox`` is [x, y, width, height].
    """

    prompt: int
    score: float
    bbox: tuple[int, int, int, int]
    area: int
    segmentation: dict[str, Any] | list[list[float]] | str


class FoundBody(BaseModel):
    """One of everything: a mask, its stability score and the click that found it."""

    score: float
    stability_score: float
    bbox: tuple[int, int, int, int]
    area: int
    point: Pair
    segmentation: dict[str, Any] | list[list[float]] | str


class PictureAnswer(BaseModel):
    """What is said of a picture. Timings are milliseconds by stage."""

    image_id: str
    width: int
    height: int
    cached: bool = Field(description="whether the embedding was at hand")
    timings: dict[str, float]


class EmbedResponse(PictureAnswer):
    """A picture whose embedding is held now."""

    model: str


class PictureMasks(PictureAnswer):
    """Masks of one of several pictures."""

    masks: list[MaskBody]


class SegmentResponse(PictureMasks):
    """Masks, by prompt and within a prompt the best first."""

    model: str


class SegmentManyResponse(BaseModel):
    """Masks of several pictures, in the order in which they were sent."""

    model: str
    images: list[PictureMasks]
    timings: dict[str, float]


class EverythingResponse(PictureAnswer):
    """Masks of everything found, the best first."""

    model: str
    masks: list[FoundBody]
