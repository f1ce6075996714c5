"""Which model a state dict is, from keys and shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hypersam.errors import LayoutMismatch, UnknownFamily, VariantMismatch
from hypersam.sam.families import sam_vit
from hypersam.sam.registry import NOT_YET, OTHER_SIZES, VARIANTS, known_variants

_SHOWN = 8


@dataclass(frozen=True)
class Detected:
    """A recognised model: its family, variant, the variants it could also be, and its configuration."""

    family: str
    variant: str
    candidates: tuple[str, ...]
    config: sam_vit.SamViTConfig


def detect(tensors: Mapping[str, Tensor], *, variant: str | None = None) -> Detected:
    """Recognise a state dict and check that every key and shape is as the model expects.

    ``variant`` is what the caller says it is. Raises UnknownFamily, LayoutMismatch or VariantMismatch.
    """
    if variant is not None and variant not in known_variants():
        raise VariantMismatch(f"unknown variant {variant!r}; known are {', '.join(known_variants())}")
    for key, family in NOT_YET:
        if key in tensors:
            raise UnknownFamily(f"this is {family} (it has {key!r}), which cannot be compressed yet; {_known()}")
    if sam_vit.MARK not in tensors:
        keys = ", ".join(sorted(tensors)[:3])
        raise UnknownFamily(f"no known Segment Anything model: its keys begin with {keys} …; {_known()}")
    config = sam_vit.config_from(tensors)
    check_layout(tensors, config)
    found = [v.id for v in VARIANTS if all(getattr(config, name) == value for name, value in v.marks)]
    candidates = tuple(found) or ("sam_vit",)
    if variant is not None and variant not in candidates:
        raise VariantMismatch(f"the checkpoint is {' or '.join(candidates)} by its shapes, not {variant}")
    return Detected("sam_vit", variant or candidates[0], candidates, config)


def check_layout(tensors: Mapping[str, Tensor], config: sam_vit.SamViTConfig) -> None:
    """Raise LayoutMismatch unless the keys and shapes are exactly those of the model."""
    expected = expected_layout(config)
    problems = []
    if missing := [key for key in expected if key not in tensors]:
        problems.append(f"missing: {_some(missing)}")
    if unexpected := [key for key in tensors if key not in expected]:
        problems.append(f"unexpected: {_some(unexpected)}")
    wrong = [f"{key} is {tuple(tensors[key].shape)}, should be {tuple(shape)}"
             for key, shape in expected.items() if key in tensors and tensors[key].shape != shape]  # fmt: skip
    if wrong:
        problems.append(f"of another shape: {_some(wrong)}")
    if problems:
        raise LayoutMismatch("the state dict does not fit its family (SAM ViT); " + "; ".join(problems))


def expected_layout(config: sam_vit.SamViTConfig) -> dict[str, torch.Size]:
    """Key to shape of every tensor of the model."""
    with torch.device("meta"):
        return {key: value.shape for key, value in sam_vit.SamViT(config).state_dict().items()}


def linear_weights(model: nn.Module) -> frozenset[str]:
    """Names of the weights of linear layers."""
    return frozenset(f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Linear))


def _known() -> str:
    titles = [v.title for v in VARIANTS] + list(OTHER_SIZES.values())
    return f"known are {', '.join(titles)}"


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
