"""Linear layers that multiply with compressed weights."""

from __future__ import annotations

from kernels.hyperlinear.module import HyperLinear
from kernels.hyperlinear.op import birkhoff_linear

__all__ = ["HyperLinear", "birkhoff_linear"]
