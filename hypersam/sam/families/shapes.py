"""Reading sizes off the shapes of a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from hypersam.errors import LayoutMismatch


class Shapes:
    """The shapes of a state dict, asked with errors that name the key. ``family`` is its title."""

    def __init__(self, tensors: Mapping[str, Tensor], family: str) -> None:
        self._tensors, self._family = tensors, family

    def of(self, key: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor with ``dims`` dimensions, none of them empty. Raises LayoutMismatch."""
        if key not in self._tensors:
            raise LayoutMismatch(f"a {self._family} checkpoint needs {key!r}, which is missing")
        shape = tuple(self._tensors[key].shape)
        if len(shape) != dims or 0 in shape:
            raise LayoutMismatch(f"{key!r} has shape {shape}; {dims} dimensions were expected")
        return shape

    def has(self, key: str) -> bool:
        """Whether the key is there."""
        return key in self._tensors

    def count(self, pattern: str) -> int:
        """How many keys there are of ``pattern`` with 0, 1, 2 … in its braces, up to the first that is missing."""
        n = 0
        while pattern.format(n) in self._tensors:
            n += 1
        return n


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
