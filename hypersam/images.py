"""Pictures in and masks out: decoding within limits, and the forms in which a mask travels."""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from contourpy import FillType, contour_generator
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from pycocotools import mask as coco

from hypersam.errors import ImageError, ImageTooLarge

MAX_PIXELS = 64_000_000
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")

_AT_ONCE = 1 << 20  # pixels
_ORIENTATION = 0x0112
_TILE_SIDES = (322, 323)  # TIFF tags
MAX_TILE = 1 << 22
"""Pixels of a TIFF's tile, where the picture has fewer: a tile is decoded whole."""
MAX_SCANS = 100
"""Of a JPEG, as libtiff has it: each may take a few bytes and costs a pass over all pixels. Ten are usual."""
MAX_SEGMENTS = 4096
"""Of a JPEG besides: a colour profile takes up to 255."""
_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""What begins one; not a stuffed byte, nor a restart in the middle of a scan."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """An encoded picture as RGB pixels (uint8, H x W x 3), turned as its EXIF orientation says.

    The size is read from the header and held against ``max_pixels`` before a pixel is decoded, and so are the tiles
    of TIFFs and the number of scans in JPEGs. Transparent
    pictures are laid on white, 16-bit ones scaled to 8, of animated ones the first frame is taken, colour profiles are
    ignored as SAM's own code does: docs/pictures.md has a row for each sort. Takes up to 20 bytes a pixel. Raises
    ImageError or ImageTooLarge.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures, where the limit here is the service's own, and of odd EXIF blocks.
            warnings.simplefilter("ignore")
            _check_jpeg(data)
            with Image.open(io.BytesIO(data), formats=_FORMATS) as opened:
                width, height = opened.size
                if width * height > max_pixels:
                    raise ImageTooLarge(f"the picture has {width} x {height} pixels; at most {max_pixels} are accepted")
                _check_tiles(opened)
                return _rgb(_upright(opened))
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"the picture is too large: {error}") from error
    except UnidentifiedImageError as error:
        names = ", ".join(_FORMATS)
        raise ImageError(f"the file is no picture that can be read; accepted are {names}") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        IndexError,
        EOFError,
        MemoryError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
        struct.error,
        zlib.error,
    ) as error:
        # Pillow's decoders let all of these out when a file is cut short or damaged.
        raise ImageError(f"the picture is truncated or damaged: {error}") from error


def _check_jpeg(data: bytes) -> None:
    """Refuse a JPEG of so many segments that it would take hours. Goes from marker to marker, decoding nothing."""
    if not data.startswith(b"\xff\xd8\xff"):
        return
    scans = segments = place = 0
    while found := _SEGMENT.search(data, place):
        end = found.end()
        marker = data[end - 1]
        if marker == 0xD9:  # the end of the picture
            return
        scans += marker == 0xDA
        segments += 1
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            raise ImageError(f"the JPEG has more than {MAX_SCANS} scans or {MAX_SEGMENTS} segments")
        place = end + int.from_bytes(data[end : end + 2], "big")


def _check_tiles(image: Image.Image) -> None:
    """Refuse a TIFF whose tiles are much larger than itself: what one tile takes is allocated and unpacked."""
    if not isinstance(image, TiffImageFile):
        return
    width, height = (image.tag_v2.get(tag, 0) for tag in _TILE_SIDES)
    if width * height > max(MAX_TILE, 2 * image.width * image.height):
        raise ImageError(f"the TIFF's tiles have {width} x {height} pixels, many more than itself")


def _upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says; a block that cannot be read says nothing of the pixels."""
    image.load()  # Pillow turns TIFFs itself here, and then no longer tells of their orientation
    try:
        orientation = image.getexif().get(_ORIENTATION)
        turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    except Exception:  # Pillow's EXIF reader lets out whatever its parser runs into
        turn = None
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey(np.asarray(image), sixteen=image.mode.startswith("I;16"))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layered = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", layered.size, "white")
        image.paste(layered, mask=layered)
    # A conversion to what it is already would be a copy.
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _grey(values: NDArray[Any], *, sixteen: bool) -> NDArray[np.uint8]:
    """Greys of 16 bits, or of 32 bits or floating ones, whose range no file tells: of 16 bits if one is over 255.

    Some rows at a time. Pillow's own conversion would clip them to 255.
    """
    grey = np.empty((*values.shape, 3), np.uint8)
    divisor = np.float32(257 if sixteen or np.fmax.reduce(values, axis=None, initial=0) > 255 else 1)
    step = max(1, _AT_ONCE // values.shape[1])
    for start in range(0, len(values), step):
        scaled = values[start : start + step].astype(np.float32) / divisor
        grey[start : start + step] = np.clip(np.rint(np.nan_to_num(scaled)), 0, 255).astype(np.uint8)[..., None]
    return grey


def to_rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """A mask (H, W) as COCO's compressed run-length encoding: ``{"size": [H, W], "counts": "…"}``."""
    encoded = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(n) for n in encoded["size"]], "counts": encoded["counts"].decode("ascii")}


def from_rle(rle: Mapping[str, Any]) -> NDArray[np.bool_]:
    """The mask (H, W) of COCO's compressed run-length encoding."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools sets an array's shape, which numpy deprecates
        mask: NDArray[np.bool_] = np.asarray(coco.decode(dict(rle))).astype(bool)
    return mask


def to_polygons(mask: NDArray[np.bool_]) -> list[list[list[list[float]]]]:
    """A mask (H, W) as polygons: for each region its outer ring and its holes, closed rings of [x, y] in pixels.

    Rings run half-way between the centres of pixels inside and outside, so that a filling by pixel centres gives the
    mask again; outer rings have a positive area in (x, y), holes a negative one. Regions that touch at a corner are
    one or two, as marching squares has it.
    """
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return []
    top, left = int(rows[0]), int(columns[0])
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    lines = contour_generator(z=np.pad(part, 1).astype(np.float32), fill_type=FillType.OuterOffset)
    polygons = []
    filled: Any = lines.filled(0.5, 2.0)  # points and offsets, as OuterOffset gives them
    for each, starts in zip(*filled, strict=True):
        # Index 1 of the padded part is its first pixel, whose centre is at half a pixel.
        shifted = each + np.array([left - 0.5, top - 0.5])
        rings = [shifted[a:b] for a, b in pairwise(starts.tolist())]
        polygons.append([_corners(np.clip(ring, 0, (width, height))).tolist() for ring in rings])
    return polygons


def _corners(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """A closed ring without the points that lie on a line between their neighbours."""
    points = ring[:-1]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    turns = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0] != 0
    kept = points[turns]
    return np.concatenate([kept, kept[:1]])


def to_npy(values: NDArray[np.float32]) -> bytes:
    """An array as a .npy file."""
    out = io.BytesIO()
    np.save(out, np.ascontiguousarray(values), allow_pickle=False)
    return out.getvalue()


def to_png(mask: NDArray[np.bool_]) -> bytes:
    """A mask (H, W) as a grey PNG, 255 inside and 0 outside."""
    out = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(out, format="PNG")
    return out.getvalue()
