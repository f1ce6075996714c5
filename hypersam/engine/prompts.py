"""What is asked of a picture and what is answered: prompts, their checks, masks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hypersam.errors import PromptError, UnsupportedPrompt
from hypersam.sam.model import SamModel


@dataclass(frozen=True)
class ModelFile:
    """A compressed model on disk: the name it was given, its artifact, and that file's SHA-256."""

    id: str
    path: Path
    digest: str


@dataclass(frozen=True)
class Prompt:
    """One thing to find, in pixels (x, y) of the picture as sent.

    ``labels`` has a 1 (inside) or 0 (outside) a point; ``box`` is x0, y0, x1, y1; ``mask_input`` is (s, s)
    logits of an earlier answer. At least one of points, box and mask input is there.
    """

    points: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box: tuple[float, float, float, float] | None = None
    mask_input: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Mask:
    """One answer: the prompt's index, the predicted IoU, (x, y, w, h), area in pixels, the mask (H, W), and the
    low-resolution logits (s, s) that it was made of, which the next prompt may take as its mask input."""

    prompt: int
    score: float
    bbox: tuple[int, int, int, int]
    area: int
    mask: NDArray[np.bool_]
    logits: NDArray[np.float32]


@dataclass(frozen=True)
class Segmentation:
    """Masks of a picture, best first within a prompt. ``timings`` are milliseconds by stage.

    ``cached`` tells whether the embedding was at hand; ``lookup`` says it in full: ``hit``, ``joined`` (another
    request was making it) or ``miss``.
    """

    image_id: str
    width: int
    height: int
    masks: tuple[Mask, ...]
    timings: dict[str, float]
    lookup: str

    @property
    def cached(self) -> bool:
        """Whether the embedding was at hand."""
        return self.lookup == "hit"


def image_id_of(image: NDArray[np.uint8]) -> str:
    """A picture's id: SHA-256 of its size and pixels, so that the same picture has the same id in any format."""
    digest = hashlib.sha256(f"{image.shape[0]}x{image.shape[1]}:".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()[:32]


def check_prompts(prompts: Sequence[Prompt], width: int, height: int) -> None:
    """Raise PromptError, saying which prompt and field and why, unless every prompt fits a picture of that size."""
    if not prompts:
        raise PromptError("at least one prompt is needed: points with labels, a box, or both", field="prompts")
    for number, prompt in enumerate(prompts):
        where = f"prompt {number}: " if len(prompts) > 1 else ""
        field = f"prompts.{number}"
        if not prompt.points and prompt.box is None and prompt.mask_input is None:
            raise PromptError(f"{where}give points with labels, a box, or both", field=field)
        if len(prompt.points) != len(prompt.labels):
            raise PromptError(
                f"{where}{len(prompt.points)} points need as many labels, got {len(prompt.labels)}",
                field=f"{field}.point_labels",
            )
        for label in prompt.labels:
            if label not in (0, 1):
                raise PromptError(
                    f"{where}a label is 1 (inside) or 0 (outside), not {label}", field=f"{field}.point_labels"
                )
        for x, y in prompt.points:
            # NaN fails every comparison and so is refused as well.
            if not (0 <= x <= width and 0 <= y <= height):
                raise PromptError(
                    f"{where}point ({x:g}, {y:g}) is outside the picture of {width} x {height} pixels",
                    field=f"{field}.points",
                )
        if prompt.box is not None:
            x0, y0, x1, y1 = prompt.box
            if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
                box = ", ".join(f"{v:g}" for v in prompt.box)
                raise PromptError(
                    f"{where}box [{box}] must be [x0, y0, x1, y1] with x0 < x1 and y0 < y1 "
                    f"inside the picture of {width} x {height} pixels",
                    field=f"{field}.box",
                )


def check_suits(prompts: Sequence[Prompt], model: SamModel) -> None:
    """Raise UnsupportedPrompt for what the model's family cannot be asked, and PromptError unless every mask input has
    the size of the model's low-resolution masks."""
    side = model.low_res
    for number, prompt in enumerate(prompts):
        if refused := model.family.refusal(
            points=len(prompt.points), background=0 in prompt.labels, box=prompt.box is not None,
            mask=prompt.mask_input is not None,
        ):  # fmt: skip
            field, why = refused
            where = f"prompt {number}: " if len(prompts) > 1 else ""
            raise UnsupportedPrompt(where + why, field=f"prompts.{number}.{field}")
        if prompt.mask_input is not None and prompt.mask_input.shape != (side, side):
            raise PromptError(
                f"a mask input for this model is {side} x {side} logits, got {prompt.mask_input.shape}",
                field=f"prompts.{number}.mask_input",
            )


def bounding_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """(x, y, w, h) of the set pixels; all zeros for an empty mask."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(ys):
        return 0, 0, 0, 0
    return int(xs[0]), int(ys[0]), int(xs[-1] - xs[0]) + 1, int(ys[-1] - ys[0]) + 1
