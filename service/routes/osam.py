"""The protocol of osam's server: ``POST /api/generate``, so that its clients can be pointed here.

https://github.com/wkentaro/osam: the request names a model and carries an image in base64 and a prompt of points; the
answer has one annotation, the best mask, cut out to its bounding box (both corners inside it) as a PNG in base64.
"""

from __future__ import annotations

import base64
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from hypersam.engine import ModelFile, Prompt, Segmentation
from hypersam.errors import PromptError
from hypersam.images import to_png
from hypersam.settings import Settings
from hypersam.store import ArtifactStore
from service.asked import image_of, parsed, prompt_of, read_json, validated
from service.deps import State, StateDep
from service.errors import RequestError
from service.hangup import unless_gone
from service.prompt_schemas import Label, Pair, PromptBody
from service.routes.segment import model_file, picture_of

router = APIRouter(tags=["osam"])


class OsamPrompt(BaseModel):
    """Points with labels (1 inside, 0 outside, 2 and 3 a box's corners). What only its text models use is let by."""

    model_config = ConfigDict(extra="ignore")

    points: list[Pair] | None = Field(None, fail_fast=True)
    point_labels: list[Label] | None = Field(None, fail_fast=True)
    texts: list[str] | None = None


class GenerateRequest(BaseModel):
    """POST /api/generate. ``image_embedding`` is refused: embeddings are remembered here, by picture."""

    model_config = ConfigDict(extra="ignore")

    model: str = Field(description="a model's id; a tag after it, as in small_sam:latest, is let by")
    image: str | None = Field(None, description="base64")
    image_embedding: dict[str, Any] | None = None
    prompt: OsamPrompt | None = Field(None, description="default: a point in the middle")


class BoundingBox(BaseModel):
    """The outermost pixels, all four inside."""

    xmin: int
    ymin: int
    xmax: int
    ymax: int


class Annotation(BaseModel):
    """The mask within its box, as a PNG (0 and 255) in base64."""

    bounding_box: BoundingBox
    text: str | None = None
    score: float
    mask: str


class GenerateResponse(BaseModel):
    """No annotation where the mask is empty."""

    model: str
    image_embedding: None = None
    annotations: list[Annotation]


_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": GenerateRequest.model_json_schema()}}}
}


@router.post("/api/generate", response_model=GenerateResponse, openapi_extra=_BODY)
async def generate(request: Request, state: StateDep) -> GenerateResponse:
    """Answer osam's clients: the best mask for one prompt."""
    state.engine.check_room()
    body = await read_json(request, state.settings)
    asked, image = await parsed(_parse, body, state)
    name = await to_thread.run_sync(_known_as, state.store, asked.model)
    model = await model_file(state, name)
    result = await unless_gone(request, _segment(state, model, asked, image))
    state.metrics.segmented(name, result.timings)
    return await to_thread.run_sync(_answer, asked.model, result)


def _parse(body: bytes, settings: Settings) -> tuple[GenerateRequest, bytes]:
    asked = validated(GenerateRequest, body)
    if asked.image_embedding is not None and asked.image is None:
        raise RequestError("image_embedding: embeddings are remembered here and not taken in; send the image")
    image = image_of(asked.image, settings)
    if image is None:
        raise RequestError("image: send it in base64")
    return asked, image


def _known_as(store: ArtifactStore, name: str) -> str:
    """The registered name that osam's ``name:tag`` stands for: as it is, with a hyphen, or without the tag."""
    base, _, tag = name.partition(":")
    return next((each for each in (name, f"{base}-{tag}", base) if store.find(each) is not None), name)


async def _segment(state: State, model: ModelFile, asked: GenerateRequest, image: bytes) -> Segmentation:
    picture = picture_of(image, state)
    assert callable(picture)
    if asked.prompt is None:
        pixels = await to_thread.run_sync(picture, limiter=state.pictures)
        height, width = pixels.shape[:2]
        middle = Prompt(points=((width / 2, height / 2),), labels=(1,))
        return await state.engine.segment(model, pixels, [middle], multimask=True)
    if asked.prompt.points is None or asked.prompt.point_labels is None:
        raise PromptError("models here are asked by points and point_labels, not by texts", field="prompt.points")
    body = PromptBody(points=asked.prompt.points, point_labels=asked.prompt.point_labels)
    return await state.engine.segment(model, picture, [prompt_of(body, "prompt", state.settings)], multimask=True)


def _answer(model: str, result: Segmentation) -> GenerateResponse:
    best = result.masks[0]
    if not best.area:
        return GenerateResponse(model=model, annotations=[])
    x, y, width, height = best.bbox
    mask = base64.b64encode(to_png(best.mask[y : y + height, x : x + width])).decode("ascii")
    box = BoundingBox(xmin=x, ymin=y, xmax=x + width - 1, ymax=y + height - 1)
    return GenerateResponse(model=model, annotations=[Annotation(bounding_box=box, score=best.score, mask=mask)])
