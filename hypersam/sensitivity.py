"""How far a SAM's answers move when a tensor is disturbed, measured without data.

The network looks at generated scenes and is asked for their objects by click, by box, and by clicks with an
earlier mask. Its answers f (every mask as probabilities, the predicted IoUs, the picture's embedding) are one
long vector, scaled so that ‖δf‖² is a weighted mean of squared movements. For an error e of a tensor t,
independent from element to element, E‖δf‖² = s_t·‖e‖² to first order, with s_t = ‖J_t‖²/n_t, J_t the Jacobian
and n_t the number of elements.

``measure`` finds all s_t at once (Hutchinson 1990): for a vector u of random signs the gradient of u·f with
respect to the tensor is J_tᵀu, and E‖J_tᵀu‖² = ‖J_t‖². One backward pass a probe; each gradient is reduced to
its norm and freed as soon as it is complete. The statistics of batch norms have no gradient of their own: theirs
follows from that of the norm's weight and bias, channel by channel. ``measure_by_perturbation`` disturbs one tensor
after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hypersam.evaluate import prompts_for
from hypersam.sam.family import batch_norms
from hypersam.sam.model import SamModel
from hypersam.sam.network import LARGEST_SIDE, Prompts, SamNetwork, sharing
from hypersam.sam.registry import family_row
from hypersam.scenes import SceneObject, make_scene

FIRST_SCENE = 5_000_000
"""Scene numbers from here on are for sensitivities alone; evaluations count from 0."""
OBJECTS = 8
"""Most objects of a scene that are asked for."""
_PICTURES, _FEW_PICTURES, _MANY_PARAMETERS = 8, 4, 100_000_000
_KEPT_SIDE = LARGEST_SIDE
"""Over larger pictures than this, networks keep little for the backward pass and compute blocks twice."""


@dataclass(frozen=True)
class Weights:
    """What the movement is made of: the weight of each part's mean squared movement.

    ``masks``: all four masks as probabilities. ``iou``: predicted IoUs, which choose among the masks; without them
    an allocation starves the layers that choose, and whole masks change. ``embedding``: in units of its own root mean
    square, for those who use it with decoders of their own. ``benchmarks/allocation.py`` compares other weights.
    """

    masks: float = 1.0
    iou: float = 1.0
    embedding: float = 0.1


@dataclass(frozen=True)
class _Picture:
    """A scene as the network takes it: pixels (1, 3, S, S) normalised; clicks (B, 2, 2) and their labels (B, 2),
    the second of each outside its object; boxes (B, 4)."""

    pixels: Tensor
    clicks: Tensor
    labels: Tensor
    boxes: Tensor


def measure(
    model: SamModel | SamNetwork,
    *,
    pictures: int | None = None,
    probes: int = 1,
    seed: int = 0,
    side: int | None = None,
    weights: Weights | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Sensitivity of every parameter of a dense network, and of its batch norms' statistics: squared movement of its
    answers for a unit of squared error.

    ``pictures``: how many scenes; None takes 8, or 4 for more than 100 million parameters. ``probes``: backward passes
    a scene; more scenes say more than more probes. ``side``: pixels of the scenes, a multiple of the patch; None takes
    what is affordable on a CPU. A table that is cut for a smaller side is taken to be as sensitive as its part.
    ``progress`` is told the backward passes done and in all. ``model`` is left as it was; its weights are shared.
    Peak memory above the weights: one gradient, and about 1 GB of activations.
    Raises ValueError for a side that does not fit or a network with compressed layers.
    """
    with torch.inference_mode(False), torch.enable_grad():
        network, full = _measurable(model, side)
        count = pictures or (_FEW_PICTURES if sum(full.values()) > _MANY_PARAMETERS else _PICTURES)
        return _measured(network, full, count, probes, seed, weights or Weights(), progress)


