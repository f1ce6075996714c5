"""Label Studio's ML backend protocol: connect ``http://HOST/label-studio/MODEL`` (or just the host) as a backend.

Its smart key points and rectangles come as the context of ``POST /predict``; the answers are brushes or polygons, for
which the project's labelling configuration has to have a tag. Pictures are fetched from the one Label Studio that the
operator named (``HYPERSAM_LABEL_STUDIO_URL``) and the stores that it may send to (``HYPERSAM_LABEL_STUDIO_STORES``), or
come as data: URIs; the host name and token that ``POST /setup`` brings are not used, since anybody could send them.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, Request
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from hypersam.engine import ModelFile, Segmentation
from hypersam.errors import PromptError
from hypersam.images import decode_image
from hypersam.settings import Settings
from service.asked import image_of, prompt_of, read_json, validated
from service.deps import State, StateDep
from service.errors import RequestError
from service.hangup import unless_gone
from service.label_studio.answers import results_of
from service.label_studio.config import Config, parse
from service.label_studio.pictures import fetch
from service.label_studio.regions import WHERE, Drawn, drawn_in
from service.routes.label_studio_docs import DRAWN, RESULTS
from service.routes.segment import model_file

router = APIRouter(tags=["label studio"])

_MOST_DRAWN_ON = 64  # tasks of one request; without anything drawn they may be thousands


class Task(BaseModel):
    """What is to be labelled; only its data is looked at."""

    model_config = ConfigDict(extra="ignore")

    data: dict[str, Any] = Field(default_factory=dict)


class Context(BaseModel):
    """What the annotator has drawn: regions in per cent of the picture."""

    model_config = ConfigDict(extra="ignore")

    result: Annotated[list[dict[str, Any]] | None, DRAWN] = Field(None, max_length=256)


class Parameters(BaseModel):
    """Where the context stands."""

    model_config = ConfigDict(extra="ignore")

    context: Context | None = None


class PredictRequest(BaseModel):
    """POST /predict as Label Studio sends it."""

    model_config = ConfigDict(extra="ignore")

    tasks: list[Task] = Field(max_length=10_000)
    label_config: str | None = Field(None, max_length=1 << 20)
    params: Parameters | None = None


class Prediction(BaseModel):
    """Of one task: brushes or polygons, or nothing where nothing was drawn."""

    result: Annotated[list[dict[str, Any]], RESULTS]
    score: float
    model_version: str


class PredictResponse(BaseModel):
    """One prediction a task."""

    results: list[Prediction]
    model_version: str


class SetupRequest(BaseModel):
    """POST /setup as Label Studio sends it; of its address and token nothing is looked at."""

    model_config = ConfigDict(extra="ignore")

    label_config: str | None = Field(None, alias="schema", max_length=1 << 20)


class SetupResponse(BaseModel):
    """The name of the model that answers."""

    model_version: str


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": kind.model_json_schema()}}}}


@router.get("/health")
@router.get("/label-studio/{model_id}/health")
async def health(state: StateDep, model_id: str | None = None) -> dict[str, str]:
    """Say that the backend is up, in Label Studio's words."""
    return {"status": "UP", "model_class": await _version(state, model_id) if model_id else "hypersam"}


@router.post("/setup", response_model=SetupResponse, openapi_extra=_body(SetupRequest))
@router.post("/label-studio/{model_id}/setup", response_model=SetupResponse, openapi_extra=_body(SetupRequest))
async def setup(request: Request, state: StateDep, model_id: str | None = None) -> SetupResponse:
    """Tell which model answers, if the project's labelling configuration has a tag that takes masks."""
    asked = validated(SetupRequest, await read_json(request, state.settings))
    parse(asked.label_config).control(None)
    return SetupResponse(model_version=await _version(state, model_id))


