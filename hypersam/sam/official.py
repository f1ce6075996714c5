"""The parts of segment-anything's networks that the families share.

They are imported without the package's own ``__init__``, which goes on to its predictor, to torchvision and from there
to PyTorch's compiler: half a second and more of every start. Whoever imports ``segment_anything`` gets the whole
package, as if nothing had been here; its classes are then others than these, of the same code.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def _without_init(name: str) -> Iterator[None]:
    """Let modules of a package be imported while the package itself is an empty one, and forget both in the end."""
    spec = importlib.util.find_spec(name)
    if name in sys.modules or spec is None:
        yield
        return
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        yield
    finally:
        for each in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
            del sys.modules[each]


with _without_init("segment_anything"):
    from segment_anything.modeling.common import LayerNorm2d, MLPBlock
    from segment_anything.modeling.mask_decoder import MLP, MaskDecoder
    from segment_anything.modeling.prompt_encoder import PositionEmbeddingRandom, PromptEncoder
    from segment_anything.modeling.transformer import TwoWayTransformer
    from segment_anything.utils.amg import batched_mask_to_box, build_point_grid, calculate_stability_score

__all__ = [
    "MLP", "LayerNorm2d", "MLPBlock", "MaskDecoder", "PositionEmbeddingRandom", "PromptEncoder", "TwoWayTransformer",
    "batched_mask_to_box", "build_point_grid", "calculate_stability_score",
]  # fmt: skip
