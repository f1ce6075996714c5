"""The parts of a picture's file that its first frame needs, for Pillow to read instead of the file.

Pillow's parsers go through all of a file in Python and keep what they find: a few MB of empty blocks hold a core for a
minute, and gigabytes. So what is neither pixels nor their orientation never reaches them: other frames, comments,
colour profiles, thumbnails, what programs add. Here a file is gone through in large steps whose number is bounded.
What is kept is handed on as it is, damage included: a copy no larger than the file.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hypersam.errors import ImageError

MAX_SCANS = 100
"""Of a JPEG, as libtiff has it: each may take a few bytes and costs a pass over all pixels. Ten are usual."""
MAX_SCANNED = 25 * 64_000_000
"""Pixels of all its scans together."""
MAX_FILL = 1 << 16
"""Bytes of 0xFF before a marker: libjpeg begins anew with each 64 KiB that it is given of them."""
MAX_SEGMENTS = 4096
"""Of a JPEG besides: a colour profile takes up to 255."""
MAX_METADATA = 1 << 20
"""Bytes of EXIF and of tables, which Pillow reads in Python. A camera's EXIF block has up to 64 KiB."""
MAX_BLOCKS = 1 << 18
"""Of a GIF before its pixels: 64 MiB in full ones."""
MAX_CHUNKS = 1 << 14
"""Of a PNG or WebP, and one more for each KiB. Usual ones have 8 KiB."""
MAX_TAGS = 4096
"""Of a TIFF's page: a camera writes some hundred."""
MAX_STRIPS = 1 << 16
"""Of a TIFF, and one more for each 256 pixels, which the smallest tiles have."""
MAX_TILE = 1 << 22
"""Pixels of a TIFF's tile, where the picture has fewer."""
_OVERLAP = 1 << 26
"""Bytes that a TIFF's strips may have together beyond those of the file: tiles of one colour may be stored once."""
MAX_BMP_HEADER = 124
_ROOM = 1 << 20
"""Bytes of pixel data beyond those that pixels can need."""

_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_DAMAGED = "the picture is truncated or damaged"


