"""From tensors to the candidates among which an allocation chooses, and from its plan to a choice for each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from hypersam.allocation import Choice, Cost, Curves, Plan, TensorFacts, curves
from hypersam.cores import usable_cores
from hypersam.encoding import as_fp32, columns_of, offset_of, squares
from hypersam.options import Goal
from hypersam.sam.detect import Detected
from hypersam.sam.family import batch_norms, linear_weights
from kernels import artifact as artifact_format
from kernels.codec import lattice, orbit

_ORBIT_ROW = 96
"""Columns that a layer needs for a scale a row to be worth its bits."""
_ORBITS = (3, 4, 5, 6)
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Roles:
    """What tensors are for: ``layers``, the weights of linear layers, and ``buffers``, which are kept as they are but
    for the ``means`` and ``variances`` of batch norms."""

    layers: frozenset[str]
    buffers: frozenset[str]
    means: frozenset[str] = frozenset()
    variances: frozenset[str] = frozenset()


def roles_of(detected: Detected) -> Roles:
    """The roles of a model's tensors."""
    network = detected.described.on_meta(detected.config)
    norms = [name for name, _ in batch_norms(network)]
    return Roles(
        layers=linear_weights(network),
        buffers=frozenset(name for name, _ in network.named_buffers()),
        means=frozenset(f"{name}.running_mean" for name in norms),
        variances=frozenset(f"{name}.running_var" for name in norms),
    )


def measured_curves(
    tensors: Mapping[str, Tensor],
    roles: Roles,
    goal: Goal,
    sensitivities: Mapping[str, float],
    progress: Callable[[int, int], None],
) -> Curves:
    """Bits and errors of the candidates of every tensor that can be coded, several tensors at a time.

    Tensors that cannot be (buffers, integers, NaN) are left out. ``progress`` is told tensors done and in all.
    """
    kept = roles.buffers - roles.means - roles.variances
    names = [n for n, t in tensors.items() if n not in kept and t.is_floating_point() and t.numel()]

    def one(name: str) -> Curves | None:
        tensor, layer = tensors[name], name in roles.layers
        energy = squares(tensor, torch.zeros_like(tensor))[0]
        if not math.isfinite(energy):
            return None
        halves = tensor.dtype in (torch.float32, torch.float64) and float(tensor.abs().max()) <= _LARGEST_HALF
        discrete = [Choice("raw"), Choice("half")] if halves else [Choice("raw")]
        orbits = goal.codec == "orbit" and layer and tensor.shape[-1] >= _ORBIT_ROW
        if orbits:
            discrete += [Choice("orbit", k=k) for k in _ORBITS]
        offset = offset_of(tensor)
        apart = squares(tensor, torch.full_like(tensor, offset))[1] if offset else energy
        # A variance that a lattice made negative would have no square root.
        lattice_too = not orbits and energy > 0 and name not in roles.variances
        facts = TensorFacts(
            name, tensor.numel(), energy, sensitivities.get(name), tuple(discrete),
            lattice=lattice_too, spread=math.sqrt(apart / tensor.numel()),
        )  # fmt: skip
        return curves([facts], lambda _, choice: _cost(tensor, choice, layer=layer), max_error=goal.max_error)

    found: list[Curves] = []
    with ThreadPoolExecutor(usable_cores(), thread_name_prefix="plan") as pool:
        for number, each in enumerate(pool.map(one, names), 1):
            if each is not None:
                found.append(each)
            progress(number, len(names))
    return Curves.joined(found)


def _cost(tensor: Tensor, choice: Choice, *, layer: bool) -> Cost:
    match choice.encoding:
        case "raw":
            return Cost(8.0 * tensor.nbytes, 0.0)
        case "half":
            part = tensor.flatten()[:: max(1, tensor.numel() >> 18)]
            error = squares(part, part.to(torch.float16))[1] * tensor.numel() / part.numel()
            return Cost(16.0 * tensor.numel(), error)
        case "lattice":
            assert choice.step is not None
            try:
                found = lattice.estimate(
                    tensor, as_fp32(choice.step), columns=columns_of(tuple(tensor.shape)), offset=offset_of(tensor)
                )
            except ValueError:  # a step below what fp32 can say
                return Cost(8.0 * tensor.nbytes, 0.0)
            return Cost(found.bits, found.squared_error)
        case "orbit":
            assert choice.k is not None
            columns = tensor.shape[-1] if layer else columns_of(tuple(tensor.shape))
            guess = orbit.estimate(tensor, choice.k, columns=columns)
            return Cost(guess.bits, guess.squared_error)


def every_choice(tensors: Mapping[str, Tensor], plan: Plan) -> dict[str, Choice]:
    """A choice for every tensor: the plan's, and as it is for those that the plan leaves out."""
    return {name: plan.choices.get(name, Choice("raw")) for name in tensors}


@dataclass(frozen=True)
class _Typical:
    """Stands for a coded tensor whose stream is not there yet; as long a record as one has."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    number: int

    encoding: ClassVar[str] = "lattice"

    def constants(self) -> dict[str, Any]:
        step = float(np.float32(np.random.default_rng(self.number).uniform(1e-3, 1e-2)))
        return {"step": step, "offset": 0.0, "beta": self.number % 7, "columns": columns_of(self.shape)}

    def stream(self) -> Tensor:
        # Of some bytes, so that the checksums differ as real ones do.
        return torch.from_numpy(np.frombuffer(self.number.to_bytes(8, "little"), np.uint8).copy())

    @classmethod
    def parse(cls, shape: tuple[int, ...], dtype: torch.dtype, constants: Mapping[str, Any], stream: Tensor) -> Self:
        raise ValueError("nothing is stored in this form")


_OFFSET_DIGITS = 14
"""More digits that a real stream's place in the file has, than a typical one's of eight bytes."""


def predicted_prefix(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> int:
    """Bytes that the artifact of these tensors will have before its first stream, about."""
    typical = {name: _Typical(tuple(t.shape), t.dtype, i) for i, (name, t) in enumerate(tensors.items())}
    figures = [float(f"{20 + math.sin(i):.4g}") for i in range(len(tensors))]
    report = {"sqnr_db": 30.0, "tensor_sqnr_db": figures, "tensor_sensitivity": [v * 1.01 for v in figures]}
    return artifact_format.prefix_bytes(typical, **header, report=report) + _OFFSET_DIGITS * len(tensors)
