"""POST /segment, /segment/everything and /embed: pictures in, masks out."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from hypersam.engine import Everything, Grid, Mask, ModelFile, Picture, Segmentation
from hypersam.errors import HypersamError, UnknownModel
from hypersam.images import decode_image, to_png
from service.asked import Asked, AskedPicture, read_fields, read_segment
from service.deps import State, StateDep
from service.errors import NotAcceptable, RequestError
from service.hangup import unless_gone
from service.images import encode_logits, encode_mask
from service.prompt_schemas import (
    EmbedRequest,
    EmbedResponse,
    EverythingRequest,
    EverythingResponse,
    SegmentManyResponse,
    SegmentResponse,
)
from service.routes.segment_docs import (
    EMBED_BODY,
    EVERYTHING_BODY,
    FEATURES_RESPONSES,
    PICTURE_RESPONSES,
    SEGMENT_BODY,
    SEGMENT_RESPONSES,
)

router = APIRouter(tags=["segment"])

PNG = "image/png"
GEOJSON = "application/geo+json"
_QUALITY = re.compile(r"(0(\.\d{0,3})?|1(\.0{0,3})?)")
T = TypeVar("T")


@router.post(
    "/segment",
    response_model=SegmentResponse | SegmentManyResponse,
    openapi_extra=SEGMENT_BODY,
    responses=SEGMENT_RESPONSES,
)
async def segment(request: Request, state: StateDep) -> Response:
    """Return masks for points, boxes and mask inputs, of one picture or several.

    With ``Accept: image/png`` the one mask itself, with ``Accept: application/geo+json`` a FeatureCollection.
    """
    began = time.perf_counter()
    state.engine.check_room()
    asked = await read_segment(request, state)
    unfit: dict[str, str] = {}
    if asked.many or len(asked.pictures[0].prompts) != 1 or asked.multimask:
        unfit[PNG] = "image/png holds one mask: send one prompt without multimask, or ask for JSON"
    if asked.many:
        unfit[GEOJSON] = "application/geo+json holds the masks of one picture: send one, or ask for JSON"
    wanted = _accepted(request, (PNG, GEOJSON), unfit)
    received = time.perf_counter()
    model = await model_file(state, asked.model)
    found = time.perf_counter()
    results = await unless_gone(request, _segment_all(state, model, asked))
    segmented = time.perf_counter()
    result = results[0]
    body = await to_thread.run_sync(_body, asked, results, wanted)
    timings = _timings(result.timings, began, received, found, segmented)
    for each in results:
        state.metrics.segmented(asked.model, timings if each is result else each.timings)
    headers = _headers(result, timings)
    if isinstance(body, bytes):
        return Response(body, media_type=PNG, headers=headers)
    if wanted == GEOJSON:
        return JSONResponse(body, headers=headers, media_type=GEOJSON)
    return JSONResponse({**body, "timings": timings}, headers=headers)


@router.post(
    "/segment/everything",
    response_model=EverythingResponse,
    openapi_extra=EVERYTHING_BODY,
    responses=FEATURES_RESPONSES,
)
async def everything(request: Request, state: StateDep) -> Response:
    """Return masks of everything that a grid of clicks finds, the best first (SAM's automatic mask generation).

    With ``Accept: application/geo+json`` a FeatureCollection, whatever ``format`` says.
    """
    began = time.perf_counter()
    state.engine.check_room()
    asked, image = await read_fields(request, state, EverythingRequest)
    if (image is None) == (asked.image_id is None):
        raise RequestError("send either image or image_id")
    if asked.points_per_side > state.settings.max_grid:
        raise RequestError(f"points_per_side: {asked.points_per_side}; at most {state.settings.max_grid} are accepted")
    received = time.perf_counter()
    model = await model_file(state, asked.model)
    found = time.perf_counter()
    grid = Grid(
        asked.points_per_side, asked.pred_iou_thresh, asked.stability_score_thresh, asked.stability_score_offset,
        asked.box_nms_thresh,
    )  # fmt: skip
    work = state.engine.everything(model, picture_of(image, state), grid, image_id=asked.image_id)
    result = await unless_gone(request, work)
    segmented = time.perf_counter()
    as_features = _accepted(request, (GEOJSON,)) is not None
    masks = await to_thread.run_sync(_found, result, "geojson" if as_features else asked.format)
    timings = _timings(result.timings, began, received, found, segmented)
    state.metrics.segmented(asked.model, timings)
    headers = _headers(result, timings)
    if as_features:
        return JSONResponse(_collection(masks), headers=headers, media_type=GEOJSON)
    return JSONResponse({"model": asked.model, **_picture_answer(result, timings), "masks": masks}, headers=headers)


@router.post("/embed", response_model=EmbedResponse, openapi_extra=EMBED_BODY, responses=PICTURE_RESPONSES)
async def embed(request: Request, state: StateDep) -> Response:
    """Make a picture's embedding ahead of its prompts, which then name the picture by its ``image_id``."""
    began = time.perf_counter()
    state.engine.check_room()
    asked, image = await read_fields(request, state, EmbedRequest)
    if image is None:
        raise RequestError("image: send the picture")
    received = time.perf_counter()
    model = await model_file(state, asked.model)
    found = time.perf_counter()
    result = await unless_gone(request, state.engine.embed(model, partial(_decoded, image, state)))
    timings = _timings(result.timings, began, received, found, time.perf_counter())
    state.metrics.segmented(asked.model, timings)
    return JSONResponse({"model": asked.model, **_picture_answer(result, timings)}, headers=_headers(result, timings))


async def model_file(state: State, name: str) -> ModelFile:
    """The artifact that a model's name stands for. Raises UnknownModel."""
    return await to_thread.run_sync(_model_file, state, name)


def picture_of(image: bytes | None, state: State) -> Picture | None:
    """What the engine decodes on one of its own threads."""
    return None if image is None else partial(_decoded, image, state)


def _decoded(image: bytes, state: State) -> Any:
    return decode_image(image, max_pixels=state.settings.max_image_pixels)


def _model_file(state: State, name: str) -> ModelFile:
    record = state.store.model(name)
    path = state.store.artifact(record)
    if not path.is_file():
        raise UnknownModel(f"the artifact of {name!r} is gone from the data folder")
    return ModelFile(record.name, path, record.digest)


async def _segment_all(state: State, model: ModelFile, asked: Asked) -> list[Segmentation]:
    """All pictures at the same time, so that their embeddings are made together; the first error ends all."""

    def one(picture: AskedPicture) -> Coroutine[Any, Any, Segmentation]:
        return state.engine.segment(
            model, picture_of(picture.image, state), picture.prompts, multimask=asked.multimask,
            image_id=picture.image_id, admitted=True,
        )  # fmt: skip

    with state.engine.admit(len(asked.pictures)):
        if not asked.many:
            return [await one(asked.pictures[0])]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_placed(one(p), number)) for number, p in enumerate(asked.pictures)]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]


