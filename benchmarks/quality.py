"""What compression does to the masks of the small SAM: every preset, the published codec, and other projects' weights.

The models answer for the same generated objects, by click and by box; each is compared with the original object by
object. Scenes are those of ``hypersam eval``.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file

from benchmarks.codecs import WORKER, matrices
from benchmarks.record import append
from hypersam.allocation import POLICIES
from hypersam.compression import compress
from hypersam.evaluate import KINDS, best_masks, iou, score
from hypersam.loading import load_model
from hypersam.sam.model import SamModel
from hypersam.scenes import make_scene

Goals = Mapping[str, tuple[str, dict[str, Any]]]
GOALS: Goals = {
    "birkhoff": ("birkhoff", {}),
    "4x": ("lattice", {"preset": "4x"}),
    "5x": ("lattice", {"preset": "5x"}),
    "6.5x": ("lattice", {"preset": "6.5x"}),
    "8x lattice": ("lattice", {"preset": "8x"}),
    "8x orbit": ("orbit", {"preset": "8x"}),
    "10x": ("lattice", {"target_ratio": 10}),
}
ALLOCATIONS: Goals = {
    f"{ratio}x {policy}": ("lattice", {"target_ratio": ratio, "policy": policy})
    for ratio in (8, 10) for policy in POLICIES
}  # fmt: skip
"""The same size by every policy that deals out the bits."""


def run(
    checkpoint: Path, objects: int, peers: Path | None = None, *, goals: Goals = GOALS, table: str = "quality"
) -> Iterator[dict[str, Any]]:
    """A row a model: its size, mIoU lost in points with the 95 % bound, and the masks' IoU with the original's.
    ``table``: the results' name."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models: dict[str, SamModel] = {}
        facts: dict[str, dict[str, Any]] = {}
        for label, (codec, options) in goals.items():
            target = folder / "model.hsam"
            report = compress(checkpoint, target, codec=codec, options={**options, "fidelity": False})
            models[label] = load_model(target)
            facts[label] = {"fp32_ratio": report.fp32_ratio, "bits_per_weight": report.bits_per_weight,
                            "sqnr_db": report.sqnr_db, "seconds": report.seconds}  # fmt: skip
        if peers is not None:
            for label, model, fact in _others(checkpoint, peers, folder):
                models[label], facts[label] = model, fact
        for row in _asked(checkpoint, models, facts, objects):
            append(table, row)
            yield row


def _others(checkpoint: Path, python: Path, folder: Path) -> Iterator[tuple[str, SamModel, dict[str, Any]]]:
    """Models with the matrices as other projects give them back, and everything else in fp32."""
    state = torch.load(checkpoint, weights_only=True)
    weights = matrices(checkpoint)
    save_file({k: w.contiguous() for k, w in weights.items()}, folder / "weights.safetensors")
    command = [str(python), "-W", "ignore", str(WORKER), str(folder / "weights.safetensors"), str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    total = sum(t.numel() for t in state.values())
    coded = sum(w.numel() for w in weights.values())
    for line in map(json.loads, done.stdout.splitlines()):
        if "failed" in line:
            print(f"{line['method']}: left out, {line['failed']}", file=sys.stderr)
            continue
        dense = load_file(folder / f"{line['method']}.safetensors")
        torch.save({**state, **dense}, folder / "peer.pth")
        bits = line["bits_per_weight"]
        size = bits * coded + 32 * (total - coded)
        yield line["method"], load_model(folder / "peer.pth"), {
            "fp32_ratio": 32 * total / size, "bits_per_weight": bits, "sqnr_db": None, "seconds": line["seconds"],
        }  # fmt: skip


def _asked(
    checkpoint: Path, models: Mapping[str, SamModel], facts: Mapping[str, Mapping[str, Any]], objects: int
) -> Iterator[dict[str, Any]]:
    original = load_model(checkpoint)
    lost: dict[tuple[str, str], list[float]] = {(m, k): [] for m in models for k in KINDS}
    agree: dict[tuple[str, str], list[float]] = {(m, k): [] for m in models for k in KINDS}
    truth: dict[str, list[float]] = {k: [] for k in KINDS}
    number = asked = 0
    steps = track(range(objects), description="objects")
    shown = iter(steps)
    while asked < objects:
        scene = make_scene(number)
        number += 1
        if not scene.objects:
            continue
        reference = best_masks(original, scene)
        exact = {k: [iou(m, t.mask) for m, t in zip(reference[k], scene.objects, strict=True)] for k in KINDS}
        for kind in KINDS:
            truth[kind] += exact[kind]
        for label, model in models.items():
            masks = best_masks(model, scene)
            for kind in KINDS:
                lost[label, kind] += [
                    100 * (e - iou(m, t.mask)) for e, m, t in zip(exact[kind], masks[kind], scene.objects, strict=True)
                ]
                agree[label, kind] += [iou(m, r) for m, r in zip(masks[kind], reference[kind], strict=True)]
        for _ in scene.objects:
            next(shown, None)
        asked += len(scene.objects)
    for label in models:
        row: dict[str, Any] = {"model": checkpoint.stem, "method": label, "objects": asked, **facts[label]}
        for kind in KINDS:
            difference, agreement = score(lost[label, kind]), score(agree[label, kind])
            row |= {
                f"{kind}_miou_original": score(truth[kind]).mean,
                f"{kind}_lost_points": difference.mean,
                f"{kind}_lost_upper95": difference.mean + difference.margin,
                f"{kind}_agreement": agreement.mean,
            }
        yield row
