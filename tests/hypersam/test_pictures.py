"""docs/pictures.md, row by row."""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from hypersam.errors import ImageError, ImageTooLarge
from hypersam.images import decode_image
from hypersam.loading import dense_model
from hypersam.sam.detect import detect
from hypersam.sam.predictor import SamPredictor
from tests.memory import peak_bytes
from tests.models import official_sam

TABLE = Path(__file__).parents[2] / "docs" / "pictures.md"
NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
PICTURE = Image.fromarray(NOISE)
ROWS: dict[str, Callable[[], None]] = {}


def row(title: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(check: Callable[[], None]) -> Callable[[], None]:
        assert title not in ROWS
        ROWS[title] = check
        return check

    return add


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=form, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG by hand; ``colour``: 0 grey, 2 RGB, 4 grey with alpha, 6 RGBA."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def gives(data: bytes, pixels: NDArray[np.uint8]) -> None:
    found = decode_image(data)
    assert found.dtype == np.uint8
    assert np.array_equal(found, pixels)


def greys(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(values[..., None], 3, axis=2)


def refused(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.code == "bad_image"


def too_large(data: bytes) -> None:
    with pytest.raises(ImageTooLarge) as caught:
        decode_image(data)
    assert caught.value.code == "image_too_large"


@row("PNG, BMP, TIFF, lossless WebP")
def _() -> None:
    for form, options in (("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        gives(encoded(PICTURE, form, **options), NOISE)


@row("JPEG, lossy WebP")
def _() -> None:
    for form in ("JPEG", "WEBP"):
        data = encoded(PICTURE, form)
        gives(data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@row("progressive JPEG")
def _() -> None:
    data = encoded(PICTURE, "JPEG", progressive=True)
    gives(data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@row("GIF")
def _() -> None:
    palette = PICTURE.quantize(16)
    gives(encoded(palette, "GIF"), np.asarray(palette.convert("RGB")))


FRAMES = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue", "lime")]
RED = np.asarray(FRAMES[0])


@row("animated GIF, PNG, WebP")
def _() -> None:
    for form, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(FRAMES[0], form, save_all=True, append_images=FRAMES[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 3
        gives(data, RED)


@row("TIFF of several pages")
def _() -> None:
    gives(encoded(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), RED)


@row("GIF of 500 frames with comments")
def _() -> None:
    frames = [Image.new("RGB", (8, 6), (each % 256, each // 256, 99)) for each in range(500)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], comment=b"by hand " * 100, disposal=2)
    assert Image.open(io.BytesIO(data)).n_frames == 500
    gives(data, np.full((6, 8, 3), (0, 0, 99), np.uint8))


@row("PNG of image data in thousands of chunks, with texts, XMP and others' chunks")
def _() -> None:
    noise = np.random.default_rng(2).integers(0, 256, (500, 400, 3), dtype=np.uint8)
    packed = zlib.compress(np.pad(noise.reshape(500, -1), ((0, 0), (1, 0))).tobytes(), 0)
    pieces = [packed[start : start + 64] for start in range(0, len(packed), 64)]
    assert len(pieces) > 9000
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 400, 500, 8, 2, 0, 0, 0))
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta>" + b"<rdf:li>layer</rdf:li>" * 100_000
    others = [
        (b"iTXt", xmp),
        (b"tEXt", b"parameters\0a cat"),
        (b"caBX", bytes(1 << 20)),
        (b"gAMA", bytes([0, 0, 177, 143])),
    ]
    before = b"".join(chunk(*each) for each in others)
    body = before + b"".join(chunk(b"IDAT", each) for each in pieces) + chunk(b"tIME", bytes(7)) + chunk(b"IEND", b"")
    gives(b"\x89PNG\r\n\x1a\n" + header + body, noise)


@row("JPEG of a phone: EXIF with a preview, a profile in several segments, a second picture behind it")
def _() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    block = exif.tobytes() + encoded(PICTURE.resize((160, 120)), "JPEG")
    data = encoded(PICTURE, "JPEG", exif=block, icc_profile=bytes(200_000), xmp=b"<x:xmpmeta/>", comment=b"hello")
    assert data.count(b"ICC_PROFILE") == 4
    index = data.index(b"\xff\xe2")
    phone = data[:index] + b"\xff\xe2\0\x0eMPF\0II*\0\x08\0\0\0" + data[index:]
    phone += encoded(Image.new("RGB", (300, 200)), "JPEG")
    pixels = np.rot90(np.asarray(Image.open(io.BytesIO(encoded(PICTURE, "JPEG")))), -1)
    gives(phone, pixels)


@row("BMP of run lengths")
def _() -> None:
    colours = bytes(range(64)) * 16
    for bits, body, rows in (
        (8, bytes([3, 7, 1, 9, 0, 0, 0, 3, 1, 2, 3, 0, 1, 4, 0, 1]), [[1, 2, 3, 4], [7, 7, 7, 9]]),
        (4, bytes([3, 0x78, 1, 0x90, 0, 0, 0, 3, 0x12, 0x30, 1, 0x40, 0, 1]), [[1, 2, 3, 4], [7, 8, 7, 9]]),
    ):
        picture = Image.new("P", (4, 2))
        picture.putpalette(colours, "BGRX")
        picture.putdata([index for each in rows for index in each])
        gives(bmp_of_runs(4, 2, bits, body, colours), np.asarray(picture.convert("RGB")))


def bmp_of_runs(width: int, height: int, bits: int, body: bytes, colours: bytes) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 1 if bits == 8 else 2, 0, 0, 0, 1 << bits, 0)
    head += colours[: 4 << bits]
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + len(head)) + head + body


@row("XMP orientation, where EXIF data has none")
def _() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    turned = np.rot90(NOISE, -1)
    text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    whole = encoded(PICTURE)
    gives(whole[:33] + text + whole[33:], turned)
    gives(encoded(PICTURE, "TIFF", tiffinfo={700: xmp}), turned)
    gives(encoded(PICTURE, "TIFF", tiffinfo={700: xmp, 0x0112: 3}), NOISE[::-1, ::-1])
    gives(encoded(PICTURE, "WEBP", lossless=True, xmp=xmp), turned)
    data = encoded(PICTURE, "JPEG", xmp=xmp)
    gives(data, np.rot90(np.asarray(Image.open(io.BytesIO(data))), -1))


@row("1 bit a pixel")
def _() -> None:
    bits = NOISE[..., 0] > 127
    for form in ("PNG", "TIFF", "BMP"):
        gives(encoded(Image.fromarray(bits), form), greys(bits.astype(np.uint8) * 255))


@row("grey of 8 bits")
def _() -> None:
    gives(encoded(Image.fromarray(NOISE[..., 0])), greys(NOISE[..., 0]))


@row("grey of 16 bits")
def _() -> None:
    values = np.arange(0, 65536, 97, dtype=np.uint16)[None]
    expected = greys(np.rint(values / 257).astype(np.uint8))
    for form in ("PNG", "TIFF"):
        gives(encoded(Image.fromarray(values), form), expected)
    gives(encoded(Image.fromarray(np.full((2, 2), 200, np.uint16))), np.full((2, 2, 3), 1, np.uint8))
    swapped = struct.pack(">2sHI", b"MM", 42, 8)  # a big-endian TIFF
    tags = ((256, 4, 2), (257, 4, 1), (258, 3, 16 << 16), (262, 3, 1 << 16), (273, 4, 86), (279, 4, 4))
    swapped += struct.pack(">H", len(tags)) + b"".join(struct.pack(">HHII", t, k, 1, v) for t, k, v in tags) + bytes(4)
    gives(swapped + struct.pack(">HH", 257 * 9, 257 * 200), np.array([[[9] * 3, [200] * 3]], np.uint8))


@row("grey of 32 bits or floating")
def _() -> None:
    for kind in (np.int32, np.float32):
        gives(encoded(Image.fromarray(np.full((2, 3), 200, kind)), "TIFF"), np.full((2, 3, 3), 200, np.uint8))
        gives(encoded(Image.fromarray(np.full((2, 3), 51400, kind)), "TIFF"), np.full((2, 3, 3), 200, np.uint8))
    odd = np.array([[np.nan, -5, np.inf, 100]], np.float32)
    assert decode_image(encoded(Image.fromarray(odd), "TIFF"))[0, :, 0].tolist() == [0, 0, 255, 0]


@row("RGB of 16 bits")
def _() -> None:
    gives(png(1, 1, 16, 2, b"\0" + bytes([200, 9, 100, 9, 50, 9])), np.array([[[200, 100, 50]]], np.uint8))


@row("palette")
def _() -> None:
    palette = PICTURE.quantize(8)
    gives(encoded(palette), np.asarray(palette.convert("RGB")))


@row("palette with a transparent colour")
def _() -> None:
    palette = PICTURE.quantize(8)
    expected = np.where(np.asarray(palette)[..., None] == 3, 255, np.asarray(palette.convert("RGB"))).astype(np.uint8)
    gives(encoded(palette, transparency=3), expected)


def on_white(colours: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.float64]:
    share = alpha[..., None] / 255
    return colours * share + 255 * (1 - share)


@row("alpha")
def _() -> None:
    alpha = NOISE[..., 1]
    for form, options in (("PNG", {}), ("TIFF", {})):
        found = decode_image(encoded(Image.fromarray(np.dstack([NOISE, alpha])), form, **options))
        assert np.abs(found - on_white(NOISE, alpha)).max() <= 1
    clear = decode_image(encoded(Image.fromarray(np.dstack([NOISE, np.zeros_like(alpha)])), "WEBP", lossless=True))
    assert (clear == 255).all()


@row("grey with alpha")
def _() -> None:
    found = decode_image(encoded(Image.fromarray(NOISE[..., :2].copy(), "LA")))
    assert np.abs(found - on_white(greys(NOISE[..., 0]), NOISE[..., 1])).max() <= 1


@row("alpha of 16 bits")
def _() -> None:
    found = decode_image(png(2, 1, 16, 6, b"\0" + bytes([200, 0, 100, 0, 50, 0, 255, 255]) + bytes(8)))
    assert found.tolist() == [[[200, 100, 50], [255, 255, 255]]]
    assert decode_image(png(1, 1, 16, 4, b"\0" + bytes([200, 0, 0, 0]))).tolist() == [[[255, 255, 255]]]


@row("CMYK")
def _() -> None:
    for form in ("TIFF", "JPEG"):
        gives(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), form), np.full((8, 8, 3), (255, 0, 0), np.uint8))


@row("YCbCr and Lab TIFF")
def _() -> None:
    for mode in ("YCbCr", "LAB"):
        data = encoded(Image.new(mode, (4, 4), (128, 128, 128)), "TIFF")
        found = decode_image(data)
        assert found.shape == (4, 4, 3)
        assert np.ptp(found.astype(int), axis=2).max() <= 4  # grey


@row("EXIF orientation 1 to 8")
def _() -> None:
    turned = (
        NOISE, NOISE[:, ::-1], NOISE[::-1, ::-1], NOISE[::-1], NOISE.swapaxes(0, 1), np.rot90(NOISE, -1),
        NOISE[::-1, ::-1].swapaxes(0, 1), np.rot90(NOISE),
    )  # fmt: skip
    for orientation, expected in enumerate(turned, 1):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for form, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
            gives(encoded(PICTURE, form, exif=exif, **options), expected)


@row("EXIF block that is damaged")
def _() -> None:
    for block in (b"Exif\0\0junk", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"):
        gives(encoded(PICTURE, "PNG", exif=block), NOISE)


@row("colour profile")
def _() -> None:
    for kind in ("sRGB", "XYZ"):
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile(kind)).tobytes()
        gives(encoded(PICTURE, icc_profile=profile), NOISE)


@row("colour profile that is damaged")
def _() -> None:
    gives(encoded(PICTURE, icc_profile=b"junk" * 30), NOISE)


def segmented(pixels: NDArray[np.uint8]) -> None:
    sam = official_sam()
    predictor = SamPredictor(dense_model(sam.state_dict(), detect(sam.state_dict()), device="cpu"))
    with torch.inference_mode():
        predictor.set_image(pixels)
        masks, scores, _ = predictor.predict(np.array([[0.0, 0.0]]), np.array([1]), multimask_output=False)
    assert masks.shape == (1, *pixels.shape[:2])
    assert np.isfinite(scores).all()


@row("one pixel")
def _() -> None:
    gives(encoded(Image.new("RGB", (1, 1), "red")), np.array([[[255, 0, 0]]], np.uint8))
    segmented(np.zeros((1, 1, 3), np.uint8))


@row("30,000 x 1 and 1 x 30,000 pixels")
def _() -> None:
    for size in ((30_000, 1), (1, 30_000)):
        pixels = decode_image(encoded(Image.new("RGB", size, "red")))
        assert pixels.shape == (size[1], size[0], 3)
        segmented(pixels)


@row("30,000 x 2,000 pixels")
def _() -> None:
    assert decode_image(encoded(Image.new("L", (30_000, 2_000)))).shape == (2_000, 30_000, 3)


@row("30,000 x 30,000 pixels")
def _() -> None:
    too_large(png(30_000, 30_000, 8, 2, b""))
    too_large(encoded(Image.new("1", (30_000, 30_000))))


@row("2³¹ pixels a side")
def _() -> None:
    too_large(png((1 << 31) - 1, (1 << 31) - 1, 8, 2, b""))
    too_large(png((1 << 31) - 1, 1, 8, 2, b""))


@row("no pixels")
def _() -> None:
    refused(png(0, 5, 8, 2, b""))
    refused(png(5, 0, 8, 2, b""))


@row("small file that says it is large")
def _() -> None:
    for width, height, check in ((7000, 9000, refused), (8001, 8000, too_large)):
        check(png(width, height, 8, 2, bytes(100)))
        check(b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0))
    data = bytearray(encoded(Image.new("P", (2, 2)), "GIF"))
    data[6:10] = struct.pack("<HH", 65535, 65535)
    too_large(bytes(data))


BLACK = np.zeros((1, 1, 3), np.uint8)


@row("compressed text or profile that unpacks to 256 MB")
def _() -> None:
    bomb = b"key\0\0" + zlib.compress(bytes(1 << 28))
    for kind in (b"zTXt", b"iCCP"):
        gives(png(1, 1, 8, 2, b"\0" + bytes(3), chunk(kind, bomb)), BLACK)
    for key, check in ((b"key", lambda data: gives(data, BLACK)), (b"XML:com.adobe.xmp", refused)):
        text = key + b"\0\1\0\0\0" + bomb[5:]
        check(png(1, 1, 8, 2, b"\0" + bytes(3), chunk(b"iTXt", text)))


@row("more pixel data than the header's size needs")
def _() -> None:
    gives(png(2, 1, 8, 2, bytes(1 << 26)), np.zeros((1, 2, 3), np.uint8))


def tiled_tiff(width: int, height: int, tile: int, *, sides: int = 1) -> bytes:
    """A TIFF of 8-bit greys in tiles of zeros, deflated; ``sides``: how often it tells its tiles' sides."""
    packed = zlib.compressobj(9)
    body = b"".join(packed.compress(bytes(tile)) for _ in range(tile)) + packed.flush()
    tags = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(tag, side) for tag in (322, 323) for side in (tile, *[16] * (sides - 1))]
    start = 8 + 2 + 12 * (len(tags) + 2) + 4
    tags += [(324, start), (325, len(body))]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    return head + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags) + bytes(4) + body


@row("TIFF whose tiles are many times larger than itself")
def _() -> None:
    gives(tiled_tiff(4, 3, 512), np.zeros((3, 4, 3), np.uint8))
    for tile in (2064, 1 << 13):
        refused(tiled_tiff(4, 3, tile))
        refused(tiled_tiff(4, 3, tile, sides=2))
    gives(tiled_tiff(2000, 2000, 2064), np.zeros((2000, 2000, 3), np.uint8))


@row("JPEG of more than 100 scans, or of thousands of segments")
def _() -> None:
    large = encoded(Image.new("L", (8000, 8000)), "JPEG", progressive=True)
    usual, last = large.count(b"\xff\xda"), large[large.rindex(b"\xff\xda") : -2]
    refused(large[:-2] + last * (26 - usual) + large[-2:])  # 100 are too many for so large a one
    whole = encoded(PICTURE, "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    usual = whole.count(b"\xff\xda")
    decode_image(whole[:-2] + last * (100 - usual) + whole[-2:])
    refused(whole[:-2] + last * (101 - usual) + whole[-2:])
    refused(whole[:-2] + (b"\xff\x02\xff\xff" + last) * 100 + whole[-2:])
    exif = b"\xff\xe1\0\x09Exif\0\0x"
    decode_image(whole[:2] + exif * 1000 + whole[2:])
    refused(whole[:2] + exif * 5000 + whole[2:])
    # What only looks like scans: in a comment, and behind the picture.
    comment = b"\xff\xfe\x01\x92" + b"\xff\xda\0\x02" * 100
    pixels = decode_image(whole)
    gives(whole[:2] + comment * 4 + whole[2:] + last * 200, pixels)


@row("truncated anywhere")
def _() -> None:
    for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = encoded(PICTURE, form)
        for share in range(1, 10):
            refused(whole[: len(whole) * share // 10])


MARKUP = (
    b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<?xml version='1.0'?><svg/>", b"<!DOCTYPE html><html></html>",
    b"<script>alert(1)</script>", b"%PDF-1.7\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
)  # fmt: skip


@row("SVG, HTML, PDF, PostScript")
def _() -> None:
    for data in MARKUP:
        refused(data + bytes(100))


@row("SVG or HTML behind a picture's signature")
def _() -> None:
    for signature in (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\x40\0\0\0WEBP", b"BM", b"II*\0"):
        for data in MARKUP:
            refused(signature + data + bytes(20))


@row("picture that is also a zip file or HTML")
def _() -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as target:
        target.writestr("index.html", "<script>alert(1)</script>")
    for tail in (archive.getvalue(), b"<html><script>alert(1)</script>"):
        gives(encoded(PICTURE) + tail, NOISE)


@row("AVIF, HEIC, JPEG 2000, ICO and others")
def _() -> None:
    for form in ("AVIF", "JPEG2000", "ICO", "PPM", "TGA", "PCX", "DDS", "PDF", "EPS"):
        with pytest.raises(ImageError, match="accepted are PNG, JPEG, WEBP, BMP, TIFF, GIF"):
            decode_image(encoded(PICTURE, form))
    refused(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))


@row("empty file, text, noise")
def _() -> None:
    for data in (b"", b"\0", b"hello", np.random.default_rng(1).bytes(5000)):
        refused(data)


def test_the_table_has_these_rows() -> None:
    table = re.findall(r"^\| (.+?) \| .+ \|$", TABLE.read_text().split("\n## ")[0], re.MULTILINE)
    assert table[0] == "picture"
    assert table[1:] == list(ROWS)


@pytest.mark.parametrize("title", ROWS)
def test_row(title: str) -> None:
    ROWS[title]()


SEEDS = [encoded(PICTURE, form) for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")]


@settings(max_examples=600, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(SEEDS), st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_pictures_give_pixels_or_an_error_of_ours(data: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(data)
    for place, value in changes:
        damaged[place % len(damaged)] = value
    try:
        pixels = decode_image(bytes(damaged), max_pixels=1_000_000)
    except ImageError:
        return
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert pixels.size <= 3_000_000


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "P", "CMYK"])
def test_memory_is_bounded_by_the_pixels(tmp_path: Path, mode: str) -> None:
    side = 4000
    image = Image.fromarray(np.zeros((side, side), np.uint16)) if mode == "I;16" else Image.new(mode, (side, side))
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "picture"
    path.write_bytes(encoded(image, "TIFF" if mode == "CMYK" else "PNG", exif=exif))
    used = peak_bytes(
        "from hypersam.images import decode_image; data = Path(sys.argv[1]).read_bytes()",
        "decode_image(data)",
        str(path),
    )
    print(mode, used / side**2, "bytes a pixel")
    assert 3 * side**2 < used <= 20 * side**2 + (16 << 20)
