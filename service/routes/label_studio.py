"""Label Studio's ML backend protocol: connect ``http://HOST/label-studio/MODEL`` (or just the host) as a backend.

Its smart key points and rectangles come as the context of ``POST /predict``; the answer is a brush mask. Pictures are
fetched from the one Label Studio that the operator named (``HYPERSAM_LABEL_STUDIO_URL``) and the stores it may send to
(``HYPERSAM_LABEL_STUDIO_STORES``), or come as data: URIs; the host name and token that ``POST /setup`` brings are not
used, since anybody could send them.
"""

from __future__ import annotations

import uuid
from typing import Any
from xml.etree import ElementTree

from anyio import to_thread
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from hypersam.engine import ModelFile, Segmentation
from hypersam.errors import PromptError
from service.asked import image_of, prompt_of, read_json, validated
from service.deps import State, StateDep
from service.errors import RequestError
from service.hangup import unless_gone
from service.label_studio.brush_rle import answer
from service.label_studio.pictures import fetch
from service.routes.segment import model_file, picture_of
from service.schemas import PromptBody

router = APIRouter(tags=["label studio"])

_KINDS = ("keypointlabels", "rectanglelabels")


class Task(BaseModel):
    """What is to be labelled; only its data is looked at."""

    model_config = ConfigDict(extra="ignore")

    data: dict[str, Any] = Field(default_factory=dict)


class Context(BaseModel):
    """What the annotator has drawn: regions in per cent of the picture."""

    model_config = ConfigDict(extra="ignore")

    result: list[dict[str, Any]] = Field(default_factory=list, max_length=256)


class Parameters(BaseModel):
    """Where the context stands."""

    model_config = ConfigDict(extra="ignore")

    context: Context | None = None


class PredictRequest(BaseModel):
    """POST /predict as Label Studio sends it."""

    model_config = ConfigDict(extra="ignore")

    tasks: list[Task] = Field(max_length=64)
    label_config: str | None = Field(None, max_length=1 << 20)
    params: Parameters | None = None


class Prediction(BaseModel):
    """Of one task: brush masks, or nothing where nothing was drawn."""

    result: list[dict[str, Any]]
    score: float
    model_version: str


class PredictResponse(BaseModel):
    """One prediction a task."""

    results: list[Prediction]
    model_version: str


class SetupResponse(BaseModel):
    """The name of the model that answers."""

    model_version: str


class Drawn(BaseModel):
    """The annotator's regions as one prompt in pixels, and their label."""

    prompt: PromptBody
    label: str | None


_BODY = {"requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}}
_ANY_BODY: dict[str, Any] = {"requestBody": {"content": {"application/json": {"schema": {}}}}}  # not looked at


@router.get("/health")
@router.get("/label-studio/{model_id}/health")
async def health(state: StateDep, model_id: str | None = None) -> dict[str, str]:
    """Say that the backend is up, in Label Studio's words."""
    return {"status": "UP", "model_class": await _version(state, model_id) if model_id else "hypersam"}


@router.post("/setup", response_model=SetupResponse, openapi_extra=_ANY_BODY)
@router.post("/label-studio/{model_id}/setup", response_model=SetupResponse, openapi_extra=_ANY_BODY)
async def setup(request: Request, state: StateDep, model_id: str | None = None) -> SetupResponse:
    """Tell which model answers."""
    await read_json(request, state.settings)
    return SetupResponse(model_version=await _version(state, model_id))


@router.post("/predict", response_model=PredictResponse, openapi_extra=_BODY)
@router.post("/label-studio/{model_id}/predict", response_model=PredictResponse, openapi_extra=_BODY)
async def predict(request: Request, state: StateDep, model_id: str | None = None) -> PredictResponse:
    """Return a brush mask for what the annotator has drawn on each task's picture."""
    state.engine.check_room()
    body = await read_json(request, state.settings)
    asked = await to_thread.run_sync(validated, PredictRequest, body, limiter=state.pictures)
    model = await model_file(state, model_id or state.settings.default_model)
    context = asked.params.context if asked.params else None
    if context is None or not context.result:
        empty = Prediction(result=[], score=0.0, model_version=model.id)
        return PredictResponse(results=[empty] * len(asked.tasks), model_version=model.id)
    names = _names(asked.label_config)
    results = [await _predict(request, state, model, task, context, names) for task in asked.tasks]
    return PredictResponse(results=results, model_version=model.id)


async def _version(state: State, model_id: str | None) -> str:
    return (await model_file(state, model_id or state.settings.default_model)).id


async def _predict(
    request: Request, state: State, model: ModelFile, task: Task, context: Context, names: tuple[str, str, str]
) -> Prediction:
    source = task.data.get(names[2])
    if not isinstance(source, str):
        raise RequestError(f"tasks.data.{names[2]}: the picture's address is missing")
    drawn = drawn_in(context)
    if source.startswith("data:"):
        image = await to_thread.run_sync(image_of, source, state.settings, limiter=state.pictures)
    else:
        image = await fetch(source, state.settings)
    prompt = prompt_of(drawn.prompt, "params.context", state.settings)
    work = state.engine.segment(model, picture_of(image, state), [prompt], multimask=True)
    result = await unless_gone(request, work)
    state.metrics.segmented(model.id, result.timings)
    return await to_thread.run_sync(_prediction, model, result, names, drawn.label)


def _prediction(model: ModelFile, result: Segmentation, names: tuple[str, str, str], label: str | None) -> Prediction:
    best = result.masks[0]
    found = answer(best.mask, names=names[:2], label=label, score=best.score)
    return Prediction(result=[{"id": uuid.uuid4().hex[:10], **found}], score=best.score, model_version=model.id)


def drawn_in(context: Context) -> Drawn:
    """The prompt that the annotator's regions make together. Raises PromptError."""
    points: list[tuple[float, float]] = []
    labels: list[int] = []
    box: tuple[float, float, float, float] | None = None
    label: str | None = None
    for number, region in enumerate(context.result):
        kind, value = region.get("type"), region.get("value")
        if kind not in _KINDS or not isinstance(value, dict):
            continue
        field = f"params.context.result.{number}"
        try:
            width, height = float(region["original_width"]), float(region["original_height"])
            x, y = float(value["x"]) * width / 100, float(value["y"]) * height / 100
            if kind == "keypointlabels":
                points.append((x, y))
                labels.append(int(bool(int(region.get("is_positive", 1)))))
            else:
                right, lower = float(value["width"]) * width / 100, float(value["height"]) * height / 100
                # Per cents may reach a hair beyond the picture.
                box = (max(0.0, x), max(0.0, y), min(width, x + right), min(height, y + lower))
            given = value.get(kind)
            label = str(given[0]) if isinstance(given, list) and given else label
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise PromptError(f"{field}: {error!r} in a region of type {kind}", field=field) from error
    if not points and box is None:
        raise PromptError("draw a smart key point or rectangle", field="params.context.result")
    return Drawn(prompt=PromptBody(points=points, point_labels=labels, box=box), label=label)


def _names(config: str | None) -> tuple[str, str, str]:
    """Names of the brush's tag and of the picture's, and the task's field that has the picture."""
    if not config:
        return "tag", "image", "image"
    try:
        root = ElementTree.fromstring(config)
    except ElementTree.ParseError as error:
        raise RequestError(f"label_config: no XML: {error}") from error
    brush, image = root.find(".//BrushLabels"), root.find(".//Image")
    if brush is None or image is None:
        raise RequestError("label_config: it needs an Image tag and a BrushLabels tag, since masks are answered")
    return brush.get("name", "tag"), brush.get("toName", "image"), image.get("value", "$image").removeprefix("$")
