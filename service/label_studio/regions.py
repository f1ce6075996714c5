"""What an annotator has drawn, as prompts. Label Studio's regions are in per cent of the picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hypersam.errors import PromptError
from service.prompt_schemas import Box, Pair, PromptBody

WHERE = "params.context.result"
POINTS = ("keypointlabels", "keypoint")
BOXES = ("rectanglelabels", "rectangle")
_BEYOND = 1.0  # per cent; the browser's rounding puts a point at the edge a hair outside


@dataclass(frozen=True)
class Region:
    """One key point or rectangle, in pixels of the picture of ``size`` (width, height) that it was drawn on.

    ``image`` and ``drawn_by`` are names of tags, where the region tells them; ``item`` is the place in the image tag's
    list, if it has one; ``turned`` the degrees by which the picture was shown turned, which changes no coordinates.
    """

    image: str | None
    item: int | None
    drawn_by: str | None
    labels: tuple[str, ...]
    size: tuple[int, int]
    turned: int
    point: Pair | None
    inside: bool
    box: Box | None


@dataclass(frozen=True)
class Asked:
    """One prompt, and the region that says what its mask shows and which tag it was drawn by."""

    prompt: PromptBody
    region: Region


@dataclass(frozen=True)
class Drawn:
    """What was drawn on one picture: by each rectangle one prompt, or by all key points together."""

    image: str | None
    item: int | None
    size: tuple[int, int]
    asked: tuple[Asked, ...]


def drawn_in(result: Iterable[dict[str, Any]]) -> list[Drawn]:
    """The prompts of a context's regions, by picture. Regions of other kinds are passed over.

    Key points make one prompt, with a lone rectangle too if there is one; several rectangles make one each. Raises
    PromptError for regions that cannot be read, no region at all, and several rectangles among key points.
    """
    listed = list(result)
    labelled = _labels_apart(listed)
    regions = [
        _region(number, given, labelled) for number, given in enumerate(listed) if given.get("type") in POINTS + BOXES
    ]
    if not regions:
        raise PromptError("draw a smart key point or rectangle", field=WHERE)
    pictures: dict[tuple[str | None, int | None], list[Region]] = {}
    for region in regions:
        pictures.setdefault((region.image, region.item), []).append(region)
    return [_drawn(group) for group in pictures.values()]


def _drawn(regions: list[Region]) -> Drawn:
    first = regions[0]
    if any(region.size != first.size for region in regions):
        raise PromptError("regions of one picture say that it has different sizes", field=WHERE)
    points = [region for region in regions if region.point is not None]
    boxes = [region for region in regions if region.box is not None]
    if points and len(boxes) > 1:
        raise PromptError(
            "several rectangles among key points: draw one rectangle with key points, or rectangles alone", field=WHERE
        )
    clicks = PromptBody(
        points=[region.point for region in points if region.point],
        point_labels=[int(region.inside) for region in points],
    )
    if boxes:
        asked = [Asked(clicks.model_copy(update={"box": region.box}), region) for region in boxes]
    else:
        # A click on what does not belong says nothing of what the mask shows.
        asked = [Asked(clicks, next((region for region in reversed(points) if region.inside), first))]
    return Drawn(first.image, first.item, first.size, tuple(asked))


def _region(number: int, given: dict[str, Any], labelled: dict[str, tuple[str, ...]]) -> Region:
    kind, field = str(given["type"]), f"{WHERE}.{number}"
    try:
        value = given["value"]
        width, height = int(given["original_width"]), int(given["original_height"])
        x, y = _finite(value["x"]), _finite(value["y"])
        positive = given.get("is_positive")
        labels = _labels(value.get(kind)) or _labels(value.get("labels")) or labelled.get(str(given.get("id")), ())
        return Region(
            image=_name(given.get("to_name")),
            item=int(given["item_index"]) if given.get("item_index") is not None else None,
            drawn_by=_name(given.get("from_name")),
            labels=labels,
            size=(width, height),
            turned=int(given.get("image_rotation") or 0),
            point=(_pixels(x, width), _pixels(y, height)) if kind in POINTS else None,
            inside=positive is None or bool(int(positive)),
            box=_box(value, x, y, width, height) if kind in BOXES else None,
        )
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise PromptError(f"{field}: {error!r} in a region of type {kind}", field=field) from error


def _box(value: dict[str, Any], x: float, y: float, width: int, height: int) -> Box:
    """The box around a rectangle, which may be turned clockwise about its upper left corner."""
    left, top = x * width / 100, y * height / 100
    along, down = _finite(value["width"]) * width / 100, _finite(value["height"]) * height / 100
    angle = math.radians(_finite(value.get("rotation") or 0))
    cos, sin = math.cos(angle), math.sin(angle)
    xs = [left, left + along * cos, left - down * sin, left + along * cos - down * sin]
    ys = [top, top + along * sin, top + down * cos, top + along * sin + down * cos]
    # A rectangle that is turned, or drawn beyond the edge, may reach out of the picture.
    return max(0.0, min(xs)), max(0.0, min(ys)), min(float(width), max(xs)), min(float(height), max(ys))


def _pixels(percent: float, size: int) -> float:
    if -_BEYOND <= percent <= 100 + _BEYOND:
        percent = min(max(percent, 0.0), 100.0)
    return percent * size / 100


def _finite(given: Any) -> float:
    number = float(given)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no place")
    return number


def _name(given: Any) -> str | None:
    return given if isinstance(given, str) and given else None


def _labels(given: Any) -> tuple[str, ...]:
    return tuple(map(str, given)) if isinstance(given, list) else ()


def _labels_apart(result: list[dict[str, Any]]) -> dict[str, tuple[str, ...]]:
    """By region: a Labels tag tells what a Rectangle or KeyPoint shows, in a result of its own with the same id."""
    return {
        str(given.get("id")): _labels(given["value"].get("labels"))
        for given in result
        if given.get("type") == "labels" and isinstance(given.get("value"), dict)
    }
