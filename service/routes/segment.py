"""POST /segment: a picture and prompts in, masks out."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from anyio import to_thread
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import ValidationError

from hypersam.engine import ModelFile, Prompt, Segmentation
from hypersam.errors import ImageTooLarge, InvalidOption, PromptError, UnknownModel
from hypersam.images import decode_image, to_png
from hypersam.settings import Settings
from service.deps import State, StateDep
from service.errors import BodyTooLarge, NotAcceptable, RequestError, UnsupportedMedia
from service.images import FORMATS, decode_base64, encode_mask
from service.multipart import media_type, read_body, read_form
from service.schemas import PromptBody, SegmentRequest, SegmentResponse

router = APIRouter(tags=["segment"])

_JSON_OVERHEAD = 4 << 20
_FIELDS = frozenset({"model", "image_id", "points", "labels", "box", "multimask", "format"})
_FLAGS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["model"],
                    "properties": {
                        "image": {"type": "string", "format": "binary"},
                        "image_id": {
                            "type": "string",
                            "description": "instead of the image, if it is still held",
                        },
                        "model": {"type": "string"},
                        "points": {
                            "type": "string",
                            "description": "[[x, y], …], pixels",
                            "example": "[[320, 200]]",
                        },
                        "labels": {
                            "type": "string",
                            "description": "[1, 0, …]; default: all 1",
                            "example": "[1]",
                        },
                        "box": {"type": "string", "description": "[x0, y0, x1, y1]"},
                        "multimask": {"type": "boolean", "default": False},
                        "format": {"type": "string", "enum": list(FORMATS), "default": "rle"},
                    },
                }
            },
            "application/json": {"schema": SegmentRequest.model_json_schema()},
        },
    }
}


@dataclass(frozen=True)
class _Asked:
    """What both forms of the request come to."""

    model: str
    image: bytes | None
    image_id: str | None
    prompts: tuple[Prompt, ...]
    multimask: bool
    form: str


class ImageSink:
    """Keeps a form's picture in memory, up to a limit."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.complete = False
        self._limit = limit

    async def write(self, data: bytes) -> None:
        """Take the next bytes. Raises ImageTooLarge."""
        self.data += data
        if len(self.data) > self._limit:
            raise ImageTooLarge(f"the image has more than the {self._limit} bytes accepted")

    async def close(self) -> None:
        """Note that the picture is whole."""
        self.complete = True


@router.post(
    "/segment",
    response_model=SegmentResponse,
    openapi_extra=_BODY,
    responses={200: {"content": {"image/png": {"schema": {"type": "string", "format": "binary"}}}}},
)
async def segment(request: Request, state: StateDep) -> Response:
    """Return masks for points and boxes; with ``Accept: image/png`` the one mask itself."""
    began = time.perf_counter()
    asked = await _read(request, state)
    as_png = _wants_png(request)
    if as_png and (len(asked.prompts) != 1 or asked.multimask):
        raise NotAcceptable("image/png holds one mask: send one prompt without multimask, or ask for JSON")
    received = time.perf_counter()
    model, image = await to_thread.run_sync(_prepare, state, asked, limiter=state.pictures)
    decoded = time.perf_counter()
    result = await state.engine.segment(model, image, asked.prompts, multimask=asked.multimask, image_id=asked.image_id)
    segmented = time.perf_counter()
    body: dict[str, Any] | bytes
    if as_png:
        body = await to_thread.run_sync(_png, result)
    else:
        body = await to_thread.run_sync(_encode, asked, result)
    ended = time.perf_counter()
    timings = {
        "receive": 1e3 * (received - began),
        "image": 1e3 * (decoded - received),
        **result.timings,
        "answer": 1e3 * (ended - segmented),
        "total": 1e3 * (ended - began),
    }
    timings["service"] = timings["total"] - 1e3 * (segmented - decoded)
    timings = {stage: round(value, 3) for stage, value in timings.items()}
    state.metrics.segmented(timings, cached=result.cached)
    headers = {"Server-Timing": ", ".join(f"{stage};dur={value}" for stage, value in timings.items())}
    if isinstance(body, bytes):
        return Response(body, media_type="image/png", headers={**headers, "X-Image-Id": result.image_id})
    return JSONResponse({**body, "timings": timings}, headers=headers)


def _wants_png(request: Request) -> bool:
    """Whether Accept names image/png itself, alone or among others; ``*/*`` and ``image/*`` mean JSON."""
    kinds = ",".join(request.headers.getlist("accept")).split(",")
    return any(kind.partition(";")[0].strip().lower() == "image/png" for kind in kinds)


