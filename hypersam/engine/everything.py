"""Masks of everything in a picture: a grid of clicks, two filters, and one mask for each thing found.

The procedure is that of SAM's automatic mask generation (Kirillov et al. 2023, appendix B) on the whole picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hypersam.engine.decoding import PIXELS_AT_ONCE, Decoded
from hypersam.engine.prompts import Prompt
from hypersam.images import from_rle, to_rle
from hypersam.sam.model import Embedding, SamModel
from hypersam.sam.official import batched_mask_to_box, build_point_grid, calculate_stability_score

_THRESHOLD = 0.0
"""Where every family parts inside from outside."""


@dataclass(frozen=True)
class Grid:
    """What to look for, with the names and defaults of segment-anything's SamAutomaticMaskGenerator.

    A mask stays if its predicted IoU is above ``pred_iou_thresh`` and its stability score (the IoU of the masks that
    the logits give ``stability_score_offset`` above and below the threshold) at least ``stability_score_thresh``. Of
    two whose boxes' IoU is above ``box_nms_thresh`` the better stays.
    """

    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7

    def points(self, width: int, height: int) -> NDArray[np.float64]:
        """The grid's points (n², 2) in pixels (x, y), each in the middle of its cell."""
        unit: NDArray[np.float64] = build_point_grid(self.points_per_side)
        scaled: NDArray[np.float64] = unit * np.array([[width, height]])
        return scaled


@dataclass(frozen=True)
class Found:
    """A mask that passed the filters: COCO's compressed RLE, its box (x, y, w, h), area, scores and the click."""

    rle: dict[str, Any]
    bbox: tuple[int, int, int, int]
    area: int
    score: float
    stability: float
    point: tuple[float, float]

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The mask (H, W)."""
        return from_rle(self.rle)


@dataclass(frozen=True)
class Everything:
    """Masks of a picture, the best first. ``timings`` and ``lookup``: see Segmentation."""

    image_id: str
    width: int
    height: int
    masks: tuple[Found, ...]
    timings: dict[str, float]
    lookup: str

    @property
    def cached(self) -> bool:
        """Whether the embedding was at hand."""
        return self.lookup == "hit"


@dataclass(frozen=True)
class Candidates:
    """Masks of a grid's points: low-resolution logits (M, s, s), predicted IoU (M,), and whose each is (M,)."""

    low_res: Tensor
    scores: Tensor
    owners: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.scores)

    def parts(self, pixels: int) -> Iterator[Candidates]:
        """Parts whose full-size masks have PIXELS_AT_ONCE together, for a picture of so many; of one at least."""
        each = max(1, PIXELS_AT_ONCE // pixels)
        for start in range(0, len(self), each):
            part = slice(start, start + each)
            yield Candidates(self.low_res[part], self.scores[part], self.owners[part])

    def cpu(self) -> Candidates:
        """The same on the CPU."""
        return Candidates(self.low_res.cpu(), self.scores.cpu(), self.owners)


def click(point: NDArray[np.float64]) -> Prompt:
    """One point inside."""
    return Prompt(points=((float(point[0]), float(point[1])),), labels=(1,))


@torch.inference_mode()
def promising(decoded: Sequence[Decoded], grid: Grid) -> Candidates:
    """Those masks of some points that pass the first filter, the decoder's own score, where its tensors are."""
    low_res = torch.cat([masks for masks, _ in decoded])
    scores = torch.cat([values for _, values in decoded])
    owners = np.repeat(np.arange(len(decoded)), [len(values) for _, values in decoded])
    good = torch.nonzero(scores > grid.pred_iou_thresh)[:, 0]
    return Candidates(low_res[good], scores[good], owners[good.cpu().numpy()])


@torch.inference_mode()
def sift(
    model: SamModel, embedding: Embedding, candidates: Candidates, *, points: NDArray[np.float64], grid: Grid
) -> list[Found]:
    """Those that pass the second filter, the stability of the full-size mask, where the decoder's tensors are."""
    logits = model.upscale(candidates.low_res[None], embedding)[0]
    stability = calculate_stability_score(logits, _THRESHOLD, grid.stability_score_offset)
    stable = torch.nonzero(stability >= grid.stability_score_thresh)[:, 0]
    owners = candidates.owners[stable.cpu().numpy()]
    return _found(model.binary(logits[stable]), candidates.scores[stable], stability[stable], points[owners])


def _found(masks: Tensor, scores: Tensor, stability: Tensor, points: NDArray[np.float64]) -> list[Found]:
    if not len(masks):
        return []
    corners = batched_mask_to_box(masks).tolist()
    made = []
    for row, mask in enumerate(masks.cpu().numpy()):
        x0, y0, x1, y1 = corners[row]
        area = int(mask.sum())
        bbox = (x0, y0, x1 - x0 + 1, y1 - y0 + 1) if area else (0, 0, 0, 0)
        point = (float(points[row][0]), float(points[row][1]))
        made.append(Found(to_rle(mask), bbox, area, float(scores[row]), float(stability[row]), point))
    return made


def suppress(found: Sequence[Found], grid: Grid) -> list[Found]:
    """Of masks whose boxes overlap the one with the highest predicted IoU, best first."""
    if not found:
        return []
    from torchvision.ops import nms  # here: it takes a second, which a start would wait for

    # As the original does, corners are the outermost pixels: a box ends where its last pixel begins.
    boxes = torch.tensor([[x, y, x + max(w - 1, 0), y + max(h - 1, 0)] for x, y, w, h in (f.bbox for f in found)])
    kept: list[int] = nms(boxes.float(), torch.tensor([f.score for f in found]), grid.box_nms_thresh).tolist()
    return [found[i] for i in kept]