def essential(data: bytes) -> io.BytesIO:
    """As much of a picture's file as its first frame's pixels and orientation need; all of it if it is no picture."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _joined(_png(data))
    if data.startswith(b"\xff\xd8\xff"):
        return _joined(_jpeg(data))
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _joined(_gif(data))
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _joined(_webp(data))
    if data.startswith(_TIFF_BEGINNINGS):
        return _tiff(data)
    if data.startswith(b"MM\0+"):
        raise ImageError("big-endian BigTIFF is not read")  # nor by Pillow
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") > MAX_BMP_HEADER:
        raise ImageError(f"{_DAMAGED}: no BMP has such a header")  # which would be read first
    return io.BytesIO(data)


def _joined(parts: list[bytes | memoryview]) -> io.BytesIO:
    return io.BytesIO(b"".join(parts))


class _Metadata:
    """Bytes that Pillow is to read in Python."""

    def __init__(self) -> None:
        self._taken = 0

    def add(self, size: int) -> None:
        self._taken += size
        if self._taken > MAX_METADATA:
            raise ImageError(f"the picture has more than {MAX_METADATA} bytes of EXIF data or tables")


def _chunks(data: bytes, place: int, *, riff: bool = False) -> Iterator[tuple[bytes, int, int]]:
    """The kind, the start and the end of each chunk of a PNG, or of a RIFF file as WebP is."""
    for _ in range(MAX_CHUNKS + len(data) // 1024):
        if place + 8 > len(data):
            return
        if riff:
            kind, length = struct.unpack_from("<4sI", data, place)
        else:
            length, kind = struct.unpack_from(">I4s", data, place)
        start, end = place + 8, place + 8 + length
        yield kind, start, end
        place = end + (length % 2 if riff else 4)  # padded to even, or followed by a checksum
    raise ImageError("the picture has too many chunks for its size")


_PNG_XMP = b"XML:com.adobe.xmp\0"
_PNG_EXIF_TEXTS = (b"Raw profile type exif\0", b"exif\0", _PNG_XMP)


def _png(data: bytes) -> list[bytes | memoryview]:
    """The header, palette, transparency and orientation, and the first image data as one chunk."""
    if data[12:16] != b"IHDR":
        raise ImageError(f"{_DAMAGED}: no PNG begins so")
    view, metadata = memoryview(data), _Metadata()
    width, height = struct.unpack_from(">II", data, 16)
    # A pixel takes up to 8 bytes, and a row 6 more: its filter, and the head of a block that is not packed.
    room = 16 * width * height + _ROOM
    parts: list[bytes | memoryview] = [data[:8]]
    pixels: list[memoryview] = []
    place, before = 0, b""
    for kind, start, end in _chunks(data, 8):
        if kind == b"IEND":
            break
        if kind == b"IDAT" and not pixels:
            place = len(parts)
        if kind == b"IDAT" and (not pixels or before == b"IDAT"):
            pixels.append(view[start : min(end, start + room)])
            room -= len(pixels[-1])
        elif kind == b"iTXt" and data.startswith(_PNG_XMP + b"\0", start):
            if found := _XMP_ORIENTATION.search(view[start:end]):
                parts.append(_png_chunk(kind, _PNG_XMP + bytes(4) + found[0]))
        elif kind in (b"IHDR", b"PLTE", b"tRNS", b"eXIf") or (
            kind in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(_PNG_EXIF_TEXTS, start)
        ):
            metadata.add(end + 4 - (start - 8))
            parts.append(view[start - 8 : end + 4])
        before = kind
    if pixels:
        # Pillow's work is by chunks too, and it holds image data to no checksum but its own.
        size = sum(map(len, pixels))
        parts[place:place] = [struct.pack(">I4s", size, b"IDAT"), *pixels, bytes(4)]
    return [*parts, _png_chunk(b"IEND", b"")]


def _png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


_SEGMENT = re.compile(rb"\xff[\xc0-\xcf\xd9-\xfe]")
"""What begins one; not a stuffed byte, nor a restart in the middle of a scan."""
_JPEG_FRAMES = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_TABLES = _JPEG_FRAMES | {0xC4, 0xCC} | set(range(0xDB, 0xE0))
_JPEG_APPLICATIONS = (
    (0xE0, b"JFIF"), (0xEE, b"Adobe"), (0xE1, b"Exif\0\0"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0"),
)  # fmt: skip
"""The first two say what the colours are, the others the orientation."""


def _jpeg(data: bytes) -> list[bytes | memoryview]:
    """The tables, the orientation and the scans. Goes from marker to marker, decoding nothing."""
    view, metadata = memoryview(data), _Metadata()
    parts: list[bytes | memoryview] = [data[:2]]
    scans = segments = first = pixels = 0
    place, stop = 2, len(data)
    while found := _SEGMENT.search(data, place):
        start, end = found.span()
        _check_fill(data, place, start)
        marker = data[end - 1]
        if marker == 0xD9:  # the end of the picture
            stop = end
            break
        if marker == 0xDA and not scans:
            first = start
        scans += marker == 0xDA
        segments += 1
        if scans > MAX_SCANS or segments > MAX_SEGMENTS:
            raise ImageError(f"the JPEG has more than {MAX_SCANS} scans or {MAX_SEGMENTS} segments")
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, end + 3)
            pixels = max(pixels, height * width)
        if scans * pixels > MAX_SCANNED:
            raise ImageError(f"the JPEG has {scans} scans, too many for its size")
        place = end + int.from_bytes(data[end : end + 2], "big")
        known = marker in _JPEG_TABLES or any(
            marker == each and data.startswith(label, end + 2) for each, label in _JPEG_APPLICATIONS
        )
        if known and not scans:
            metadata.add(place - start)
            parts.append(view[start:place])
    else:
        _check_fill(data, place, stop)
    return [*parts, view[first:stop]] if scans else parts


def _check_fill(data: bytes, start: int, stop: int) -> None:
    if stop - start > MAX_FILL and data.find(b"\xff" * MAX_FILL, start, stop) >= 0:
        raise ImageError(f"the JPEG has {MAX_FILL} bytes of nothing before a marker")


def _gif(data: bytes) -> list[bytes | memoryview]:
    """The palettes, the transparent colour and the first image's data."""
    place = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    parts: list[bytes | memoryview] = [data[:place]]
    blocks = 0
    while data[place] != 0x2C:  # an image
        if data[place] == 0x3B:
            raise ImageError("the GIF has no image")
        if data[place] != 0x21:  # anything but an extension is passed over, as Pillow does
            place += 1
            blocks += 1
        else:
            if data[place + 1] == 0xF9 and data[place + 2] >= 4 and data[place + 3] & 1:
                # Of it only what the first frame needs: how a frame is removed would take memory.
                parts[1:] = [b"\x21\xf9\x04\x01\0\0" + data[place + 6 : place + 7] + b"\0"]
            place += 2
            while size := data[place]:
                place += 1 + size
                blocks += 1
                if blocks > MAX_BLOCKS:
                    break
            else:
                place += 1
                blocks += 1
        if blocks > MAX_BLOCKS:
            raise ImageError(f"the GIF has more than {MAX_BLOCKS} blocks before its first image")
    width, height = struct.unpack_from("<HH", data, place + 5)
    # A pixel takes up to two codes of 12 bits, and a byte more if each has a block of its own.
    return [*parts, memoryview(data)[place : place + 8 * width * height + _ROOM]]


