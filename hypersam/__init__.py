"""Segment Anything Models made small, and served from their compressed weights.

>>> import hypersam
>>> report = hypersam.compress("sam_vit_b_01ec64.pth", "sam_vit_b.hsam")
>>> predictor = hypersam.load("sam_vit_b.hsam")
>>> predictor.set_image(image)
>>> masks, scores, logits = predictor.predict(point_coords=points, point_labels=labels)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hypersam.compression import Progress, compress, plan
    from hypersam.errors import HypersamError
    from hypersam.loading import load
    from hypersam.reports import CompressReport, PlanReport
    from hypersam.sam.predictor import SamPredictor

__all__ = ["CompressReport", "HypersamError", "PlanReport", "Progress", "SamPredictor", "compress", "load", "plan"]
__version__ = "0.1.0"

# Imported at first use: the command line answers --help, and the API starts, without waiting for torch.
_HOMES = {
    "CompressReport": "hypersam.reports",
    "HypersamError": "hypersam.errors",
    "PlanReport": "hypersam.reports",
    "Progress": "hypersam.compression",
    "SamPredictor": "hypersam.sam.predictor",
    "compress": "hypersam.compression",
    "load": "hypersam.loading",
    "plan": "hypersam.compression",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hypersam' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
