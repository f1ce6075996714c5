"""How much of the original is left in a compressed model, measured without data.

Original and compressed model segment the same generated scenes by click and by box; the masks of either are
compared with the original's, not with the truth, since agreement is by far the sharper figure. Beside them
stand plain yardsticks made of the original's own weights: round-to-nearest with 8 bits and a scale a row, and
with 4 bits in groups of 128. Models come one after another, so no more than the original and one other
is in memory. Large models look at smaller scenes through a reduced network (``SamNetwork.reduced``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from hypersam.engine import Prompt, predict
from hypersam.evaluate import KINDS, iou, prompts_for
from hypersam.sam.model import SamModel
from hypersam.sam.network import SamNetwork, sharing
from hypersam.scenes import Scene, make_scene

FIRST_SCENE = 6_000_000
"""Scene numbers from here on are for fidelity alone: neither evaluations nor sensitivities use them."""
_SCENES, _FEW_SCENES, _MANY_PARAMETERS = 8, 4, 100_000_000

State = Mapping[str, Tensor]
Model = SamModel | SamNetwork | State
"""A model, a network, or the state dict of a dense network of the original's layout."""


@dataclass(frozen=True)
class Yardstick:
    """Round-to-nearest: ``bits`` a weight; ``group`` weights along a row share scale and zero point, None: a
    row shares one scale and is symmetric."""

    bits: int
    group: int | None


YARDSTICKS: Mapping[str, Yardstick] = {"int8": Yardstick(8, None), "int4": Yardstick(4, 128)}


@dataclass(frozen=True)
class ModelFidelity:
    """One model against the original.

    ``mask_iou``: mean IoU of its masks with the original's, ``margin`` the half width of the 95 % interval,
    ``worst_tenth`` the mean over the tenth of the prompts that agree least, ``by_kind`` by sort of prompt.
    ``embedding_cosine``: mean over the scenes. ``nbytes``: of the whole model, and ``ratio`` the original's
    fp32 bytes over them; None where nobody said.
    """

    mask_iou: float
    margin: float
    worst_tenth: float
    by_kind: dict[str, float]
    embedding_cosine: float
    nbytes: int | None
    ratio: float | None


@dataclass(frozen=True)
class FidelityReport:
    """Models by name against the original: on ``scenes`` scenes of ``side`` pixels, ``prompts`` prompts in all.

    ``full_side`` is the original's own; where ``side`` is smaller the networks were reduced to it.
    """

    scenes: int
    prompts: int
    side: int
    full_side: int
    models: dict[str, ModelFidelity]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Answers:
    """What a model said: per scene its embedding (flat, float32), per prompt the best mask and its kind."""

    embeddings: list[Tensor]
    masks: list[NDArray[np.bool_]]
    kinds: list[str]


def compare(
    original: SamModel | SamNetwork,
    others: Mapping[str, Model | Callable[[], Model]],
    *,
    scenes: int | None = None,
    side: int | None = None,
    sizes: Mapping[str, int] | None = None,
    yardsticks: Mapping[str, Yardstick] = YARDSTICKS,
    progress: Callable[[int, int], None] | None = None,
) -> FidelityReport:
    """Compare models with the dense ``original``.

    ``others`` may hold functions that make a model; each is called when its turn comes, and its result is let go
    before the next. ``scenes``: how many; None takes 8, or 4 for more than 100 million parameters. ``side``: pixels of
    the scenes; None takes what is affordable on a CPU. ``sizes``: bytes of the others, for the report. ``progress`` is
    told the scenes done and in all, over all models.
    Raises ValueError for a side that does not fit the model, or for a name used twice.
    """
    if clash := sorted(set(others) & set(yardsticks)):
        raise ValueError(f"{', '.join(clash)} names a yardstick already")
    network = original.network if isinstance(original, SamModel) else original
    looked = side or network.affordable_side()
    parameters = sum(t.numel() for t in network.state_dict().values())
    count = scenes or (_FEW_SCENES if parameters > _MANY_PARAMETERS else _SCENES)
    pictures = _scenes(count, looked)
    total = count * (1 + len(others) + len(yardsticks))
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    truth = _ask(_placed(original, original, looked), pictures, tell)
    fp32 = 4 * parameters
    models: dict[str, ModelFidelity] = {}
    for name, other in others.items():
        answers = _ask(_placed(_made(other), original, looked), pictures, tell)
        models[name] = _score(answers, truth, (sizes or {}).get(name), fp32)
    for name, yardstick in yardsticks.items():
        state, nbytes = rounded(network, yardstick)
        answers = _ask(_placed(state, original, looked), pictures, tell)
        del state
        models[name] = _score(answers, truth, nbytes, fp32)
    return FidelityReport(count, len(truth.masks), looked, network.config.image_size, models)