@router.post("/predict", response_model=PredictResponse, openapi_extra=_body(PredictRequest))
@router.post("/label-studio/{model_id}/predict", response_model=PredictResponse, openapi_extra=_body(PredictRequest))
async def predict(request: Request, state: StateDep, model_id: str | None = None) -> PredictResponse:
    """Return a brush, or polygons, for what the annotator has drawn on each task's picture."""
    state.engine.check_room()
    body = await read_json(request, state.settings)
    asked = await to_thread.run_sync(validated, PredictRequest, body, limiter=state.pictures)
    model = await model_file(state, model_id or state.settings.default_model)
    context = asked.params.context if asked.params else None
    if context is None or not context.result:
        empty = Prediction(result=[], score=0.0, model_version=model.id)
        return PredictResponse(results=[empty] * len(asked.tasks), model_version=model.id)
    if len(asked.tasks) > _MOST_DRAWN_ON:
        raise RequestError(
            f"tasks: {len(asked.tasks)} with something drawn; at most {_MOST_DRAWN_ON} are answered at once"
        )
    config = parse(asked.label_config)
    drawn = drawn_in(context.result)
    # Without a configuration it is not known what the region's tag is called in it.
    pictures = [(each, config.control(each.image if asked.label_config else None)[1]) for each in drawn]
    results = []
    for task in asked.tasks:
        parts = [await _predict(request, state, model, task, each, config, image) for each, image in pictures]
        found = [result for part in parts for result in part.result]
        score = sum(part.score for part in parts) / len(parts)
        results.append(Prediction(result=found, score=score, model_version=model.id))
    return PredictResponse(results=results, model_version=model.id)


async def _version(state: State, model_id: str | None) -> str:
    return (await model_file(state, model_id or state.settings.default_model)).id


async def _predict(
    request: Request, state: State, model: ModelFile, task: Task, drawn: Drawn, config: Config, image: str
) -> Prediction:
    """What was drawn on one picture of a task, that of the tag ``image``."""
    source = _source(task, config.images[image], drawn.item)
    settings = state.settings
    if len(drawn.asked) > settings.max_prompts:
        raise PromptError(f"{len(drawn.asked)} rectangles; {settings.max_prompts} are accepted at once", field=WHERE)
    prompts = [prompt_of(each.prompt, WHERE, settings) for each in drawn.asked]
    if source.startswith("data:"):
        data = await to_thread.run_sync(image_of, source, settings, limiter=state.pictures)
        assert data is not None  # which only no text gives
    else:
        data = await fetch(source, settings)
    work = state.engine.segment(model, partial(_decoded, data, drawn.size, settings), prompts, multimask=True)
    result = await unless_gone(request, work)
    state.metrics.segmented(model.id, result.timings)
    return await to_thread.run_sync(_prediction, model, result, drawn, config, image)


def _source(task: Task, field: str, item: int | None) -> str:
    """The picture's address in the task, or in its list of them."""
    source = task.data.get(field)
    if isinstance(source, list) and 0 <= (item or 0) < len(source):
        source = source[item or 0]
    if not isinstance(source, str):
        raise RequestError(f"tasks.data.{field}: the picture's address is missing")
    return source


def _decoded(image: bytes, size: tuple[int, int], settings: Settings) -> NDArray[np.uint8]:
    """The pixels (H, W, 3). Raises PromptError where the regions were drawn on a picture of another ``size``: they
    would be in the wrong place, and Label Studio could not show the answer."""
    pixels = decode_image(image, max_pixels=settings.max_image_pixels)
    height, width = pixels.shape[:2]
    if (width, height) != size:
        raise PromptError(
            f"the region was drawn on a picture of {size[0]} x {size[1]} pixels (original_width, original_height), "
            f"the task's has {width} x {height}",
            field=WHERE,
        )
    return pixels


def _prediction(model: ModelFile, result: Segmentation, drawn: Drawn, config: Config, image: str) -> Prediction:
    """The best mask of each prompt."""
    found, scores = [], []
    for number, each in enumerate(drawn.asked):
        best = next(mask for mask in result.masks if mask.prompt == number)
        control, _ = config.control(image, each.region.labels, each.region.drawn_by)
        found += results_of(best, each.region, config, control, image)
        scores.append(float(best.score))
    return Prediction(result=found, score=sum(scores) / len(scores), model_version=model.id)