_WEBP_PARTS = {b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"VP8 ", b"VP8L", b"EXIF"}


def _webp(data: bytes) -> list[bytes | memoryview]:
    """The first chunk of each kind that matters, and of the XMP data the orientation."""
    size = struct.unpack_from("<I", data, 4)[0]
    if len(data) < 8 + size:
        raise ImageError(f"{_DAMAGED}: of {8 + size} bytes it has {len(data)}")
    view, metadata = memoryview(data)[: 8 + size], _Metadata()
    # libwebp makes copies of the file: of a pixel's 4 bytes only so many as there may be.
    room = 8 * _webp_pixels(data) + _ROOM
    parts: list[bytes | memoryview] = []
    seen = set()
    for kind, start, end in _chunks(data, 12, riff=True):
        if end > len(view) or kind in seen:
            continue
        seen.add(kind)
        if kind == b"EXIF":
            metadata.add(end - start)
        if kind == b"XMP " and (found := _XMP_ORIENTATION.search(view[start:end])):
            text = found[0] + bytes(len(found[0]) % 2)
            parts.append(struct.pack("<4sI", kind, len(text)) + text)
        elif kind in _WEBP_PARTS:
            room -= end - start
            if room < 0:
                raise ImageError("the WebP has more data than its pixels can have")
            parts += [view[start - 8 : end], bytes((end - start) % 2)]
    return [struct.pack("<4sI4s", b"RIFF", 4 + sum(map(len, parts)), b"WEBP"), *parts]


def _webp_pixels(data: bytes) -> int:
    """The first image's or, of an extended file, the canvas's."""
    if data[12:16] == b"VP8X":
        width, height = (int.from_bytes(data[place : place + 3], "little") + 1 for place in (24, 27))
    elif data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    else:
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    return width * height


_TIFF_BEGINNINGS = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"II+\0")
"""As Pillow has them. It takes big-endian BigTIFF for another TIFF, where libtiff finds other tags."""
_ORIENTATION, _XMP = 0x0112, 700
_TIFF_PIXELS = {
    256, 257, 258, 259, 262, 266, _ORIENTATION, 277, 278, 284, 292, 293, 317, 320, 322, 323, 332, 334, 338, 339, 347,
    *range(512, 522), 530, 531,
}  # fmt: skip
"""What the pixels of a page are, and how they are packed."""
_TIFF_STRIPS = {273, 279, 324, 325}
"""Where strips and tiles are, and how long."""
_TIFF_COLOURS = {529, 532}
"""Of YCbCr, and the only ones here that need not be whole."""
_TIFF_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 13: "u4", 16: "u8"}
_TIFF_OTHERS = {2: 1, 5: 8, 10: 8, 11: 4, 12: 8}
"""Bytes of a value by its type."""


