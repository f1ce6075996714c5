"""Pictures and masks as they travel in JSON. Plain functions that block: run them in a thread."""

from __future__ import annotations

import base64
import binascii
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from hypersam.errors import ImageError
from hypersam.images import to_png, to_rle
from service.schemas import MaskFormat

FORMATS: tuple[str, ...] = get_args(MaskFormat)


def decode_base64(text: str) -> bytes:
    """Return the bytes of a base64 text, with or without a ``data:`` prefix. Raises ImageError."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"the image is not base64: {error}") from error


def encode_mask(mask: NDArray[np.bool_], form: str) -> dict[str, Any] | str:
    """Return the mask in one of ``FORMATS`` as it stands in a JSON answer."""
    if form == "rle":
        return to_rle(mask)
    return base64.b64encode(to_png(mask)).decode("ascii")
