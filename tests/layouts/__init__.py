"""Keys, shapes and dtypes of the official checkpoints: ``NAME.json.gz`` has key to [dtype, *shape]."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
from torch import Tensor


def layout(name: str) -> dict[str, Tensor]:
    """Tensors on the meta device as the official checkpoint has them."""
    rows = json.loads(gzip.decompress((Path(__file__).parent / f"{name}.json.gz").read_bytes()))
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for key, (dtype, *shape) in rows.items()
    }
