"""Pictures in and masks out: decoding within limits, and the forms in which a mask travels."""

from __future__ import annotations

import io
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
from PIL.BmpImagePlugin import BmpImageFile
from pycocotools import mask as coco

from hypersam.errors import ImageError, ImageTooLarge
from hypersam.picture_parts import essential

MAX_PIXELS = 64_000_000
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")

_AT_ONCE = 1 << 20  # pixels
_ORIENTATION = 0x0112
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

    The size is read from the header and held against ``max_pixels`` before a pixel is decoded; of the file only what
    pixels need is read (``picture_parts``). Transparent pictures are laid on white, 16-bit ones scaled to 8, of
    animated ones the first frame is taken, colour profiles are ignored as SAM's own code does: docs/pictures.md has a
    row for each sort. Takes up to 20 bytes a pixel, 32 MiB and as much again as ``data``. Raises ImageError or
    ImageTooLarge.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns of large pictures, where the limit here is the service's own, and of odd EXIF blocks.
            warnings.simplefilter("ignore")
            with Image.open(essential(data), formats=_FORMATS) as opened:
                width, height = opened.size
                if width * height > max_pixels:
                    raise ImageTooLarge(f"the picture has {width} x {height} pixels; at most {max_pixels} are accepted")
                _unpack_runs(opened, data)
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


def _unpack_runs(image: Image.Image, data: bytes) -> None:
    """Have a BMP of run lengths unpacked here, and give Pillow its rows."""
    if not isinstance(image, BmpImageFile):
        return
    (tile,) = image.tile
    if tile.codec_name != "bmp_rle" or not isinstance(tile.args, tuple):
        return
    from hypersam.bmp_rle import unpacked  # compiled when first called, and such BMPs are rare

    _, four_bits, direction = tile.args
    indices = unpacked(np.frombuffer(data, np.uint8), tile.offset, image.width, image.height, four_bits)
    if len(indices) < image.width * image.height:
        raise ImageError("the picture is truncated or damaged: its runs end before its pixels")
    image.fp = io.BytesIO(indices.tobytes())
    rows = ("P" if image.mode == "P" else "L", 0, direction)
    image.tile = [tile._replace(codec_name="raw", offset=0, args=rows)]


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
