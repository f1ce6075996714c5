"""Every variant of the registry through every codec and preset: size, time, and what is left of its answers.

Weights are random (``benchmarks/random_sam.py``): sizes and speeds are those of real checkpoints, while cosine and
IoU tell only that nothing is broken, and compare codings of the same variant. The pictures are those that the project
carries; each object is asked for by click and by box, and the mask that the model itself scores highest is
compared with the uncompressed model's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks import random_sam
from benchmarks.record import append
from hypersam.codecs import CODECS, PRESETS
from hypersam.compression import compress
from hypersam.engine import Prompt, predict
from hypersam.evaluate import iou
from hypersam.loading import load_model
from hypersam.sam.model import SamModel
from hypersam.sam.registry import VARIANTS

PICTURES = Path(__file__).parent.parent / "hypersam" / "assets" / "scenes"
GOALS = tuple((codec, preset) for codec in CODECS for preset in (PRESETS if codec != "birkhoff" else (None,)))
"""``birkhoff`` knows no presets."""
FIGURES = ("mb", "ratio", "bits", "sqnr_db", "seconds", "cosine", "mask_iou")
"""Of every goal; a column is GOAL_FIGURE."""


@dataclass(frozen=True)
class _Asked:
    image: NDArray[np.uint8]
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class _Answers:
    embeddings: list[torch.Tensor]
    masks: list[NDArray[np.bool_]]


def run(names: Sequence[str], goals: Sequence[str], pictures: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row a variant, each written as soon as it is measured.

    ``names``: variants, none for all. ``goals``: as ``goal_name`` has them, none for all; what was not asked for is
    left empty. Raises KeyError for a variant that has no random weights.
    """
    if unknown := sorted(set(goals) - {goal_name(*goal) for goal in GOALS}):
        raise KeyError(f"unknown goals: {', '.join(unknown)}")
    asked = _asked(pictures)
    for name in names or [row.id for row in VARIANTS]:
        row = _measured(name, goals, asked, folder)
        append("variants", row)
        yield row


def goal_name(codec: str, preset: str | None) -> str:
    """What its columns begin with."""
    return f"{codec}_{preset}" if preset else codec


def _measured(name: str, goals: Sequence[str], asked: Sequence[_Asked], folder: Path) -> dict[str, Any]:
    source = random_sam.write(name, folder / f"{name}_random.pth")
    row: dict[str, Any] = {"variant": name, "parameters": None, "file_mb": source.stat().st_size / 1e6,
                           "pictures": len(asked), "prompts": sum(len(each.prompts) for each in asked)}  # fmt: skip
    truth = _answers(load_model(source, device="cpu"), asked)
    for codec, preset in GOALS:
        goal = goal_name(codec, preset)
        figures: dict[str, Any] = dict.fromkeys(FIGURES)
        if not goals or goal in goals:
            target = folder / f"{name}_{goal}.hsam"
            options = {"fidelity": False} | ({"preset": preset} if preset else {})
            report = compress(source, target, codec=codec, variant=name, options=options, device="cpu")
            found = _answers(load_model(target, device="cpu"), asked)
            target.unlink()
            row["parameters"] = report.parameters
            figures |= {
                "mb": report.artifact_bytes / 1e6, "ratio": report.fp32_ratio, "bits": report.bits_per_weight,
                "sqnr_db": report.sqnr_db, "seconds": report.seconds,
                "cosine": float(np.mean(list(map(_cosine, found.embeddings, truth.embeddings)))),
                "mask_iou": float(np.mean(list(map(iou, found.masks, truth.masks)))),
            }  # fmt: skip
        row |= {f"{goal}_{figure}": value for figure, value in figures.items()}
    return row


def _asked(count: int) -> list[_Asked]:
    """The first ``count`` carried pictures with a click and a box for each of their objects."""
    found = []
    for path in sorted(PICTURES.glob("scene_?.png"))[:count]:
        prompts = []
        for thing in json.loads(path.with_suffix(".json").read_text())["objects"]:
            x, y = thing["point"]
            x0, y0, x1, y1 = thing["box"]
            prompts += [Prompt(points=((x, y),), labels=(1,)), Prompt(box=(x0, y0, x1, y1))]
        found.append(_Asked(np.asarray(Image.open(path).convert("RGB")), tuple(prompts)))
    return found


def _answers(model: SamModel, asked: Sequence[_Asked]) -> _Answers:
    answers = _Answers([], [])
    for each in asked:
        embedding = model.embed(each.image)
        answers.embeddings.append(embedding.features.flatten())
        best: dict[int, NDArray[np.bool_]] = {}
        for mask in predict(model, embedding, each.prompts, multimask=True):
            best.setdefault(mask.prompt, mask.mask)
        answers.masks.extend(best[number] for number in range(len(each.prompts)))
    return answers


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
