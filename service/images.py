"""Pictures and masks as they travel in JSON. Plain functions that block: run them in a thread."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from hypersam.errors import ImageError
from hypersam.images import to_npy, to_png, to_polygons, to_rle
from service.schemas import MASK_SIDE, MOST_LOGIT, MaskFormat

FORMATS: tuple[str, ...] = get_args(MaskFormat)


def decode_base64(text: str) -> bytes:
    """Return the bytes of a base64 text, with or without a ``data:`` prefix and line breaks. Raises ImageError."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if "\n" in text:  # as MIME and the command base64 have it
        text = "".join(text.split())
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the image is not base64: {error}") from error


def encode_mask(mask: NDArray[np.bool_], form: str) -> dict[str, Any] | list[list[float]] | str:
    """Return the mask in one of ``FORMATS`` but ``npy``, as it stands in a JSON answer."""
    if form == "rle":
        return to_rle(mask)
    if form == "png":
        return base64.b64encode(to_png(mask)).decode("ascii")
    polygons = to_polygons(mask)
    if form == "polygon":
        # COCO knows no holes, and does not repeat a ring's first point.
        return [[value for point in rings[0][:-1] for value in point] for rings in polygons]
    return {"type": "MultiPolygon", "coordinates": polygons}


def encode_logits(logits: NDArray[np.float32]) -> str:
    """Return low-resolution logits as a .npy file in base64."""
    return base64.b64encode(to_npy(logits)).decode("ascii")


def decode_logits(text: str) -> NDArray[np.float32]:
    """The inverse: the logits (s, s), or (1, s, s), of a .npy file in base64. Raises ValueError, saying what is wrong.

    The header is read and held against the limits before anything is allocated for what it announces.
    """
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"it is not base64: {error}") from error
    file = io.BytesIO(data)
    try:
        major, _ = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        shape, in_columns, dtype = read(file)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError("it is not a .npy file") from error
    sides = shape[-2:]
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1) or not all(0 < n <= MASK_SIDE for n in sides):
        raise ValueError(f"its shape is {shape}, not (s, s) with s up to {MASK_SIDE}")
    if dtype.kind != "f" or dtype.hasobject:
        raise ValueError(f"it holds {dtype}, not floating-point numbers")
    body = data[file.tell() :]
    if len(body) != dtype.itemsize * sides[0] * sides[1]:
        raise ValueError(f"it has {len(body)} bytes of numbers where its header announces another number")
    values = np.frombuffer(body, dtype).reshape(sides, order="F" if in_columns else "C").astype(np.float32)
    if not (np.abs(values) <= MOST_LOGIT).all():
        raise ValueError(f"its numbers are not all finite and at most {MOST_LOGIT:g} in size")
    return values
