"""One way of running a model, encoder and decoder apart, in a process of its own: ``families`` tells it when.

``families_worker METHOD VARIANT FOLDER THREADS``. The official ways run under a Python that has their packages.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.turns import clocked, serve
from hypersam.scenes import make_scene

SIDE = 1024
"""Pixels of the picture, the official models' own."""
CLICKS = 5
"""In a turn; the quickest counts."""


def ready(method: str, variant: str, folder: Path) -> tuple[Any, int, str]:
    """A predictor, the bytes of its weights, and whose it is."""
    checkpoint = folder / f"{variant}_random.pth"
    if method == "official fp32":
        from benchmarks.families_official import OFFICIAL, named, predictor

        state = torch.load(checkpoint, mmap=True, weights_only=True)
        return predictor(variant, state), _bytes(state.values()), named(OFFICIAL[variant][0])
    from hypersam.loading import load_model
    from hypersam.sam.predictor import SamPredictor

    _, form, arithmetic = method.split()
    path = checkpoint if form == "dense" else folder / f"{variant}_{form}.hsam"
    kind = torch.bfloat16 if arithmetic == "bf16" else torch.float32
    model = load_model(path, device="cpu", dtype=kind)
    return SamPredictor(model), model.resident_bytes(), "hypersam"


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def main() -> None:
    """Set the picture, say ready, then encode and click in turn."""
    method, variant, folder, threads = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(threads)
    predictor, held, whose = ready(method, variant, folder)
    picture = make_scene(1, size=SIDE).image
    point = {"point_coords": np.array([[300.0, 400.0]]), "point_labels": np.array([1])}
    predictor.set_image(picture)
    _, _, logits = predictor.predict(**point, multimask_output=True)
    name = method.replace(" ", "_")
    np.save(folder / f"{variant}_{name}_embedding.npy", np.asarray(predictor.get_image_embedding().float()))
    np.save(folder / f"{variant}_{name}_logits.npy", np.asarray(logits))

    def turn() -> dict[str, float]:
        wall, cpu = clocked(lambda: predictor.set_image(picture))
        clicks = [clocked(lambda: predictor.predict(**point, multimask_output=True)) for _ in range(CLICKS)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        return {
            "encoder_wall": wall, "encoder_cpu": cpu, "peak_mb": peak,
            "decoder_wall": min(wall for wall, _ in clicks), "decoder_cpu": min(cpu for _, cpu in clicks),
        }  # fmt: skip

    serve({"weights_mb": held / 1e6, "whose": whose}, turn)


if __name__ == "__main__":
    main()
