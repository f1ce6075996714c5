"""The scenes are what they say: repeatable, disjoint by split, as hard as stated, with exact masks."""

from __future__ import annotations

import numpy as np
import pytest

import hypersam
from hypersam.evaluate import deepest_pixel, iou, prompts_for
from hypersam.scenes import MAX_AREA, MIN_AREA, make_scene, scenes


def test_a_seed_always_gives_the_same_scene() -> None:
    a, b = make_scene(5), make_scene(5)
    assert np.array_equal(a.image, b.image)
    assert all(np.array_equal(x.mask, y.mask) for x, y in zip(a.objects, b.objects, strict=True))
    assert not np.array_equal(a.image, make_scene(6).image)
    assert not np.array_equal(a.image, make_scene(5, split="train").image)


def test_the_scenes_are_as_hard_as_stated() -> None:
    things = [thing for scene in scenes(0, 150) for thing in scene.objects]
    assert len(things) > 800
    assert all(MIN_AREA <= t.area <= MAX_AREA for t in things)
    assert min(t.area for t in things) < 0.006
    assert max(t.area for t in things) > 0.3
    for name, share in (("partly_hidden", 1 / 3), ("low_contrast", 1 / 3), ("thin", 0.25), ("twin", 0.25)):
        assert np.mean([getattr(t, name) for t in things]) >= share, name


def test_objects_do_not_overlap() -> None:
    for scene in scenes(0, 20):
        assert np.sum([t.mask for t in scene.objects], axis=0).max() <= 1


@pytest.mark.parametrize("size", [32, 200, 512])
def test_other_sizes(size: int) -> None:
    scene = make_scene(1, size=size)
    assert scene.image.shape == (size, size, 3)
    assert all(t.mask.shape == (size, size) for t in scene.objects)


def test_prompts_lie_on_their_object() -> None:
    for thing in make_scene(3).objects:
        asked = prompts_for(thing)
        x, y = asked["point"].points[0]
        assert thing.mask[int(y), int(x)]
        x0, y0, x1, y1 = (int(v) for v in asked["box"].box or ())
        assert thing.mask[y0:y1, x0:x1].sum() == thing.mask.sum()


def test_the_deepest_pixel_of_a_square_is_its_middle() -> None:
    mask = np.zeros((40, 40), bool)
    mask[5:26, 10:31] = True
    assert deepest_pixel(mask) == (20, 15)
    mask[:] = False
    mask[7, 3] = True
    assert deepest_pixel(mask) == (3, 7)


def test_iou_by_hand() -> None:
    a, b = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    assert iou(a, b) == 1
    a[0], b[0, :2] = True, True
    assert iou(a, b) == 0.5


def test_the_public_names_are_these() -> None:
    assert hypersam.__all__ == [
        "CompressReport", "HypersamError", "PlanReport", "Progress", "SamPredictor", "compress", "load", "plan",
    ]  # fmt: skip
    for name in hypersam.__all__:
        assert getattr(hypersam, name)
