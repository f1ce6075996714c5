"""Reading sizes off the shapes of a state dict."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from hypersam.errors import LayoutMismatch

MAX_DEPTH = 256
"""Layers of a stack; the deepest published one has 48. A number in a key could ask for any."""


class Shapes:
    """The shapes of a state dict, asked with errors that name the key. ``family`` is its title."""

    def __init__(self, tensors: Mapping[str, Tensor], family: str) -> None:
        self._tensors, self._family = tensors, family

    def of(self, key: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor with ``dims`` dimensions, none of them empty. Raises LayoutMismatch."""
        if key not in self._tensors:
            raise LayoutMismatch(f"{self._family} checkpoints need {key!r}, which is missing")
        shape = tuple(self._tensors[key].shape)
        if len(shape) != dims or 0 in shape:
            raise LayoutMismatch(f"{key!r} has shape {shape}; {dims} dimensions were expected")
        return shape

    def has(self, beginning: str) -> bool:
        """Whether any key begins so."""
        return any(key.startswith(beginning) for key in self._tensors)

    def layers(self, stack: str) -> tuple[tuple[str, ...], ...]:
        """What follows ``stack`` and a number in the keys, a layer each, up to the largest number: a layer that lost a
        key, or all, is one of a stack nevertheless. Raises LayoutMismatch for more than ``MAX_DEPTH``."""
        numbered = re.compile(re.escape(stack) + r"(0|[1-9][0-9]*)\.(.+)")
        found: dict[int, list[str]] = {}
        for key in self._tensors:
            if match := numbered.fullmatch(key):
                number = int(match[1])
                if number >= MAX_DEPTH:
                    raise LayoutMismatch(f"{key!r} is of layer {number}; at most {MAX_DEPTH} are read, from 0 on")
                found.setdefault(number, []).append(match[2])
        return tuple(tuple(found.get(i, ())) for i in range(max(found, default=-1) + 1))

    def depth(self, stack: str) -> int:
        """How many ``layers`` there are."""
        return len(self.layers(stack))


def most_of(*beginnings: str) -> Callable[[Collection[str]], bool]:
    """A question about keys: whether more than half of these are what some key begins with. One key that is lost or
    strange does not change the answer, where each beginning is that of several keys or there are three and more."""

    def told(keys: Collection[str]) -> bool:
        return 2 * sum(any(key.startswith(start) for key in keys) for start in beginnings) > len(beginnings)

    return told


def checked(cls: type[Any], values: Mapping[str, Any], *, lists: tuple[str, ...] = ()) -> dict[str, Any]:
    """The fields of a configuration as an artifact has them: positive integers, but for ``lists`` of whole numbers.

    Nested configurations are left to the caller. Raises ValueError for what is missing, unknown or no such number.
    """
    names = {f.name for f in fields(cls)}
    if set(values) != names:
        raise ValueError(f"the configuration has the fields {sorted(names)}, got {sorted(values)}")
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in lists:
            if not isinstance(value, (list, tuple)) or not all(_whole(v) and v >= 0 for v in value):
                raise ValueError(f"{name} must be a list of whole numbers")
            found[name] = tuple(value)
        elif isinstance(value, Mapping):
            found[name] = value
        elif not _whole(value) or value <= 0:
            raise ValueError(f"{name} must be a positive integer, not {value!r}")
        else:
            found[name] = value
    return found


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