class _Page:
    """The tags of a TIFF's first page by their number: type, count, and the value or its place."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.endian, self.big = "<" if data[:1] == b"I" else ">", data[2:3] == b"+"
        self.count_form, self._entry = (self.endian + form for form in (("Q", "HHQ8s") if self.big else ("H", "HHI4s")))
        (self.start,) = struct.unpack_from(self.endian + ("Q" if self.big else "I"), data, 8 if self.big else 4)
        (count,) = struct.unpack_from(self.count_form, data, self.start)
        if count > MAX_TAGS:
            raise ImageError(f"the TIFF has more than {MAX_TAGS} tags")
        self.tags: dict[int, tuple[int, int, bytes]] = {}
        first, size = self.start + struct.calcsize(self.count_form), struct.calcsize(self._entry)
        for place in range(first, first + count * size, size):
            tag, *rest = struct.unpack_from(self._entry, data, place)
            if rest[0] in _TIFF_INTEGERS or rest[0] in _TIFF_OTHERS:
                self.tags.setdefault(tag, tuple(rest))

    def size(self, tag: int) -> int:
        kind, count, _ = self.tags[tag]
        return count * (_TIFF_OTHERS.get(kind) or np.dtype(_TIFF_INTEGERS[kind]).itemsize)

    def value(self, tag: int) -> memoryview:
        """As many of its bytes as the file has."""
        size, inline = self.size(tag), self.tags[tag][2]
        if size <= len(inline):
            return memoryview(inline)[:size]
        (place,) = struct.unpack(self.endian + ("Q" if self.big else "I"), inline)
        return memoryview(self._data)[place : place + size]

    def integers(self, tag: int) -> NDArray[Any]:
        kind = np.dtype(self.endian + _TIFF_INTEGERS[self.tags[tag][0]])
        value = self.value(tag)
        return np.frombuffer(value[: len(value) // kind.itemsize * kind.itemsize], kind)

    def integer(self, tag: int, default: int) -> int:
        return int(self.integers(tag)[0]) if tag in self.tags else default

    def table(self) -> bytes:
        """These tags as the only page's."""
        rows = b"".join(struct.pack(self._entry, tag, *self.tags[tag]) for tag in sorted(self.tags))
        return struct.pack(self.count_form, len(self.tags)) + rows + bytes(8 if self.big else 4)


def _tiff(data: bytes) -> io.BytesIO:
    """The file with no pages and tags but those of its first page's pixels."""
    page = _Page(data)
    if _ORIENTATION in page.tags and page.tags[_ORIENTATION][0] not in _TIFF_INTEGERS:
        del page.tags[_ORIENTATION]  # as of any other damaged EXIF: the picture is not turned by it
    if _XMP in page.tags and _ORIENTATION not in page.tags and (found := _XMP_ORIENTATION.search(page.value(_XMP))):
        value = struct.pack(page.endian + "H", int(found[1])).ljust(8 if page.big else 4, b"\0")
        page.tags[_ORIENTATION] = (3, 1, value)
    for tag in page.tags.keys() - _TIFF_PIXELS - _TIFF_STRIPS - _TIFF_COLOURS:
        del page.tags[tag]
    metadata = _Metadata()
    for tag, (kind, _, _) in page.tags.items():
        if kind not in _TIFF_INTEGERS and tag not in _TIFF_COLOURS:
            raise ImageError(f"{_DAMAGED}: the TIFF's tag {tag} is no whole number")
        if tag not in _TIFF_STRIPS:
            metadata.add(page.size(tag))
    _check_strips(page, len(data))
    file = io.BytesIO(data)
    file.seek(page.start)
    file.write(page.table())
    file.seek(0)
    return file


def _check_strips(page: _Page, file_size: int) -> None:
    """Refuse a TIFF of too many strips or tiles, of tiles much larger than itself, or of overlapping ones."""
    width, height = page.integer(256, 0), page.integer(257, 0)
    if width < 1 or height < 1:
        raise ImageError(f"{_DAMAGED}: the TIFF has {width} x {height} pixels")
    across, down = page.integer(322, width), page.integer(323, page.integer(278, height))
    if across < 1 or down < 1:
        raise ImageError(f"{_DAMAGED}: the TIFF's strips or tiles have {across} x {down} pixels")
    if 322 in page.tags and across * down > max(MAX_TILE, 2 * width * height):
        # What one tile takes is allocated and unpacked.
        raise ImageError(f"the TIFF's tiles have {across} x {down} pixels, many more than itself")
    planes = page.integer(277, 1) if page.integer(284, 1) == 2 else 1
    number = -(-width // across) * -(-height // down) * planes
    listed = max((page.tags[tag][1] for tag in _TIFF_STRIPS & page.tags.keys()), default=0)
    if max(number, listed) > MAX_STRIPS + width * height // 256:
        raise ImageError(f"the TIFF has {max(number, listed)} strips or tiles, too many for its size")
    if page.integer(259, 1) != 1:
        # Each strip is gone through on its own, so that many may cost much where they are the same bytes.
        # A length that is missing or none is taken to be the whole file, as libtiff does.
        lengths = next((page.integers(tag) for tag in (325, 279) if tag in page.tags), np.zeros(0))
        known = lengths[(lengths > 0) & (lengths < file_size)]
        if int(known.sum(dtype=np.float64)) + (max(number, listed) - len(known)) * file_size > file_size + _OVERLAP:
            raise ImageError("the TIFF's strips or tiles overlap")
