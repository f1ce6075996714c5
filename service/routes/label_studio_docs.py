"""What OpenAPI says of Label Studio's regions, which travel as objects of more sorts than are looked at."""

from __future__ import annotations

from typing import Any

from pydantic import WithJsonSchema

_PER_CENT = {"type": "number", "description": "per cent of the picture"}
_PIXELS = {"type": "number", "description": "pixels, of the whole picture"}
_LABELS = {"type": "array", "items": {"type": "string"}, "description": "they are the mask's too"}


def _region(kind: str, description: str, more: dict[str, Any], *values: str) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "required": ["type", "value", "original_width", "original_height"],
        "properties": {
            "type": {"enum": [f"{kind}labels", kind]},
            "from_name": {"type": "string", "description": "the tag that it was drawn by"},
            "to_name": {"type": "string", "description": "the Image tag that it was drawn on"},
            "original_width": _PIXELS,
            "original_height": _PIXELS,
            "value": {
                "type": "object",
                "required": list(values),
                "properties": {**dict.fromkeys(values, _PER_CENT), f"{kind}labels": _LABELS},
            },
            **more,
        },
    }


_INSIDE = {"type": ["boolean", "integer"], "default": True, "description": "whether it is inside"}
_POINT = _region("keypoint", "a smart key point", {"is_positive": _INSIDE}, "x", "y")
_BOX = _region("rectangle", "a smart rectangle", {}, "x", "y", "width", "height")
_OTHER = {"type": "object", "description": "what is of another type is passed over"}
DRAWN = WithJsonSchema({"type": ["array", "null"], "maxItems": 256, "items": {"anyOf": [_POINT, _BOX, _OTHER]}})

_NAMES = {"type": "array", "items": {"type": "string"}}
_BYTES = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}}
_RING = {"type": "array", "items": {"type": "array", "items": _PER_CENT, "minItems": 2, "maxItems": 2}}
_VALUE = {
    "type": "object",
    "properties": {
        "format": {"const": "rle", "description": "of a brush"},
        "rle": {**_BYTES, "description": "bytes of an RGBA picture as @thi.ng/rle-pack packs them"},
        "points": {**_RING, "description": "the corners of a polygon"},
        "closed": {"const": True},
        **dict.fromkeys(("brushlabels", "polygonlabels", "labels"), _NAMES),
    },
}
_RESULT = {
    "type": "object",
    "required": ["id", "from_name", "to_name", "type", "original_width", "original_height", "value", "score"],
    "properties": {
        "id": {"type": "string"},
        "from_name": {"type": "string", "description": "the tag of label_config that takes masks, or its Labels"},
        "to_name": {"type": "string", "description": "its Image tag"},
        "type": {"enum": ["brushlabels", "brush", "polygonlabels", "polygon", "labels"]},
        "original_width": {"type": "integer"},
        "original_height": {"type": "integer"},
        "image_rotation": {"type": "integer", "description": "as the annotator sees the picture"},
        "item_index": {"type": "integer", "description": "which of an Image tag's list"},
        "value": _VALUE,
        "score": {"type": "number"},
        "readonly": {"type": "boolean"},
    },
}
RESULTS = WithJsonSchema({"type": "array", "items": _RESULT})
