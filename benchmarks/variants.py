"""Every variant of the registry through every codec and preset: size, time, and what is left of its answers.

Weights are random (``benchmarks/random_sam.py``): sizes and speeds are those of real checkpoints, while cosine and
IoU tell only that nothing is broken, and compare codings of the same variant. The pictures are those that the project
carries; each object is asked for by click and by box, and the mask that the model itself scores highest is
compared with the uncompressed model's. Networks see them at the side at which a pass is cheap on a CPU, about that of
the pictures themselves (``side``): at its own 1024 pixels a ViT-H takes 20 s a picture.

Where bits matter is measured once a variant, on one generated picture (``measuring_s``), and used for every preset.
``compress`` by itself measures on 8, or 4 over 100 million parameters, and so takes a goal's ``seconds`` and as many
times ``measuring_s``. Variants of one layout, whose files would be the same here, are measured once.
"""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks import random_sam
from benchmarks.record import RESULTS, append, machine
from hypersam.codecs import CODECS, PRESETS
from hypersam.compression import compress
from hypersam.engine import Prompt, predict
from hypersam.evaluate import iou
from hypersam.loading import load_model
from hypersam.sam.model import SamModel
from hypersam.sam.registry import VARIANTS
from hypersam.sensitivity import measure

PICTURES = Path(__file__).parent.parent / "hypersam" / "assets" / "scenes"
GOALS = tuple((codec, preset) for codec in CODECS for preset in (PRESETS if codec != "birkhoff" else (None,)))
"""``birkhoff`` knows no presets."""
SLOW = (("orbit", "4x"), ("orbit", "5x"))
"""Trellises of 5 and 6 bits, whose search is the slowest of all, at sizes where ``lattice`` is the more exact: left out
of networks of over ``LARGE`` parameters unless they are asked for by name."""
LARGE = 150_000_000
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


def run(
    names: Sequence[str], goals: Sequence[str], pictures: int, folder: Path, *, again: bool = False
) -> Iterator[dict[str, Any]]:
    """A row a variant, each written as soon as it is measured.

    ``names``: variants, none for all. ``goals``: as ``goal_name`` has them, none for all but ``SLOW`` ones; what was
    not asked for is left empty. What has been measured at this commit already is passed over, unless ``again``, so that
    a run that was broken off goes on. Raises KeyError for a variant that has no random weights.
    """
    if unknown := sorted(set(goals) - {goal_name(*goal) for goal in GOALS}):
        raise KeyError(f"unknown goals: {', '.join(unknown)}")
    asked = _asked(pictures)
    here = machine()["commit"]
    known = {} if again or here.endswith("+") else {row["variant"]: row for row in rows(here)}
    made: dict[tuple[str, ...], dict[str, Any]] = {}
    for name in names or [row.id for row in VARIANTS]:
        layout = random_sam.LAYOUT_OF[name]
        held = known.get(name, {})
        wanted = tuple(goal for goal in goals or _usual(layout) if not held.get(f"{goal}_mb"))
        if not wanted:
            continue
        if (layout, *wanted) not in made:
            made[layout, *wanted] = _measured(name, wanted, asked, folder)
        row = {**made[layout, *wanted], "variant": name}
        append("variants", row)
        yield row


def _usual(layout: str) -> list[str]:
    large = sum(tensor.numel() for tensor in random_sam.layout(layout).values()) > LARGE
    return [goal_name(*goal) for goal in GOALS if not (large and goal in SLOW)]


def goal_name(codec: str, preset: str | None) -> str:
    """What its columns begin with."""
    return f"{codec}_{preset}" if preset else codec


def rows(commit: str | None = None) -> list[dict[str, str]]:
    """What was measured of every variant last, goal by goal, in the registry's order; of one commit, or of any."""
    path = RESULTS / "variants.csv"
    found: dict[str, dict[str, str]] = {}
    if path.exists():
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if commit in (None, row["commit"]):
                    earlier = found.get(row["variant"], {})
                    found[row["variant"]] = {name: value or earlier.get(name, "") for name, value in row.items()}
    return [found[row.id] for row in VARIANTS if row.id in found]


