"""Small or few-pixel files that would take Pillow minutes or gigabytes: refused, or cut down, before it sees them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import BmpImagePlugin, Image

from hypersam import images, picture_parts
from hypersam.errors import ImageError
from hypersam.images import decode_image
from hypersam.picture_parts import essential
from tests.hypersam.test_pictures import bmp_of_runs, chunk, encoded
from tests.memory import peak_bytes

SIZE = 4 << 20
SQUARE = Image.new("RGB", (8, 8))
REFUSED: dict[str, Callable[[], bytes]] = {}
READ: dict[str, Callable[[], bytes]] = {}


def bomb(kept: dict[str, Callable[[], bytes]]) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    def add(make: Callable[[], bytes]) -> Callable[[], bytes]:
        kept[make.__name__] = make
        return make

    return add


def png_with(before: bytes = b"", after: bytes = b"") -> bytes:
    whole = encoded(SQUARE)
    return whole[:33] + before + whole[33:-12] + after + whole[-12:]


def jpeg_with(before: bytes) -> bytes:
    whole = encoded(SQUARE, "JPEG")
    return whole[:2] + before + whole[2:]


def gif_with(blocks: bytes, behind: bytes = b"") -> bytes:
    whole = encoded(SQUARE.convert("P"), "GIF")
    start = 13 + 3 * 2 ** ((whole[10] & 7) + 1)
    assert whole[start:].startswith(b",")
    return whole[:start] + blocks + whole[start:-1] + behind + b";"


def webp_with(behind: bytes) -> bytes:
    body = encoded(SQUARE, "WEBP")[8:] + behind
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff_with(*tags: tuple[int, int, int, int], body: bytes = b"", height: int = 8, packing: int = 1) -> bytes:
    """A grey TIFF of 8 pixels a row, whose one strip is at 1000 unless the tags say else; the body is at 2000."""
    found = {256: (3, 1, 8), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, packing), 262: (3, 1, 1)}
    found |= {273: (4, 1, 1000), 277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, 64)}
    found |= {tag: tuple(rest) for tag, *rest in tags}
    table = b"".join(struct.pack("<HHII", tag, *found[tag]) for tag in sorted(found))
    head = struct.pack("<2sHIH", b"II", 42, 8, len(found)) + table + bytes(4)
    return head.ljust(2000, b"\0") + body


@bomb(REFUSED)
def png_of_empty_chunks() -> bytes:
    return png_with(chunk(b"aaAa", b"") * (SIZE // 12))


@bomb(REFUSED)
def png_of_empty_chunks_behind_its_pixels() -> bytes:
    return png_with(after=chunk(b"aaAa", b"") * (SIZE // 12))


@bomb(REFUSED)
def png_of_small_texts() -> bytes:
    return png_with(b"".join(chunk(b"tEXt", b"%07x\0" % each) for each in range(SIZE // 20)))


@bomb(REFUSED)
def png_of_empty_image_data() -> bytes:
    return png_with(chunk(b"IDAT", b"") * (SIZE // 12))


@bomb(REFUSED)
def png_of_much_exif() -> bytes:
    return png_with(chunk(b"eXIf", b"II*\0\x08\0\0\0" + bytes(SIZE)))


@bomb(REFUSED)
def gif_of_a_comment_in_small_blocks() -> bytes:
    return gif_with(b"!\xfe" + b"\x01a" * (SIZE // 2) + b"\0")


@bomb(REFUSED)
def gif_of_small_comments() -> bytes:
    return gif_with(b"!\xfe\x01a\0" * (SIZE // 5))


@bomb(REFUSED)
def gif_of_nothing() -> bytes:
    return gif_with(bytes(SIZE))


@bomb(REFUSED)
def jpeg_of_fill_bytes() -> bytes:
    return jpeg_with(b"\xff" * SIZE)


@bomb(REFUSED)
def jpeg_of_fill_bytes_between_scans() -> bytes:
    whole = encoded(SQUARE, "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + b"\xff" * SIZE + whole[last:]


@bomb(REFUSED)
def jpeg_of_fill_bytes_at_its_end() -> bytes:
    return encoded(SQUARE, "JPEG")[:-2] + b"\xff" * SIZE


@bomb(REFUSED)
def jpeg_of_much_exif() -> bytes:
    return jpeg_with((b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)) * (SIZE // 65537))


@bomb(REFUSED)
def jpeg_of_many_tables() -> bytes:
    return jpeg_with((b"\xff\xdb" + struct.pack(">H", 2 + 65 * 1008) + bytes(65 * 1008)) * (SIZE // 65537))


@bomb(REFUSED)
def webp_of_empty_chunks() -> bytes:
    return webp_with(b"JUNK\0\0\0\0" * (SIZE // 8))


@bomb(REFUSED)
def webp_of_more_data_than_pixels() -> bytes:
    whole = encoded(SQUARE, "WEBP")
    body = whole[20:] + bytes(SIZE)
    return b"RIFF" + struct.pack("<I", 12 + len(body)) + whole[8:16] + struct.pack("<I", len(body)) + body


@bomb(REFUSED)
def bmp_of_a_large_header() -> bytes:
    return b"BM" + struct.pack("<IHHII", SIZE, 0, 0, 54, SIZE) + bytes(SIZE)


@bomb(REFUSED)
def tiff_of_a_tile_width_that_is_text() -> bytes:
    return tiff_with((322, 2, 4, 0x414141), (323, 4, 1, (1 << 31) - 1))


@bomb(REFUSED)
def tiff_of_a_tile_width_that_is_floating() -> bytes:
    return tiff_with((322, 11, 1, 0x7FC00000), (323, 4, 1, 8))  # NaN


@bomb(REFUSED)
def tiff_of_negative_tiles() -> bytes:
    return tiff_with((322, 9, 1, 0xFFFFFFF0), (323, 9, 1, 0xFFFFFFF0))


@bomb(REFUSED)
def tiff_of_thousands_of_tags() -> bytes:
    return tiff_with(*((tag, 1, 4, 0) for tag in range(1000, 6000)))


@bomb(REFUSED)
def tiff_of_many_sample_formats() -> bytes:
    return tiff_with((339, 3, SIZE // 2, 2000), body=bytes(SIZE))


@bomb(REFUSED)
def tiff_of_strips_of_some_pixels() -> bytes:
    rows = SIZE // 8
    strips = ((273, 4, rows, 2000), (278, 4, 1, 1), (279, 4, rows, 2000))
    return tiff_with(*strips, body=bytes(SIZE), height=rows)


def overlapping(lengths: Iterable[int]) -> bytes:
    """Each row is the whole body, which does nothing but for its last bytes."""
    body = b"\x80" * SIZE + b"\x07abcdefgh"
    stored = list(lengths)
    strips = (
        (273, 4, len(stored), 2000), (278, 4, 1, 1), (279, 4, len(stored), 2000 + 4 * len(stored)),
    )  # fmt: skip
    lists = struct.pack("<I", 2000 + 8 * len(stored)) * len(stored) + struct.pack(f"<{len(stored)}I", *stored)
    return tiff_with(*strips, body=lists + body, height=len(stored), packing=32773)


@bomb(REFUSED)
def tiff_of_overlapping_strips() -> bytes:
    return overlapping([SIZE + 9] * 100)


@bomb(REFUSED)
def tiff_of_strips_without_lengths() -> bytes:
    return overlapping([0] * 100)


@bomb(REFUSED)
def tiff_of_a_big_endian_sort_that_is_read_in_two_ways() -> bytes:
    return b"MM\0+" + bytes(SIZE)


@bomb(READ)
def png_of_compressed_texts() -> bytes:
    packed = zlib.compress(("\U0001f600" + "a" * 1_000_000).encode())
    return png_with(b"".join(chunk(b"iTXt", b"%d\0\1\0\0\0" % each + packed) for each in range(60)))


@bomb(READ)
def png_of_much_xmp() -> bytes:
    return png_with(chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + "\U0001f600".encode() + b"a" * SIZE))


@bomb(READ)
def png_of_more_data_than_pixels() -> bytes:
    whole = encoded(SQUARE)
    length = struct.unpack_from(">I", whole, 33)[0]
    return whole[:33] + chunk(b"IDAT", whole[41 : 41 + length] + bytes(SIZE)) + whole[-12:]


@bomb(READ)
def gif_of_many_frames() -> bytes:
    frame = gif_with(b"")
    frame = frame[frame.index(b",", 13) : -1]
    return gif_with(b"", frame * (SIZE // len(frame)))


@bomb(READ)
def jpeg_of_photoshop_blocks() -> bytes:
    body = b"Photoshop 3.0\0" + b"8BIM\0\1\0\0\0\0\0\0" * 5400
    return jpeg_with((b"\xff\xed" + struct.pack(">H", 2 + len(body)) + body) * (SIZE // len(body)))


@bomb(READ)
def webp_of_large_others() -> bytes:
    return webp_with(b"JUNK" + struct.pack("<I", SIZE) + bytes(SIZE))


@pytest.mark.parametrize("name", REFUSED)
def test_pillow_never_sees_these(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = REFUSED[name]()

    def opened(*_: object, **__: object) -> None:
        pytest.fail("Pillow was given it")

    monkeypatch.setattr(images.Image, "open", opened)
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert caught.value.code == "bad_image"


@pytest.mark.parametrize("name", READ)
def test_pillow_sees_little_of_these(name: str) -> None:
    data = READ[name]()
    assert len(essential(data).getbuffer()) <= picture_parts._ROOM + 2000
    assert decode_image(data).shape == (8, 8, 3)


def test_what_a_tiff_has_beside_its_first_page_is_not_parsed() -> None:
    n = SIZE // 8
    page = struct.pack("<HHHIII", 1, 256, 4, 1, 8, 2000)  # the next one is itself
    data = bytearray(
        tiff_with((282, 5, n, 2000), (34675, 7, SIZE, 2000), (700, 1, SIZE, 2000), body=page + bytes(SIZE))
    )
    count = struct.unpack_from("<H", data, 8)[0]
    struct.pack_into("<I", data, 10 + 12 * count, 2000)
    with Image.open(essential(bytes(data))) as opened:
        assert not {282, 34675, 700} & set(opened.tag_v2)
        assert opened.n_frames == 1
    assert decode_image(bytes(data)).shape == (8, 8, 3)


def test_memory(tmp_path: Path) -> None:
    for name, make in {**REFUSED, **READ}.items():
        (tmp_path / name).write_bytes(make())
    used = peak_bytes(
        "from hypersam.images import decode_image\n"
        "from hypersam.errors import ImageError\n"
        "files = [path.read_bytes() for path in sorted(Path(sys.argv[1]).iterdir())]",
        "for data in files:\n    try:\n        decode_image(data)\n    except ImageError:\n        pass",
        str(tmp_path),
    )
    print(used >> 20, "MiB")
    assert used <= (32 << 20) + 2 * (SIZE + 2000)


def test_memory_of_a_webp_that_is_large_itself(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1600, 4), dtype=np.uint8)
    path = tmp_path / "noise.webp"
    path.write_bytes(encoded(Image.fromarray(noise), "WEBP", lossless=True, method=0, quality=0))
    size = path.stat().st_size
    assert size > 9_000_000
    used = peak_bytes(
        "from hypersam.images import decode_image; data = Path(sys.argv[1]).read_bytes()",
        "decode_image(data)",
        str(path),
    )
    print(used / 1600**2, "bytes a pixel")
    assert used <= 20 * 1600**2 + (32 << 20) + 2 * size


def runs(rng: random.Random, width: int, rows: int, *, four_bits: bool) -> bytes:
    """Runs, single pixels, gaps and ends of rows, most of them within their rows."""
    body = b""
    for _ in range(rows):
        x = 0
        while x < width:
            count = rng.randrange(1, width - x + 1 + rng.randrange(2))
            if count < 3 or rng.random() < 0.5:
                body += bytes([count, rng.randrange(256)])
            else:
                size = (count + 1) // 2 if four_bits else count
                body += bytes([0, count]) + rng.randbytes(size + size % 2)
            x += count
            if rng.random() < 0.1:
                body += bytes([0, 2, rng.randrange(3), rng.randrange(2)])
            if rng.random() < 0.1:
                break
        body += b"\0\0"
    return body + b"\0\1"


def test_run_lengths_are_unpacked_as_pillow_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    files = []
    for each in range(300):
        bits = rng.choice((4, 8))
        body = runs(rng, 13, rng.choice((7, 7, 8, 3)), four_bits=bits == 4)
        files.append(bmp_of_runs(13, 7, bits, body[: rng.choice((1000, 1000, 40))], rng.randbytes(1024)))
        if each % 3 == 0:  # damaged
            changed = bytearray(files[-1])
            changed[-rng.randrange(1, len(body) // 2)] = rng.choice((0, 1, 2, 255))
            files[-1] = bytes(changed)
    expected = []
    for data in files:
        try:
            expected.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
        except ValueError:  # not enough image data
            expected.append(None)
    assert 50 < sum(each is None for each in expected) < 250

    def decode(*_: object) -> None:
        pytest.fail("unpacked by Pillow")

    monkeypatch.setattr(BmpImagePlugin.BmpRleDecoder, "decode", decode)
    for data, pixels in zip(files, expected, strict=True):
        if pixels is None:
            with pytest.raises(ImageError):
                decode_image(data)
        else:
            assert np.array_equal(decode_image(data), pixels)


def test_a_large_bmp_of_ends_of_rows_is_not_unpacked_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BmpImagePlugin.BmpRleDecoder, "decode", lambda *_: pytest.fail("unpacked by Pillow"))
    data = bmp_of_runs(3000, 3000, 8, b"\1\1\0\0" * 3000, bytes([0, 0, 0, 0, 9, 9, 9, 0]).ljust(1024, b"\0"))
    pixels = decode_image(data)
    assert (pixels[:, 0] == 9).all()
    assert not pixels[:, 1:].any()
