"""Mean IoU on generated scenes: of a model against the true masks, and of two models against each other.

The scenes are those of ``hypersam.scenes``'s held-out split, which no training run has seen. Every labelled
object is asked for twice: with one click (its deepest pixel) and with its exact box. The answer is the mask
with the highest predicted IoU of the three, as SAM's own evaluation takes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hypersam.engine import Prompt, predict
from hypersam.sam.model import SamModel
from hypersam.scenes import Scene, SceneObject, make_scene

KINDS = ("point", "box")


@dataclass(frozen=True)
class Score:
    """Mean IoU over the objects asked for, with the half width of its 95 % interval."""

    mean: float
    margin: float
    objects: int


@dataclass(frozen=True)
class Evaluation:
    """Scores by kind of prompt (``point``, ``box``): of the model, by sort of object (``partly_hidden``,
    ``low_contrast``, ``thin``, ``twin``, ``small`` under 2 % of the picture), and, where another model was
    given, that one's scores, the paired difference (model minus other) and the IoU between the two masks."""

    scenes: int
    objects: int
    first_scene: int
    size: int
    miou: dict[str, Score]
    by_sort: dict[str, dict[str, Score]]
    against: dict[str, Score] | None
    difference: dict[str, Score] | None
    agreement: dict[str, Score] | None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def iou(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks; 1 for two empty ones."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def deepest_pixel(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """(x, y) of the pixel farthest from everything outside the mask, the first in reading order of equals.

    Peels the mask layer by layer with square and diamond neighbourhoods in turn, an octagonal distance.
    """
    current = np.pad(mask, 1)
    diamond = True
    while True:
        p = current
        inner = p[1:-1, 1:-1] & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:]
        if not diamond:
            inner &= p[:-2, :-2] & p[:-2, 2:] & p[2:, :-2] & p[2:, 2:]
        if not inner.any():
            break
        current = np.pad(inner, 1)
        diamond = not diamond
    y, x = np.argwhere(current[1:-1, 1:-1])[0]
    return int(x), int(y)


def prompts_for(thing: SceneObject) -> dict[str, Prompt]:
    """The click and the box that ask for an object; a click aims at the middle of its pixel."""
    x, y = deepest_pixel(thing.mask)
    x0, y0, x1, y1 = thing.box
    return {
        "point": Prompt(points=((x + 0.5, y + 0.5),), labels=(1,)),
        "box": Prompt(box=(float(x0), float(y0), float(x1), float(y1))),
    }


def best_masks(model: SamModel, scene: Scene) -> dict[str, list[NDArray[np.bool_]]]:
    """For every kind of prompt and every object of a scene the model's mask of highest predicted IoU."""
    embedding = model.embed(scene.image)
    asked = [prompts_for(thing) for thing in scene.objects]
    best = {}
    for kind in KINDS:
        first: dict[int, NDArray[np.bool_]] = {}
        for mask in predict(model, embedding, [prompts[kind] for prompts in asked], multimask=True):
            first.setdefault(mask.prompt, mask.mask)
        best[kind] = [first[i] for i in range(len(asked))]
    return best


def evaluate(
    model: SamModel,
    *,
    objects: int = 1000,
    first_scene: int = 0,
    size: int = 256,
    against: SamModel | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Ask a model for at least ``objects`` objects of scenes ``first_scene`` and on, each by click and by box."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    other: dict[str, list[float]] = {kind: [] for kind in KINDS}
    between: dict[str, list[float]] = {kind: [] for kind in KINDS}
    sorts: dict[str, list[bool]] = {s: [] for s in ("partly_hidden", "low_contrast", "thin", "twin", "small")}
    asked = number = 0
    while asked < objects:
        scene = make_scene(first_scene + number, size=size)
        number += 1
        if not scene.objects:
            continue
        asked += len(scene.objects)
        masks = best_masks(model, scene)
        theirs = best_masks(against, scene) if against is not None else None
        for kind in KINDS:
            found[kind] += [iou(m, t.mask) for m, t in zip(masks[kind], scene.objects, strict=True)]
            if theirs is not None:
                other[kind] += [iou(m, t.mask) for m, t in zip(theirs[kind], scene.objects, strict=True)]
                between[kind] += [iou(m, t) for m, t in zip(masks[kind], theirs[kind], strict=True)]
        for thing in scene.objects:
            for name in ("partly_hidden", "low_contrast", "thin", "twin"):
                sorts[name].append(bool(getattr(thing, name)))
            sorts["small"].append(thing.area < 0.02)
        if progress:
            progress(asked)
    by_sort = {
        name: {k: score([v for v, flag in zip(found[k], flags, strict=True) if flag]) for k in KINDS}
        for name, flags in sorts.items()
        if any(flags)
    }
    paired = {k: [a - b for a, b in zip(found[k], other[k], strict=True)] for k in KINDS} if against else None
    return Evaluation(
        scenes=number,
        objects=asked,
        first_scene=first_scene,
        size=size,
        miou={k: score(v) for k, v in found.items()},
        by_sort=by_sort,
        against={k: score(v) for k, v in other.items()} if against else None,
        difference={k: score(v) for k, v in paired.items()} if paired else None,
        agreement={k: score(v) for k, v in between.items()} if against else None,
    )


def score(values: list[float]) -> Score:
    """Mean and half width of the 95 % interval."""
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Score(float(np.mean(values)), 1.96 * spread / math.sqrt(len(values)), len(values))
