"""What is odd about a checkpoint's values: what is stored as it is because of it, and what cannot be measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from hypersam.checkpoint import Checkpoint
from hypersam.errors import NotFinite
from hypersam.sam.detect import Detected

_PIECE = 1 << 22
_SHOWN = 5


def not_finite(tensors: Mapping[str, Tensor], looked: Callable[[], None]) -> tuple[str, ...]:
    """The names of floating tensors that hold NaN or infinity, as fp32. ``looked`` is called after each tensor."""
    found = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not all(
            bool(piece.float().isfinite().all()) for piece in tensor.flatten().split(_PIECE)
        ):
            found.append(name)
        looked()
    return tuple(found)


def check_measurable(names: tuple[str, ...], *, measured: bool) -> None:
    """Raise NotFinite for tensors of a network that is to be measured."""
    if names and measured:
        raise NotFinite(
            f"{some(names)} {'holds' if len(names) == 1 else 'hold'} NaN or infinity (or more than fp32 does), so the "
            "network's masks cannot be measured; to store such tensors as they are ask for policy equal_error (or "
            "codec birkhoff) and no fidelity report"
        )


def notices_of(checkpoint: Checkpoint, odd: tuple[str, ...], detected: Detected) -> tuple[str, ...]:
    """What a report says of a variant that is a guess, of tensors stored as they are for what they hold, and of what is
    not stored."""
    tensors = checkpoint.tensors
    whole = tuple(name for name, tensor in tensors.items() if not tensor.is_floating_point())
    found = list(detected.doubts)
    if odd:
        found.append(f"NaN or infinity, stored as they are: {some(odd)}")
    if whole:
        found.append(f"whole numbers or truth values, stored as they are: {some(whole)}")
    if checkpoint.passed_over:
        found.append(f"no tensors, passed over: {some(checkpoint.passed_over)}")
    return tuple(found)


def some(names: tuple[str, ...]) -> str:
    """The first names, and how many there are besides."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
