"""What the forms of a request come to: pictures, prompts and how the answer is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from anyio import to_thread
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from hypersam.engine import Prompt
from hypersam.errors import ImageTooLarge, InvalidOption, PromptError
from hypersam.settings import Settings
from service.deps import State
from service.errors import BodyTooLarge, RequestError, UnsupportedMedia
from service.images import FORMATS, decode_base64, decode_logits
from service.multipart import media_type, read_body, read_form, read_pairs
from service.prompt_schemas import PictureBody, PromptBody, SegmentRequest

JSON_OVERHEAD = 4 << 20  # bytes beside the picture; of a form, of each field: a mask input in digits takes 1.5 MB
PLAIN_FORM = "application/x-www-form-urlencoded"
_MOST_VALUES = 4_400_000
"""Of JSON: its commas, and twice its lists and objects, which take more memory, whatever is in them. 64 mask inputs of
256 x 256 have 4.2 million. Read, they take some hundred MB; a body with room for a picture could hold many more."""
_KINDS = f"send multipart/form-data, application/json or, without a picture, {PLAIN_FORM}"
_AT_ONCE = 16 << 10  # bytes of JSON that are read in less time than a thread takes to wake
_PROMPT_FIELDS = ("points", "point_coords", "point_labels", "labels", "box", "bbox", "mask_input", "prompts")
SEGMENT_FIELDS = frozenset({"model", "image_id", "multimask", "multimask_output", "format", *_PROMPT_FIELDS})
FLAGS = {
    "true": True, "1": True, "yes": True, "on": True,
    "false": False, "0": False, "no": False, "off": False,
}  # fmt: skip

Body = TypeVar("Body", bound=BaseModel)
T = TypeVar("T")


@dataclass(frozen=True)
class AskedPicture:
    """One picture, sent or named, and what to find in it."""

    image: bytes | None
    image_id: str | None
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Asked:
    """A request to segment. ``many``: whether the answer is a list of pictures."""

    model: str
    pictures: tuple[AskedPicture, ...]
    multimask: bool
    form: str
    many: bool


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

    def image(self) -> bytes | None:
        """The picture, if one came."""
        return bytes(self.data) if self.complete else None


async def read_segment(request: Request, state: State) -> Asked:
    """The request to POST /segment, a form or JSON."""
    settings = state.settings
    kind = media_type(request)
    if kind == "multipart/form-data":
        sink = ImageSink(settings.max_image_bytes)
        form = await read_form(request, {"image": sink}, SEGMENT_FIELDS, field_bytes=JSON_OVERHEAD)
        return await to_thread.run_sync(_of_form, form.fields, sink.image(), settings, limiter=state.pictures)
    if kind == "application/json":
        return await parsed(_of_json, await read_json(request, settings), state)
    if kind == PLAIN_FORM:
        fields = await read_pairs(request, SEGMENT_FIELDS, JSON_OVERHEAD)
        return await to_thread.run_sync(_of_form, fields, None, settings, limiter=state.pictures)
    raise UnsupportedMedia(_KINDS)


async def read_fields(request: Request, state: State, schema: type[Body]) -> tuple[Body, bytes | None]:
    """A request of plain fields and a picture, a form or JSON: the fields, and the picture that was sent."""
    settings = state.settings
    kind = media_type(request)
    names = frozenset(schema.model_fields) - {"image"}
    if kind == "multipart/form-data":
        sink = ImageSink(settings.max_image_bytes)
        values: dict[str, Any] = dict((await read_form(request, {"image": sink}, names)).fields)
        image = sink.image()
        if image is not None:
            values["image"] = ""  # it is here, though not as text
        return validated(schema, values), image
    if kind == "application/json":
        return await parsed(partial(_fields_of_json, schema), await read_json(request, settings), state)
    if kind == PLAIN_FORM:
        return validated(schema, await read_pairs(request, names, JSON_OVERHEAD)), None
    raise UnsupportedMedia(_KINDS)


async def read_json(request: Request, settings: Settings) -> bytes:
    """A JSON body with room for a picture. Raises ImageTooLarge, and RequestError for more values than prompts have."""
    limit = settings.max_image_bytes * 4 // 3 + JSON_OVERHEAD
    try:
        body = await read_body(request, limit)
    except BodyTooLarge as error:
        raise ImageTooLarge(f"the request has more than the {limit} bytes accepted") from error
    _check_values(body.count(b",") + 2 * (body.count(b"[") + body.count(b"{")))
    return body


def _check_values(count: int) -> None:
    if count > _MOST_VALUES:
        raise RequestError(f"the request has more than {_MOST_VALUES} values; a picture's base64 is one")


async def parsed(parse: Callable[[bytes, Settings], T], body: bytes, state: State) -> T:
    """``parse`` of a JSON body: on a thread if it may hold a picture, at once if it is too small for one."""
    if len(body) <= _AT_ONCE:
        return parse(body, state.settings)
    return await to_thread.run_sync(parse, body, state.settings, limiter=state.pictures)


def validated(schema: type[Body], values: Mapping[str, Any] | bytes) -> Body:
    """A request's body. Raises RequestValidationError, which leaves out the input: it may be a picture of megabytes."""
    try:
        if isinstance(values, bytes):
            return schema.model_validate_json(values)
        return schema.model_validate(values)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False, include_url=False)) from error


