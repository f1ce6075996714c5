"""Pictures and masks as they travel in JSON. Plain functions that block: run them in a thread."""

from __future__ import annotations

import base64
import binascii
import re
import struct
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from hypersam.errors import ImageError
from hypersam.images import to_npy, to_png, to_polygons, to_rle
from service.prompt_schemas import MASK_SIDE, MOST_LOGIT, MaskFormat

FORMATS: tuple[str, ...] = get_args(MaskFormat)
_MOST_NPY_HEADER = 1024  # bytes; NumPy writes 118
_NPY_ITEM = re.compile(
    r"""\s*(?:
        (['"])descr\1\s*:\s*(?P<descr>'[^'\\]*'|"[^"\\]*")
        | (['"])fortran_order\3\s*:\s*(?P<fortran_order>True|False)
        | (['"])shape\5\s*:\s*(?P<shape>\((?:\s*[0-9]{1,18}\s*,)*\s*(?:[0-9]{1,18}\s*)?\))
    )\s*(?:,|(?=\}))""",
    re.VERBOSE,
)
_NPY_TYPES = frozenset(order + kind for order in "<>=" for kind in ("f2", "f4", "f8"))


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
    shape, in_columns, dtype, body = _npy(data)
    sides = shape[-2:]
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1) or not all(0 < n <= MASK_SIDE for n in sides):
        raise ValueError(f"its shape is {ascii(shape)[:64]}, not (s, s) with s up to {MASK_SIDE}")
    if len(body) != dtype.itemsize * sides[0] * sides[1]:
        raise ValueError(f"it has {len(body)} bytes of numbers where its header announces another number")
    values = np.frombuffer(body, dtype).reshape(sides, order="F" if in_columns else "C")
    # In 64 bits: the limit is infinite in 16, and a larger number would be in 32.
    if not (np.abs(values, dtype=np.float64) <= MOST_LOGIT).all():
        raise ValueError(f"its numbers are not all finite and at most {MOST_LOGIT:g} in size")
    return values.astype(np.float32)


def _npy(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], memoryview]:
    """Shape, order, type and numbers of a .npy file of floating-point numbers. Raises ValueError.

    NumPy's own reader falls back on Python's tokenizer, and takes any type that can be described.
    """
    version, lengths = data[6:8], {b"\1\0": "<H", b"\2\0": "<I", b"\3\0": "<I"}
    if data[:6] != b"\x93NUMPY" or version not in lengths or len(data) < 12:
        raise ValueError("it is not a .npy file")
    start = 8 + struct.calcsize(lengths[version])
    (length,) = struct.unpack_from(lengths[version], data, 8)
    if length > _MOST_NPY_HEADER or start + length > len(data):
        raise ValueError("it is not a .npy file, or not a whole one")
    header = _npy_header(data[start : start + length].decode("latin-1").strip())
    shape = tuple(int(side) for side in header["shape"].strip("()").split(",") if side.strip())
    described = header["descr"].strip("'\"")
    if described not in _NPY_TYPES:
        raise ValueError(f"it holds {described[:32]!r}, not floating-point numbers of 16, 32 or 64 bits")
    return shape, header["fortran_order"] == "True", np.dtype(described), memoryview(data)[start + length :]


def _npy_header(text: str) -> dict[str, str]:
    """What stands in a header, by name, each of the kind that belongs there. Raises ValueError."""
    found: dict[str, str] = {}
    place = 1
    while match := _NPY_ITEM.match(text, place):
        place = match.end()
        found |= {name: value for name, value in match.groupdict().items() if value is not None}
    if text[:1] != "{" or text[place:].strip() != "}" or set(found) != set(_NPY_ITEM.groupindex):
        raise ValueError("its header is not one of a .npy file of numbers")
    return found
