"""What OpenAPI says of bodies that the routes read themselves, since they may be forms or JSON."""

from __future__ import annotations

from typing import Any, get_args

from service.asked import FLAGS, PLAIN_FORM
from service.images import FORMATS
from service.prompt_schemas import EmbedRequest, EverythingRequest, FoundFormat, SegmentRequest, other_names
from service.schemas import Problem

_IMAGE = {"type": "string", "format": "binary", "description": "PNG, JPEG, WebP, BMP, TIFF or GIF"}
_IMAGE_ID = {"type": "string", "description": "instead of the image, while its embedding is held"}


def _text(description: str, example: str | None = None) -> dict[str, Any]:
    field: dict[str, Any] = {"type": "string", "description": description}
    return field | ({"examples": [example]} if example else {})


def _flag(description: str) -> dict[str, Any]:
    """Of a form, whose fields are texts: more of them are read than a boolean is written as."""
    words = "|".join("".join(f"[{c.upper()}{c}]" if c.isalpha() else c for c in word) for word in FLAGS)
    as_words = {"type": "string", "pattern": f"^({words})$"}
    return {"anyOf": [{"type": "boolean"}, as_words], "default": False, "description": description}


def form_of(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """The schema of a form, whose fields are all known."""
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}


def _body(schema: type[SegmentRequest | EverythingRequest | EmbedRequest], form: dict[str, Any]) -> dict[str, Any]:
    properties = {"model": {"type": "string"}, **form}
    for other, name in other_names(schema).items():
        field = {key: value for key, value in form[name].items() if key not in ("default", "examples")}
        properties[other] = field | {"description": f"the same as {name}"}
    content: dict[str, Any] = {
        "multipart/form-data": {"schema": form_of(properties, *(["model"] if "image_id" in form else properties))},
        "application/json": {"schema": _inlined(schema.model_json_schema())},
    }
    if "image_id" in form:
        named = {name: field for name, field in properties.items() if name != "image"}
        content[PLAIN_FORM] = {"schema": form_of(named, "model", "image_id")}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with its definitions in the places that refer to them: a document within another has no root."""
    definitions = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return resolved(definitions[node["$ref"].rpartition("/")[2]])
            return {key: resolved(value) for key, value in node.items()}
        return [resolved(each) for each in node] if isinstance(node, list) else node

    found: dict[str, Any] = resolved(schema)
    return found


SEGMENT_BODY = _body(
    SegmentRequest,
    {
        "image": _IMAGE,
        "image_id": _IMAGE_ID,
        "points": _text("[[x, y], …], pixels; also as point_coords", "[[320, 200]]"),
        "point_labels": _text("[1, 0, …], one a point, default all 1; also as labels", "[1]"),
        "box": _text("[x0, y0, x1, y1]; also as bbox"),
        "mask_input": _text("rows of logits as JSON, (s, s) or (1, s, s), or a .npy file, as it is or in base64"),
        "prompts": _text("several prompts as JSON, instead of the fields above", '[{"box": [10, 20, 120, 160]}]'),
        "multimask": _flag("three masks a prompt, best first, instead of one; also as multimask_output"),
        "format": {"type": "string", "enum": list(FORMATS), "default": "rle"},
    },
)
_HEADERS = {
    "X-Image-Id": {"description": "of the picture, or the first of several", "schema": {"type": "string"}},
    "Server-Timing": {"description": "milliseconds by stage", "schema": {"type": "string"}},
}
PICTURE_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"headers": _HEADERS}}
_FEATURES = {"application/geo+json": {"schema": {"type": "object", "description": "a FeatureCollection"}}}
FEATURES_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"headers": _HEADERS, "content": _FEATURES}}
SEGMENT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "headers": _HEADERS,
        "content": {"image/png": {"schema": {"type": "string", "format": "binary"}}, **_FEATURES},
    },
    406: {"model": Problem, "description": "Accept asks for one mask, or one picture's, where there are several"},
}
EVERYTHING_BODY = _body(
    EverythingRequest,
    {
        "image": _IMAGE,
        "image_id": _IMAGE_ID,
        "points_per_side": {"type": "integer", "default": 32},
        "pred_iou_thresh": {"type": "number", "default": 0.88},
        "stability_score_thresh": {"type": "number", "default": 0.95},
        "stability_score_offset": {"type": "number", "default": 1.0},
        "box_nms_thresh": {"type": "number", "default": 0.7},
        "format": {"type": "string", "enum": list(get_args(FoundFormat)), "default": "rle"},
    },
)
EMBED_BODY = _body(EmbedRequest, {"image": _IMAGE})
