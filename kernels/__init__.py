"""The mathematics of hypersam: codecs, products with compressed weights, and the file format.

This room imports no other room of the project. It needs torch, safetensors and, for GPUs, triton.
"""

from __future__ import annotations

from kernels.artifact import Artifact, TensorRecord, open_artifact, write
from kernels.codec import BirkhoffConfig, BirkhoffTensor, Encoded, RawTensor
from kernels.errors import ArtifactCorrupt, ArtifactError, ArtifactVersion
from kernels.hyperlinear import HyperLinear

__all__ = [
    "Artifact",
    "ArtifactCorrupt",
    "ArtifactError",
    "ArtifactVersion",
    "BirkhoffConfig",
    "BirkhoffTensor",
    "Encoded",
    "HyperLinear",
    "RawTensor",
    "TensorRecord",
    "open_artifact",
    "write",
]
