"""Where should the bits go? Masks' agreement with the original's for several policies at the same size.

Tensors are rounded to lattices and priced at the ideal code length of the ``lattice`` codec's own model (rows of
classes of generalised Gaussians), with no stream made: it takes minutes and tells policies apart by what they
do to the masks. The policies of equality know nothing of biases and norms, so for them vectors are kept in half
precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import append
from hypersam.allocation import POLICIES, Choice, Cost, Curves, Plan, TensorFacts, curves, solve
from hypersam.checkpoint import read_checkpoint
from hypersam.fidelity import compare
from hypersam.sam.detect import detect
from hypersam.sam.network import sharing
from hypersam.sensitivity import Weights, measure

RATIOS = (8.0, 10.0)
_SHAPES = (0.5, 0.65, 0.8, 1.0, 1.25, 1.5, 2.0)
_LARGEST = 126
_RECORD_BYTES = 150
"""What a tensor takes in a header, about."""


def run(
    checkpoint: Path, *, ratios: tuple[float, ...] = RATIOS, scenes: int = 32, other_ways: bool = False
) -> Iterator[dict[str, Any]]:
    """One row a ratio and policy; ``other_ways``: and for ``sensitivity`` a row for each other way to measure it."""
    read = read_checkpoint(checkpoint)
    detected = detect(read.tensors)
    network = sharing(detected.described.network, detected.config, read.tensors)
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    fixed = _RECORD_BYTES * len(state) + sum(t.nbytes for name, t in state.items() if name not in parameters)
    fp32 = 4 * sum(t.numel() for t in state.values())
    free = curves([_facts(name, t) for name, t in parameters.items()], partial(_cost, parameters))
    halves = curves([_facts(name, t, halved=t.ndim < 2) for name, t in parameters.items()], partial(_cost, parameters))
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "": lambda: measure(network),
        "masks only": lambda: measure(network, weights=Weights(iou=0, embedding=0)),
        "embedding only": lambda: measure(network, weights=Weights(masks=0, iou=0, embedding=1)),
        "2 pictures": lambda: measure(network, pictures=2),
        "16 pictures": lambda: measure(network, pictures=16),
        "half the side": lambda: measure(network, side=network.config.image_size // 2),
    }
    if not other_ways:
        ways = {"": ways[""]}
    asked: list[tuple[str, str, Curves]] = [(policy, "", halves) for policy in POLICIES if policy != "sensitivity"]
    asked += [("sensitivity", way, _felt(free, found())) for way, found in ways.items()]
    for ratio in ratios:
        plans = {(policy, way): solve(known, fp32 / ratio - fixed, policy=policy)  # type: ignore[arg-type]
                 for policy, way, known in asked}  # fmt: skip
        report = compare(
            network,
            {f"{policy} {way}": partial(_rounded, state, plan) for (policy, way), plan in plans.items()},
            scenes=scenes, yardsticks={},
        )  # fmt: skip
        for (policy, way), plan in plans.items():
            found = report.models[f"{policy} {way}"]
            row = {
                "model": checkpoint.stem, "ratio": fp32 / (plan.total_bytes + fixed), "policy": policy, "measured": way,
                "mask_iou": found.mask_iou, "margin": found.margin, "worst_tenth": found.worst_tenth,
                "embedding_cosine": found.embedding_cosine, "sqnr_db": _sqnr(plan, free), "prompts": report.prompts,
            }  # fmt: skip
            append("allocation", row)
            yield row


def _facts(name: str, tensor: Tensor, *, halved: bool = False) -> TensorFacts:
    discrete = (Choice("half"),) if halved else (Choice("raw"), Choice("half"))
    return TensorFacts(name, tensor.numel(), float(tensor.double().square().sum()), None, discrete, lattice=not halved)


def _felt(known: Curves, sensitivities: Mapping[str, float]) -> Curves:
    return replace(known, tensors=tuple(replace(t, sensitivity=sensitivities[t.name]) for t in known.tensors))


def _sqnr(plan: Plan, known: Curves) -> float:
    return 10 * math.log10(sum(t.energy for t in known.tensors) / sum(plan.squared_error.values()))


def _rounded(state: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    return {name: _decoded(t, plan.choices.get(name, Choice("raw"))) for name, t in state.items()}


def _decoded(tensor: Tensor, choice: Choice) -> Tensor:
    if choice.encoding == "half":
        return tensor.half().float()
    if choice.step is None:
        return tensor
    levels = (tensor / choice.step).round_()
    return torch.where(levels.abs() > _LARGEST, tensor, levels * choice.step)


def _cost(tensors: Mapping[str, Tensor], facts: TensorFacts, choice: Choice) -> Cost:
    tensor = tensors[facts.name]
    error = float((tensor - _decoded(tensor, choice)).double().square().sum())
    if choice.step is None:
        return Cost(float(tensor.numel() * (16 if choice.encoding == "half" else 32)), error)
    joined = tensor.ndim < 2 or tensor.numel() // tensor.shape[0] < 32
    rows = tensor.reshape(1 if joined else tensor.shape[0], -1)
    levels = (rows / choice.step).round_()
    escaped = int((levels.abs() > _LARGEST).sum())
    index = levels.clamp_(-_LARGEST, _LARGEST).long() + _LARGEST
    spread = rows.square().mean(1).sqrt() / choice.step
    classes, place = (8 * spread.clamp_min(2.0**-6).log2()).round_().clamp_(-48, 64).unique(return_inverse=True)
    width = 2 * _LARGEST + 1
    counts = torch.bincount((place[:, None] * width + index).flatten(), minlength=len(classes) * width)
    counts = counts.view(-1, width).double()
    bits = min(sum(float(counts[i] @ _lengths(shape, int(j))) for i, j in enumerate(classes)) for shape in _SHAPES)
    return Cost(bits + 32 * escaped + 8 * len(rows), error)


@cache
def _lengths(shape: float, row_class: int) -> Tensor:
    """Bits of each level from −126 to 126 under a generalised Gaussian of spread 2^(class/8) levels; 12 bits at most
    besides what escapes."""
    edges = (torch.arange(2 * _LARGEST + 2, dtype=torch.float64) - _LARGEST - 0.5) / 2 ** (row_class / 8)
    scale = math.exp((math.lgamma(1 / shape) - math.lgamma(3 / shape)) / 2)
    power = torch.tensor(1 / shape, dtype=torch.float64)
    below = 0.5 + 0.5 * edges.sign() * torch.special.gammainc(power, (edges.abs() / scale) ** shape)
    return -below.diff().clamp_min(2.0**-12).log2()