def _measured(
    network: SamNetwork,
    full: dict[str, int],
    pictures: int,
    probes: int,
    seed: int,
    weights: Weights,
    progress: Callable[[int, int], None] | None,
) -> dict[str, float]:
    network.requires_grad_(True)
    sums = dict.fromkeys((name for name, _ in network.named_parameters()), 0.0)
    statistics = _statistics(network)
    sums |= dict.fromkeys((name for name, _ in statistics.values()), 0.0)

    def reduce_to(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            sums[name] += float(torch.linalg.vector_norm(parameter.grad)) ** 2
            if name in statistics:
                statistic, factor = statistics[name]
                sums[statistic] += float(torch.linalg.vector_norm(parameter.grad * factor)) ** 2
            parameter.grad = None

        return hook

    hooks = [p.register_post_accumulate_grad_hook(reduce_to(name)) for name, p in network.named_parameters()]
    signs = torch.Generator().manual_seed(seed)
    try:
        for number in range(pictures):
            answers = _answers(network, _picture(network, seed, number), weights)
            for probe in range(probes):
                u = torch.randint(0, 2, answers.shape, generator=signs, dtype=torch.int8).to(answers) * 2 - 1
                torch.autograd.backward(answers, u, retain_graph=probe + 1 < probes)
                if progress:
                    progress(number * probes + probe + 1, pictures * probes)
            del answers
    finally:
        for handle in hooks:
            handle.remove()
    return {name: total / (pictures * probes) / full[name] for name, total in sums.items()}


def _statistics(network: SamNetwork) -> dict[str, tuple[str, Tensor]]:
    """By a batch norm's parameter: the statistic whose gradient is the parameter's times a factor a channel.

    y = w·(x − m)/σ + b with σ² = v + ε gives ∂f/∂m = −(w/σ)·∂f/∂b and ∂f/∂v = −(w/2σ²)·∂f/∂w.
    """
    found = {}
    for name, norm in batch_norms(network):
        if norm.weight is None or norm.running_var is None:
            continue
        variance = norm.running_var + norm.eps
        weight = norm.weight.detach()
        found[f"{name}.bias"] = f"{name}.running_mean", weight * variance.rsqrt()
        found[f"{name}.weight"] = f"{name}.running_var", weight / (2 * variance)
    return found


@torch.no_grad()
def measure_by_perturbation(
    model: SamModel | SamNetwork,
    *,
    pictures: int = 1,
    repeats: int = 1,
    seed: int = 0,
    side: int | None = None,
    weights: Weights | None = None,
    relative: float = 0.01,
) -> dict[str, float]:
    """The same quantity as its definition has it, slowly: Gaussian errors of ``relative`` times the tensor's root
    mean square, one tensor at a time, ``repeats`` draws each. One pass a tensor, picture and draw."""
    network, full = _measurable(model, side)
    weights = weights or Weights()
    scenes = [_picture(network, seed, number) for number in range(pictures)]
    still = [_answers(network, scene, weights) for scene in scenes]
    draw = torch.Generator().manual_seed(seed)
    found: dict[str, float] = {}
    statistics = {name: network.get_buffer(name) for name, _ in _statistics(network).values()}
    for name, parameter in (dict(network.named_parameters()) | statistics).items():
        kept = parameter.data
        # A table of zeros is disturbed as a bias of a trained network would be.
        scale = relative * (float(kept.square().mean().sqrt()) or 1.0)
        total = 0.0
        for _ in range(repeats):
            parameter.data = kept + scale * torch.randn(kept.shape, generator=draw).to(kept.device)
            moved = [_answers(network, scene, weights) for scene in scenes]
            total += sum(float((a - b).square().sum()) for a, b in zip(moved, still, strict=True))
        parameter.data = kept
        found[name] = total / (pictures * repeats) / (scale**2 * full[name])
    return found


def _measurable(model: SamModel | SamNetwork, side: int | None) -> tuple[SamNetwork, dict[str, int]]:
    """A network of the wanted side on the model's storage, and how many elements each tensor has when it is whole.

    Of a table with a row for every patch a smaller side uses a part. The mean squared movement of the answers by
    errors of one variance does not depend on the side, so neither does ‖J‖²; s_t is its quotient by all elements.
    """
    network = model.network if isinstance(model, SamModel) else model
    state = network.state_dict()
    with torch.device("meta"):
        whole = type(network)(network.config)
    if set(state) != set(whole.state_dict()):
        raise ValueError("sensitivities are measured on dense networks, this one has compressed layers")
    dense = sharing(type(network), network.config, state)
    full = {name: p.numel() for name, p in dense.named_parameters()}
    full |= {name: factor.numel() for name, factor in _statistics(dense).values()}
    return dense.reduced(side or dense.affordable_side()), full


def _picture(network: SamNetwork, seed: int, number: int) -> _Picture:
    """Scene ``number`` of a seed, with prompts for up to ``OBJECTS`` of its objects."""
    side = network.config.image_size
    device = network.device
    # Seeds have streams of a thousand scenes each; a scene without objects is passed over.
    scene_number = FIRST_SCENE + 1000 * seed + number
    while not (scene := make_scene(scene_number, size=side)).objects:
        scene_number += 1_000_000
    rng = np.random.default_rng([seed, number])
    chosen = rng.permutation(len(scene.objects))[:OBJECTS]
    clicks, boxes = [], []
    for i in chosen:
        thing = scene.objects[int(i)]
        asked = prompts_for(thing)
        clicks.append([asked["point"].points[0], _outside(thing, rng)])
        boxes.append(asked["box"].box)
    # Scenes have the network's own size, so coordinates stay as they are.
    return _Picture(
        pixels=network.rules.normalised(network.rules.resized(scene.image, side).to(device), side),
        clicks=torch.tensor(clicks, dtype=torch.float32, device=device),
        labels=torch.tensor([[1, 0]] * len(clicks), dtype=torch.int, device=device),
        boxes=torch.tensor(boxes, dtype=torch.float32, device=device),
    )


def _outside(thing: SceneObject, rng: np.random.Generator) -> tuple[float, float]:
    """A random pixel that is not the object's."""
    free: NDArray[np.intp] = np.argwhere(~thing.mask)
    y, x = free[rng.integers(len(free))] if len(free) else (0, 0)
    return float(x) + 0.5, float(y) + 0.5


def _answers(network: SamNetwork, picture: _Picture, weights: Weights) -> Tensor:
    """All answers about a picture as one vector; the square of its movement is the weighted mean square."""
    can = family_row(network.family)
    recompute = torch.is_grad_enabled() and picture.pixels.shape[-1] > _KEPT_SIDE
    features = network.encode(picture.pixels, recompute=recompute)
    clicks, labels, boxes = picture.clicks, picture.labels, picture.boxes
    first = (clicks[:, :1], labels[:, :1])
    plain = network.every_mask(features, Prompts(points=first))
    boxed = network.every_mask(features, Prompts(boxes=boxes))
    # A mask stands for what a caller would send back; it is input, so nothing flows through it.
    mask = plain[0][:, -1:].detach() if can.mask_input else None
    again = network.every_mask(features, Prompts((clicks, labels) if can.background else first, None, mask))
    parts = []
    if weights.masks:
        parts += [_scaled(torch.sigmoid(logits), weights.masks / 3) for logits, _ in (plain, boxed, again)]
    if weights.iou:
        parts += [_scaled(iou, weights.iou / 3) for _, iou in (plain, boxed, again)]
    if weights.embedding:
        embedding = features[0]
        spread = embedding.detach().square().mean().sqrt()
        parts.append(_scaled(embedding / spread, weights.embedding))
    return torch.cat(parts)


def _scaled(values: Tensor, weight: float) -> Tensor:
    """Flat, so that the sum of squares is ``weight`` times the mean square."""
    return values.flatten() * math.sqrt(weight / values.numel())
