"""Linear layers that multiply with compressed weights."""

from __future__ import annotations

from kernels.codec import BirkhoffTensor, LatticeTensor, OrbitTensor
from kernels.hyperlinear.conv import HyperConv2d
from kernels.hyperlinear.module import HyperLinear, allow_int8
from kernels.hyperlinear.op import birkhoff_linear, lattice_linear, orbit_linear

RESIDENT = (BirkhoffTensor, LatticeTensor, OrbitTensor)
"""The coded tensors that a HyperLinear can keep as they are."""

__all__ = ["RESIDENT", "HyperConv2d", "HyperLinear", "allow_int8", "birkhoff_linear", "lattice_linear", "orbit_linear"]