def rtn(weight: Tensor, bits: int, group: int | None = None) -> tuple[Tensor, float]:
    """A weight rounded to the nearest of 2^``bits`` levels (fp32, the same shape), and its real bits a weight.

    A row is everything of one index of the first dimension. ``group`` None: ŵ = s·q, |q| < 2^(bits−1), s = max|w| of
    the row over the largest q. Otherwise each ``group`` weights (the last group of a row may be shorter) have their
    own ŵ = s·(q − z), 0 ≤ q, z < 2^bits, from their smallest to their largest weight. Scales are fp16 and
    counted, zero points count ``bits``.
    """
    matrix = weight.detach().float().reshape(weight.shape[0], -1)
    rows, columns = matrix.shape
    if group is None:
        top = 2 ** (bits - 1) - 1
        scale = _half(matrix.abs().amax(1, keepdim=True) / top)
        values = (matrix / scale).round_().clamp_(-top, top).mul_(scale)
        return values.view(weight.shape), bits + 16 / columns
    # The last weight of a row, repeated, changes no group's range.
    short = -columns % group
    padded = torch.cat([matrix, matrix[:, -1:].expand(-1, short)], 1).view(rows, -1, group)
    top = 2**bits - 1
    low, high = padded.amin(2, keepdim=True).clamp_max_(0), padded.amax(2, keepdim=True).clamp_min_(0)
    scale = _half((high - low) / top)
    zero = (-low / scale).round_().clamp_(0, top)
    values = (padded / scale).add_(zero).round_().clamp_(0, top).sub_(zero).mul_(scale)
    return values.view(rows, -1)[:, :columns].reshape(weight.shape), bits + (16 + bits) * padded.shape[1] / columns


def rounded(network: SamNetwork, yardstick: Yardstick) -> tuple[dict[str, Tensor], int]:
    """A state dict as such models are shipped, and its bytes: the weights of linear and convolution layers rounded,
    other parameters in half precision where they fit, buffers as they are."""
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    sizes = {name: 32.0 * tensor.numel() for name, tensor in state.items()}
    layers = {f"{name}.weight" for name, module in network.named_modules()
              if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))}  # fmt: skip
    for name, parameter in network.named_parameters():
        each = 16.0
        if name in layers:
            state[name], each = rtn(state[name], yardstick.bits, yardstick.group)
        elif (half := parameter.detach().half()).isfinite().all():
            state[name] = half.float()
        else:
            each = 32.0
        sizes[name] = each * parameter.numel()
    return state, math.ceil(math.fsum(sizes.values()) / 8)


def _half(scale: Tensor) -> Tensor:
    """Scales as fp16 stores them; none is zero, so that rows of zeros divide."""
    return scale.half().float().clamp_min_(2.0**-24)


def _made(other: Model | Callable[[], Model]) -> Model:
    return other if isinstance(other, (SamModel, SamNetwork, Mapping)) else other()


def _placed(model: Model, original: SamModel | SamNetwork, side: int) -> SamModel:
    """A model for pictures of ``side`` pixels on the weights of this one, which stays as it is."""
    like = model if isinstance(model, SamModel) else original if isinstance(original, SamModel) else None
    if isinstance(model, SamModel):
        network = model.network
    elif isinstance(model, SamNetwork):
        network = model
    else:
        dense = original.network if isinstance(original, SamModel) else original
        network = sharing(type(dense), dense.config, model)
    return SamModel(
        network.reduced(side),
        variant=like.variant if like else network.family,
        device=network.device,
        dtype=like.dtype if like and isinstance(model, SamModel) else network.dtype,
    )


def _scenes(count: int, side: int) -> list[Scene]:
    found: list[Scene] = []
    number = FIRST_SCENE
    while len(found) < count:
        scene = make_scene(number, size=side)
        number += 1
        if scene.objects:
            found.append(scene)
    return found


def _ask(model: SamModel, pictures: Sequence[Scene], tell: Callable[[], None]) -> _Answers:
    """The mask of highest predicted IoU for every object of every scene, by click and by box."""
    answers = _Answers([], [], [])
    for scene in pictures:
        embedding = model.embed(scene.image)
        answers.embeddings.append(embedding.features.flatten().cpu())
        asked = [prompts_for(thing) for thing in scene.objects]
        for kind in KINDS:
            prompts: list[Prompt] = [prompt[kind] for prompt in asked]
            best: dict[int, NDArray[np.bool_]] = {}
            for mask in predict(model, embedding, prompts, multimask=True):
                best.setdefault(mask.prompt, mask.mask)
            answers.masks.extend(best[i] for i in range(len(prompts)))
            answers.kinds.extend([kind] * len(prompts))
        tell()
    return answers


def _score(answers: _Answers, truth: _Answers, nbytes: int | None, fp32: int) -> ModelFidelity:
    found = np.array([iou(a, b) for a, b in zip(answers.masks, truth.masks, strict=True)])
    cosines = [float(F.cosine_similarity(a.double(), b.double(), dim=0))
               for a, b in zip(answers.embeddings, truth.embeddings, strict=True)]  # fmt: skip
    spread = float(found.std(ddof=1)) if len(found) > 1 else 0.0
    kinds = np.array(truth.kinds)
    return ModelFidelity(
        mask_iou=float(found.mean()),
        margin=1.96 * spread / math.sqrt(len(found)),
        worst_tenth=float(np.sort(found)[: max(1, len(found) // 10)].mean()),
        by_kind={kind: float(found[kinds == kind].mean()) for kind in KINDS},
        embedding_cosine=float(np.mean(cosines)),
        nbytes=nbytes,
        ratio=fp32 / nbytes if nbytes else None,
    )