async def _placed(work: Coroutine[Any, Any, T], number: int) -> T:
    """Errors say which of several pictures they are about."""
    try:
        return await work
    except HypersamError as error:
        field = getattr(error, "field", None) or "image_id"
        error.field = f"images.{number}.{field}"  # type: ignore[attr-defined]
        raise


def _accepted(request: Request, offered: Sequence[str], unfit: Mapping[str, str] | None = None) -> str | None:
    """The kind that Accept names with the highest quality of those ``offered``; None for JSON.

    JSON is the answer to a header that names none of them (``*/*`` and ``image/*`` name none) or likes JSON better
    (RFC 9110, section 12.5.1). ``unfit``: kinds that cannot hold this answer, and why; where nothing else is accepted
    that is NotAcceptable.
    """
    liked: dict[str, float] = {}
    for part in ",".join(request.headers.getlist("accept")).split(","):
        kind, *parameters = (piece.strip().lower() for piece in part.split(";"))
        quality = next((value for name, _, value in (p.partition("=") for p in parameters) if name.strip() == "q"), "1")
        liked[kind] = float(quality) if _QUALITY.fullmatch(quality.strip()) else 0.0
    json = next((liked[kind] for kind in ("application/json", "application/*", "*/*") if kind in liked), 0.0)
    named = sorted((kind for kind in offered if liked.get(kind, 0.0) > 0), key=lambda kind: -liked[kind])
    fitting = [kind for kind in named if kind not in (unfit or {})]
    if fitting and liked[fitting[0]] >= json:
        return fitting[0]
    if unfit and named and not fitting and not json:
        raise NotAcceptable(unfit[named[0]])
    return None


def _timings(
    engine: Mapping[str, float], began: float, received: float, found: float, segmented: float
) -> dict[str, float]:
    """Milliseconds: the service's stages around the engine's. ``service`` is all but the engine's share."""
    ended = time.perf_counter()
    timings = {
        "receive": 1e3 * (received - began),
        "model": 1e3 * (found - received),
        **engine,
        "answer": 1e3 * (ended - segmented),
        "total": 1e3 * (ended - began),
    }
    timings["service"] = timings["total"] - 1e3 * (segmented - found)
    return {stage: round(value, 3) for stage, value in timings.items()}


def _headers(result: Segmentation | Everything, timings: Mapping[str, float]) -> dict[str, str]:
    header = ", ".join(f"{stage};dur={value}" for stage, value in timings.items())
    return {"Server-Timing": header, "X-Image-Id": result.image_id}


def _picture_answer(result: Segmentation | Everything, timings: Mapping[str, float]) -> dict[str, Any]:
    return {
        "image_id": result.image_id,
        "width": result.width,
        "height": result.height,
        "cached": result.cached,
        "timings": timings,
    }


def _body(asked: Asked, results: Sequence[Segmentation], wanted: str | None) -> dict[str, Any] | bytes:
    result = results[0]
    if wanted == PNG:
        return to_png(result.masks[0].mask)
    if wanted == GEOJSON:
        return _collection([_mask(mask, "geojson") for mask in result.masks])
    answers = [
        {**_picture_answer(each, each.timings), "masks": [_mask(mask, asked.form) for mask in each.masks]}
        for each in results
    ]
    if asked.many:
        return {"model": asked.model, "images": answers}
    return {"model": asked.model, **answers[0]}


def _mask(mask: Mask, form: str) -> dict[str, Any]:
    return {
        "prompt": mask.prompt,
        "score": float(mask.score),
        "bbox": list(mask.bbox),
        "area": mask.area,
        "segmentation": encode_logits(mask.logits) if form == "npy" else encode_mask(mask.mask, form),
    }


def _collection(masks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """GeoJSON of masks whose segmentation is a geometry; what else is said of them are properties."""
    features = []
    for mask in masks:
        said = {name: value for name, value in mask.items() if name != "segmentation"}
        features.append({"type": "Feature", "geometry": mask["segmentation"], "properties": said})
    return {"type": "FeatureCollection", "features": features}


def _found(result: Everything, form: str) -> list[dict[str, Any]]:
    return [
        {
            "score": found.score,
            "stability_score": found.stability,
            "bbox": list(found.bbox),
            "area": found.area,
            "point": list(found.point),
            "segmentation": found.rle if form == "rle" else encode_mask(found.mask, form),
        }
        for found in result.masks
    ]