def _prepare(state: State, asked: _Asked) -> tuple[ModelFile, NDArray[np.uint8] | None]:
    record = state.store.model(asked.model)
    path = state.store.artifact(record)
    if not path.is_file():
        raise UnknownModel(f"the artifact of {asked.model!r} is gone from the data folder")
    image = None if asked.image is None else decode_image(asked.image, max_pixels=state.settings.max_image_pixels)
    return ModelFile(record.name, path, record.digest), image


def _encode(asked: _Asked, result: Segmentation) -> dict[str, Any]:
    return {
        "model": asked.model,
        "image_id": result.image_id,
        "width": result.width,
        "height": result.height,
        "cached": result.cached,
        "masks": [
            {
                "prompt": mask.prompt,
                "score": float(mask.score),
                "bbox": [int(value) for value in mask.bbox],
                "area": int(mask.area),
                "segmentation": encode_mask(mask.mask, asked.form),
            }
            for mask in result.masks
        ],
    }


def _png(result: Segmentation) -> bytes:
    return to_png(result.masks[0].mask)


async def _read(request: Request, state: State) -> _Asked:
    kind, settings = media_type(request), state.settings
    if kind == "multipart/form-data":
        return await _read_form(request, settings)
    if kind == "application/json":
        limit = settings.max_image_bytes * 4 // 3 + _JSON_OVERHEAD
        try:
            body = await read_body(request, limit)
        except BodyTooLarge as error:
            raise ImageTooLarge(f"the request has more than the {limit} bytes accepted") from error
        return await to_thread.run_sync(_parse_json, body, settings, limiter=state.pictures)
    raise UnsupportedMedia("send multipart/form-data or application/json")


async def _read_form(request: Request, settings: Settings) -> _Asked:
    sink = ImageSink(settings.max_image_bytes)
    fields = (await read_form(request, {"image": sink}, _FIELDS)).fields
    if "model" not in fields:
        raise RequestError("the form field 'model' is missing; GET /models lists the models")
    points = _numbers(fields, "points")
    # A form with points and no labels means 'these are inside', as a click does.
    labels = _numbers(fields, "labels") if fields.get("labels") else [1] * len(points)
    values = {"points": points, "point_labels": labels, "box": _numbers(fields, "box") or None}
    try:
        prompt = PromptBody.model_validate(values)
    except ValidationError as error:
        raise PromptError("; ".join(f"{e['loc']}: {e['msg']}" for e in error.errors()[:3])) from error
    multimask = _FLAGS.get(fields.get("multimask", "false").lower())
    if multimask is None:
        raise RequestError("multimask is true or false")
    image = bytes(sink.data) if sink.complete else None
    return _asked(
        fields["model"],
        image,
        fields.get("image_id"),
        [prompt],
        multimask,
        fields.get("format", "rle"),
        settings,
    )


def _parse_json(body: bytes, settings: Settings) -> _Asked:
    try:
        wanted = SegmentRequest.model_validate_json(body)
    except ValidationError as error:
        # Without the input: it may be a picture of megabytes.
        raise RequestValidationError(error.errors(include_input=False, include_url=False)) from error
    image = None if wanted.image is None else decode_base64(wanted.image)
    if image is not None and len(image) > settings.max_image_bytes:
        raise ImageTooLarge(f"the image has more than the {settings.max_image_bytes} bytes accepted")
    return _asked(wanted.model, image, wanted.image_id, wanted.prompts, wanted.multimask, wanted.format, settings)


def _asked(
    model: str,
    image: bytes | None,
    image_id: str | None,
    prompts: list[PromptBody],
    multimask: bool,
    form: str,
    settings: Settings,
) -> _Asked:
    if form not in FORMATS:
        raise InvalidOption(f"unknown format {form[:32]!r}; known: {', '.join(FORMATS)}")
    if (image is None) == (image_id is None):
        raise RequestError("send either image or image_id")
    if len(prompts) > settings.max_prompts:
        raise PromptError(f"{len(prompts)} prompts; {settings.max_prompts} are accepted")
    if any(len(prompt.points) > settings.max_points for prompt in prompts):
        raise PromptError(f"more than the {settings.max_points} points accepted in one prompt")
    made = tuple(_prompt(body) for body in prompts)
    return _Asked(model, image, image_id, made, multimask, form)


def _prompt(body: PromptBody) -> Prompt:
    mask = None if body.mask_input is None else np.asarray(body.mask_input, np.float32)
    return Prompt(tuple(body.points), tuple(body.point_labels), body.box, mask)


def _numbers(fields: Mapping[str, str], name: str) -> list[Any]:
    text = fields.get(name, "")
    if not text:
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, list):
        raise PromptError(f"{name} must be a JSON list")
    return value
