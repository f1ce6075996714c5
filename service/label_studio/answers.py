"""Masks as Label Studio's results: brushes, or polygons in per cent of the picture."""

from __future__ import annotations

import uuid
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hypersam.engine import Mask
from hypersam.images import to_polygons
from service.label_studio.brush_rle import pack
from service.label_studio.config import Config, Control
from service.label_studio.regions import Region

_TOLERANCE = 1.0  # pixels by which a polygon may differ from the mask's outline
_MOST_POINTS = 4000  # of an outline, before it is simplified, which takes up to their square in time
_SPECK = 0.05  # of the largest polygon's area: what is smaller is noise, and a polygon each to delete


def results_of(mask: Mask, region: Region, config: Config, control: Control, image: str) -> list[dict[str, Any]]:
    """The results for a mask (H, W): one brush, or a polygon for each part of it; none for a mask without pixels to
    a polygon. A control without labels is followed by a result of the Labels tag, if the configuration has one."""
    height, width = mask.mask.shape
    companion = config.companion(control, image)
    results = []
    for shape in _shapes(mask.mask, control):
        common = {
            "id": uuid.uuid4().hex[:10], "to_name": image, "original_width": width, "original_height": height,
            "image_rotation": region.turned, "score": float(mask.score), "readonly": False,
        }  # fmt: skip
        if region.item is not None:
            common["item_index"] = region.item
        for tag in (control, companion):
            if tag is None or (tag is companion and not region.labels):
                continue
            value = dict(shape)
            if tag.kind.endswith("labels"):
                value[tag.kind] = [config.label_in(tag, region.drawn_by, label) for label in region.labels]
            results.append({**common, "from_name": tag.name, "type": tag.kind, "value": value})
    return results


def _shapes(mask: NDArray[np.bool_], control: Control) -> list[dict[str, Any]]:
    if control.kind.startswith("brush"):
        return [{"format": "rle", "rle": pack(mask)}]
    return [{"points": points, "closed": True} for points in polygons_of(mask)]


def polygons_of(mask: NDArray[np.bool_]) -> list[list[list[float]]]:
    """The outlines of a mask's parts, the largest first, as points [x, y] in per cent of the picture.

    Label Studio's polygons have no holes and must be edited by hand: holes are filled, specks left out, and points
    dropped where the line between their neighbours is within a pixel of what they mark.
    """
    size = np.array([mask.shape[1], mask.shape[0]])
    rings = [np.array(polygon[0]) for polygon in to_polygons(mask)]
    areas = [_area(ring) for ring in rings]
    order = sorted(range(len(rings)), key=areas.__getitem__, reverse=True)
    kept = [_simple(rings[n]) for n in order if areas[n] >= _SPECK * areas[order[0]]]
    return [np.round(100 * ring / size, 4).tolist() for ring in kept]


def _area(ring: NDArray[np.float64]) -> float:
    x, y = ring.T
    return float(abs(x[:-1] @ y[1:] - x[1:] @ y[:-1])) / 2


def _simple(ring: NDArray[np.float64]) -> NDArray[np.float64]:
    """A closed ring (n, 2) by fewer points, the first not repeated at the end: Douglas and Peucker's way."""
    # Evenly thinned, and closed again. The first and the last point are the same.
    ring = np.concatenate([ring[: -1 : 1 + len(ring) // _MOST_POINTS], ring[:1]])
    far = int(np.argmax(((ring - ring[0]) ** 2).sum(1)))
    kept = np.zeros(len(ring), bool)
    kept[[0, far]] = True
    parts = [(0, far), (far, len(ring) - 1)]
    while parts:
        start, end = parts.pop()
        if end - start < 2:
            continue
        line = ring[end] - ring[start]
        offsets = ring[start + 1 : end] - ring[start]
        along = np.clip(offsets @ line / max(line @ line, 1e-9), 0, 1)
        away = np.hypot(*(offsets - along[:, None] * line).T)
        worst = int(np.argmax(away))
        if away[worst] > _TOLERANCE:
            middle = start + 1 + worst
            kept[middle] = True
            parts += [(start, middle), (middle, end)]
    # A part as thin as the tolerance would be a line, which is no polygon.
    return ring[kept] if kept.sum() > 2 else ring[:-1]
