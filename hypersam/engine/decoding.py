"""Prompts to masks on one picture: the decoder's batched calls, and full-size masks from what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hypersam.engine.prompts import Mask, Prompt, bounding_box, check_suits
from hypersam.sam.model import Embedding, SamModel

AT_ONCE = 32
"""Prompts handed to the decoder at once; on a CPU it takes them in parts that its caches hold."""

PIXELS_AT_ONCE = 1 << 24
"""Of full-size masks made without a look at what else waits: some tenths of a second on a CPU."""

Decoded = tuple[Tensor, Tensor]
"""Low-resolution logits (M, s, s) of a prompt and predicted IoU (M,)."""


def decode(
    model: SamModel,
    embedding: Embedding,
    prompts: Sequence[Prompt],
    *,
    multimask: bool,
    at_once: int = AT_ONCE,
    called: Callable[[int], None] = lambda size: None,
) -> list[Decoded]:
    """Each prompt's logits and scores.

    Prompts of one form (points, box or not, mask input or not) are decoded together, ``at_once`` a call. Other
    forms are not padded to the same length: padding points are tokens that the decoder attends to, so the mask
    would depend on what else was asked at that moment. ``called`` is told each call's number of prompts. Raises
    PromptError.
    """
    check_suits(prompts, model)
    forms: dict[tuple[int, bool, bool], list[int]] = {}
    for number, prompt in enumerate(prompts):
        form = (len(prompt.points), prompt.box is not None, prompt.mask_input is not None)
        forms.setdefault(form, []).append(number)
    answers: dict[int, Decoded] = {}
    for form, numbers in forms.items():
        for start in range(0, len(numbers), at_once):
            part = numbers[start : start + at_once]
            low_res, scores = _decode(model, embedding, [prompts[n] for n in part], form, multimask)
            called(len(part))
            answers.update((number, (low_res[row], scores[row])) for row, number in enumerate(part))
    return [answers[number] for number in range(len(prompts))]


def _decode(
    model: SamModel,
    embedding: Embedding,
    prompts: Sequence[Prompt],
    form: tuple[int, bool, bool],
    multimask: bool,
) -> tuple[Tensor, Tensor]:
    points, has_box, has_mask = form
    clicks = boxes = masks = None
    if points:
        coordinates = torch.tensor([p.points for p in prompts], dtype=torch.float64, device=model.device)
        labels = torch.tensor([p.labels for p in prompts], dtype=torch.int, device=model.device)
        clicks = (model.scale_coordinates(coordinates, embedding), labels)
    if has_box:
        corners = torch.tensor([p.box for p in prompts], dtype=torch.float64, device=model.device)
        boxes = model.scale_coordinates(corners.view(-1, 2, 2), embedding).view(-1, 4)
    if has_mask:
        given = np.stack([np.asarray(p.mask_input, np.float32) for p in prompts])
        masks = torch.from_numpy(given)[:, None].to(model.device)
    return model.decode(embedding, clicks, boxes, masks, multimask=multimask)


def in_parts(decoded: Sequence[Decoded], pixels: int) -> Iterator[tuple[int, Sequence[Decoded]]]:
    """Prompts whose full-size masks have PIXELS_AT_ONCE together, or one, with the number of the first of them."""
    each = max(1, PIXELS_AT_ONCE // (pixels * max((len(scores) for _, scores in decoded), default=1)))
    for first in range(0, len(decoded), each):
        yield first, decoded[first : first + each]


def on_cpu(decoded: Sequence[Decoded]) -> list[Decoded]:
    """The same in the CPU's memory."""
    return [(masks.cpu(), scores.cpu()) for masks, scores in decoded]


def full_masks(
    model: SamModel, embedding: Embedding, decoded: Sequence[Decoded], *, first: int = 0
) -> tuple[Mask, ...]:
    """Masks of the picture's size, the best first within a prompt; ``first``: the number of the first prompt.

    Prompts are upscaled one by one: a large picture times many prompts would not fit in memory.
    """
    made: list[Mask] = []
    for number, (low_res, scores) in enumerate(decoded, first):
        full = model.binary(model.upscale(low_res[None], embedding)[0]).cpu().numpy()
        logits, values = model.rules.kept(low_res).cpu().numpy(), scores.tolist()
        for i in sorted(range(len(values)), key=lambda i: -values[i]):
            made.append(Mask(number, values[i], bounding_box(full[i]), int(full[i].sum()), full[i], logits[i]))
    return tuple(made)


def predict(model: SamModel, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool) -> tuple[Mask, ...]:
    """Masks of all prompts."""
    return full_masks(model, embedding, decode(model, embedding, prompts, multimask=multimask))
