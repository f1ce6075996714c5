"""Pictures of every sort that users send, and files that are none."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from hypersam.errors import ImageError, ImageTooLarge
from hypersam.images import decode_image, to_png, to_rle

COLOURS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=form, **options)
    return out.getvalue()


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_the_same_pixels(form: str) -> None:
    options = {"lossless": True} if form == "WEBP" else {}
    assert np.array_equal(decode_image(encoded(Image.fromarray(COLOURS), form, **options)), COLOURS)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotations_are_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    got = decode_image(encoded(Image.fromarray(COLOURS), exif=exif))
    turned = {
        1: COLOURS, 2: COLOURS[:, ::-1], 3: COLOURS[::-1, ::-1], 4: COLOURS[::-1],
        5: COLOURS.swapaxes(0, 1), 6: np.rot90(COLOURS, -1),
        7: COLOURS[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(COLOURS),
    }  # fmt: skip
    assert np.array_equal(got, turned[orientation])


def test_broken_exif_says_nothing_of_the_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(Image.fromarray(COLOURS), "JPEG", exif=exif)
    start = whole.index(b"Exif") + 6
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(whole)
        for position in rng.integers(start, start + 26, 3):
            broken[position] = rng.integers(256)
        assert decode_image(bytes(broken)).size == COLOURS.size


def test_other_modes_become_rgb() -> None:
    grey = COLOURS[..., 0]
    assert np.array_equal(decode_image(encoded(Image.fromarray(grey))), np.repeat(grey[..., None], 3, 2))
    sixteen = grey.astype(np.uint16) * 257
    assert np.array_equal(decode_image(encoded(Image.fromarray(sixteen))), np.repeat(grey[..., None], 3, 2))
    black_or_white = Image.fromarray(grey > 127)
    assert set(np.unique(decode_image(encoded(black_or_white)))) == {0, 255}
    cmyk = decode_image(encoded(Image.fromarray(COLOURS).convert("CMYK"), "JPEG"))
    assert cmyk.shape == COLOURS.shape
    palette = Image.fromarray(COLOURS).quantize(8)
    assert np.array_equal(decode_image(encoded(palette)), np.asarray(palette.convert("RGB")))


def test_transparent_pixels_are_white() -> None:
    clear = np.dstack([COLOURS, np.zeros((20, 30), np.uint8)])
    assert (decode_image(encoded(Image.fromarray(clear, "RGBA"))) == 255).all()


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode_image(data)[..., 0] > 200).all()


@pytest.mark.parametrize("data", [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4"])
def test_files_that_are_no_pictures(data: bytes) -> None:
    with pytest.raises(ImageError, match="PNG"):
        decode_image(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_pictures_cut_short(form: str) -> None:
    whole = encoded(Image.fromarray(COLOURS), form)
    with pytest.raises(ImageError):
        decode_image(whole[: len(whole) // 2])


def test_the_limit_holds_before_decoding() -> None:
    bomb = encoded(Image.new("1", (20_000, 20_000)))
    assert len(bomb) < 100_000
    with pytest.raises(ImageTooLarge, match=r"too large|20000 x 20000"):
        decode_image(bomb)
    with pytest.raises(ImageTooLarge):
        decode_image(encoded(Image.fromarray(COLOURS)), max_pixels=599)
    assert decode_image(encoded(Image.fromarray(COLOURS)), max_pixels=600).shape == (20, 30, 3)


def test_masks_travel_unchanged() -> None:
    mask = COLOURS[..., 0] > 100
    rle = to_rle(mask)
    assert rle["size"] == [20, 30]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # pycocotools with NumPy 2
        back = coco.decode({"size": rle["size"], "counts": rle["counts"].encode()})
    assert np.array_equal(back > 0, mask)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(to_png(mask)))) > 0, mask)