def table(figures: Sequence[str]) -> Iterator[str]:
    """Lines of Markdown, a table a figure, from what was measured last."""
    measured = rows()
    if not measured:
        yield "nothing is measured yet: python -m benchmarks variants"
        return
    names = [goal_name(*goal) for goal in GOALS if any(row[f"{goal_name(*goal)}_mb"] for row in measured)]
    for figure in figures:
        yield f"{_TITLES[figure]}:"
        yield ""
        yield "| | M parameters | file, MB | " + " | ".join(f"`{name.replace('_', ' ')}`" for name in names) + " |"
        yield "|---|--:|--:|" + "--:|" * len(names)
        for row in measured:
            cells = [_cell(row[f"{name}_{figure}"], figure) for name in names]
            sizes = f"{float(row['parameters']) / 1e6:.2f} | {float(row['file_mb']):.1f}"
            yield f"| `{row['variant']}` | {sizes} | " + " | ".join(cells) + " |"
        yield ""


_TITLES = {
    "mb": "Artifact, MB", "ratio": "Times smaller than fp32", "bits": "Bits a weight, everything counted",
    "sqnr_db": "SQNR, dB", "seconds": "Seconds to compress, without measuring where bits matter",
    "cosine": "Cosine of the embedding with the original's", "mask_iou": "IoU of the masks with the original's, %",
}  # fmt: skip
_DIGITS = {"mb": 2, "ratio": 2, "bits": 2, "sqnr_db": 1, "seconds": 1, "cosine": 4, "mask_iou": 1}


def _cell(value: str, figure: str) -> str:
    return f"{float(value) * (100 if figure == 'mask_iou' else 1):.{_DIGITS[figure]}f}" if value else "–"


def _measured(name: str, goals: Sequence[str], asked: Sequence[_Asked], folder: Path) -> dict[str, Any]:
    source = random_sam.write(name, folder / f"{name}_random.pth")
    model = load_model(source, device="cpu")
    side = model.network.affordable_side()
    truth = _answers(model, side, asked)
    parameters = sum(tensor.numel() for tensor in random_sam.layout(random_sam.LAYOUT_OF[name]).values())
    began = time.perf_counter()
    moves = measure(model, pictures=1) if any(goal != "birkhoff" for goal in goals) else {}
    measuring = time.perf_counter() - began
    del model
    row: dict[str, Any] = {
        "variant": name, "parameters": parameters, "file_mb": source.stat().st_size / 1e6, "pictures": len(asked),
        "prompts": sum(len(each.prompts) for each in asked), "side": side, "measuring_s": measuring,
    }  # fmt: skip
    for codec, preset in GOALS:
        goal = goal_name(codec, preset)
        figures: dict[str, Any] = dict.fromkeys(FIGURES)
        if goal in goals:
            target = folder / f"{name}_{goal}.hsam"
            options = {"fidelity": False} | ({"preset": preset} if preset else {})
            report = compress(
                source, target, codec=codec, variant=name, options=options, device="cpu", sensitivities=moves
            )
            found = _answers(load_model(target, device="cpu"), side, asked)
            target.unlink()
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


def _answers(model: SamModel, side: int, asked: Sequence[_Asked]) -> _Answers:
    small = SamModel(model.network.reduced(side), variant=model.variant, device=model.device, dtype=model.dtype)
    answers = _Answers([], [])
    for each in asked:
        embedding = small.embed(each.image)
        answers.embeddings.append(embedding.features.flatten())
        best: dict[int, NDArray[np.bool_]] = {}
        for mask in predict(small, embedding, each.prompts, multimask=True):
            best.setdefault(mask.prompt, mask.mask)
        answers.masks.extend(best[number] for number in range(len(each.prompts)))
    return answers


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