def image_of(text: str | None, settings: Settings) -> bytes | None:
    """A picture from base64 or a data: URI. Raises ImageError and ImageTooLarge."""
    if text is None:
        return None
    image = decode_base64(text)
    if len(image) > settings.max_image_bytes:
        raise ImageTooLarge(f"the image has more than the {settings.max_image_bytes} bytes accepted")
    return image


def prompt_of(body: PromptBody, field: str, settings: Settings) -> Prompt:
    """A prompt for the engine. Labels 2 and 3 become a box, points to be ignored go. Raises PromptError."""
    if len(body.points) > settings.max_points:
        raise PromptError(f"more than the {settings.max_points} points accepted in one prompt", field=f"{field}.points")
    # Points without labels mean 'these are inside', as a click does.
    labels = body.point_labels or [1] * len(body.points)
    where = f"{field}.point_labels"
    if len(labels) != len(body.points):
        raise PromptError(f"{len(body.points)} points need as many labels, got {len(labels)}", field=where)
    box = body.box
    clicks = [(point, label) for point, label in zip(body.points, labels, strict=True) if label in (0, 1)]
    corners = {n: [point for point, label in zip(body.points, labels, strict=True) if label == n] for n in (2, 3)}
    if corners[2] or corners[3]:
        if len(corners[2]) != 1 or len(corners[3]) != 1 or box is not None:
            raise PromptError(
                "labels 2 and 3 are the upper left and the lower right corner of one box, given once", field=where
            )
        box = (*corners[2][0], *corners[3][0])
    mask = body.mask_input
    try:
        logits = decode_logits(mask) if isinstance(mask, str) else None if mask is None else np.array(mask, np.float32)
    except ValueError as error:
        raise PromptError(f"mask_input: {error}", field=f"{field}.mask_input") from error
    return Prompt(tuple(point for point, _ in clicks), tuple(label for _, label in clicks), box, logits)


def _of_json(body: bytes, settings: Settings) -> Asked:
    wanted = validated(SegmentRequest, body)
    if wanted.images is None:
        return _asked(wanted, (_picture(wanted, image_of(wanted.image, settings), settings, ""),), many=False)
    if wanted.image is not None or wanted.image_id is not None or wanted.prompts or wanted.given():
        raise RequestError("images holds every picture with its prompts: image, image_id and prompts go in there")
    if len(wanted.images) > settings.max_images:
        raise RequestError(f"{len(wanted.images)} images; {settings.max_images} are accepted in one request")
    pictures = tuple(
        _picture(body, image_of(body.image, settings), settings, f"images.{number}.")
        for number, body in enumerate(wanted.images)
    )
    return _asked(wanted, pictures, many=True)


def _fields_of_json(schema: type[Body], body: bytes, settings: Settings) -> tuple[Body, bytes | None]:
    wanted = validated(schema, body)
    return wanted, image_of(getattr(wanted, "image", None), settings)


def _of_form(fields: Mapping[str, str], image: bytes | None, settings: Settings) -> Asked:
    if "model" not in fields:
        raise RequestError("the form field 'model' is missing; GET /models lists the models")
    if fields.get("format", "rle") not in FORMATS:
        raise InvalidOption(f"unknown format {fields['format'][:32]!r}; known: {', '.join(FORMATS)}")
    values: dict[str, Any] = {name: value for name, value in fields.items() if name not in _PROMPT_FIELDS}
    for name in ("multimask", "multimask_output"):
        if name in values:
            values[name] = FLAGS.get(values[name].lower())
            if values[name] is None:
                raise RequestError(f"{name} is true or false")
    given = {name: fields[name] for name in _PROMPT_FIELDS if fields.get(name)}
    _check_values(sum(text.count(",") + 2 * (text.count("[") + text.count("{")) for text in given.values()))
    values |= {name: _json_field(name, text) for name, text in given.items()}
    try:
        wanted = SegmentRequest.model_validate(values)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        if all(e["loc"] and e["loc"][0] in _PROMPT_FIELDS for e in found):
            first = ".".join(str(part) for part in found[0]["loc"])
            raise PromptError(f"{first}: {found[0]['msg']}", field=first) from error
        raise RequestValidationError(found) from error
    return _asked(wanted, (_picture(wanted, image, settings, ""),), many=False)


def _json_field(name: str, text: str) -> Any:
    if name == "mask_input" and text != "null" and not text.lstrip().startswith("["):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{name} is not JSON: {error}", field=name) from error
    if not isinstance(value, list | None):
        raise PromptError(f"{name} must be a JSON list", field=name)
    return value


def _asked(wanted: SegmentRequest, pictures: tuple[AskedPicture, ...], *, many: bool) -> Asked:
    return Asked(wanted.model, pictures, wanted.multimask, wanted.format, many)


def _picture(body: PictureBody, image: bytes | None, settings: Settings, where: str) -> AskedPicture:
    if (image is None) == (body.image_id is None):
        raise RequestError(f"{where}send either image or image_id")
    if body.prompts and body.given():
        raise RequestError(f"{where}give prompts, or one prompt's points and box beside the image, not both")
    prompts = body.prompts or [body]
    if len(prompts) > settings.max_prompts:
        raise PromptError(
            f"{len(prompts)} prompts; {settings.max_prompts} are accepted for a picture", field=f"{where}prompts"
        )
    for number, prompt in enumerate(prompts):
        if not prompt.given():
            raise PromptError("give points with labels, a box, or both", field=f"{where}prompts.{number}")
    made = tuple(prompt_of(prompt, f"{where}prompts.{number}", settings) for number, prompt in enumerate(prompts))
    return AskedPicture(image, body.image_id, made)
