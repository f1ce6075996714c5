"""Which way a product goes on a GPU: read from a small table of measurements, by form, dtype, rows and size.

The table that ships, ``paths.json``, says of every device whether it was measured there or derived from a model.
``tune`` measures anew and writes a table of its own, which is read first: the file that HYPERSAM_KERNEL_PATHS names,
else ``hypersam/paths.json`` in the user's cache folder.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path as File
from typing import Any

import torch

FORMAT = 1
VARIABLE = "HYPERSAM_KERNEL_PATHS"
FORMS = ("birkhoff", "lattice", "orbit3", "orbit4", "orbit5", "orbit6")
WAYS = ("fused", "decode", "int8", "int8_decode")
"""``fused``: decode tiles and multiply in one pass. ``decode``: decode the weight once into scratch memory, then the
library's product. ``int8``, ``int8_decode``: the same two with int8 operands and the kernel's own product."""
OPERANDS = {torch.float32: "float32", torch.float16: "half", torch.bfloat16: "half"}


@dataclass(frozen=True)
class Path:
    """A way and its launch. ``tile``: rows, outputs, inputs of a program's tile, where the way has a product of its
    own; ``decode``: outputs, inputs of a tile, where it decodes into scratch memory.
    """

    way: str
    tile: tuple[int, int, int] | None = None
    decode: tuple[int, int] | None = None
    warps: int = 4
    stages: int = 3

    def __post_init__(self) -> None:
        if self.way not in WAYS:
            raise ValueError(f"way must be one of {', '.join(WAYS)}, not {self.way!r}")
        if (self.tile is None) != (self.way == "decode") or (self.decode is None) == self.way.endswith("decode"):
            raise ValueError(f"the way {self.way} has a tile, unless it is decode, and decode where it is named so")
        least = 32 if self.int8 else 16
        for number in (*(self.tile or ()), *(self.decode or ())):
            if not isinstance(number, int) or number < 16 or number & (number - 1):
                raise ValueError(f"sides of tiles are powers of two from 16, not {number!r}")
        if self.tile is not None and (len(self.tile) != 3 or self.tile[2] < least):
            raise ValueError(f"a tile has three sides, the last at least {least}, not {self.tile}")
        if self.decode is not None and len(self.decode) != 2:
            raise ValueError(f"a tile to decode has two sides, not {self.decode}")
        if self.warps not in (1, 2, 4, 8) or self.stages not in range(1, 8):
            raise ValueError(f"warps are 1, 2, 4 or 8 and stages 1 to 7, not {self.warps} and {self.stages}")

    @property
    def int8(self) -> bool:
        """Whether operands are int8."""
        return self.way.startswith("int8")


@dataclass(frozen=True)
class Entry:
    """A path and where it is taken: ``forms``, ``operands`` (half or float32), at most ``rows`` rows of x and
    ``weights`` weights (None: any number). ``measured``: on the device itself.
    """

    forms: tuple[str, ...]
    operands: tuple[str, ...]
    rows: int | None
    weights: int | None
    path: Path
    measured: bool

    def takes(self, form: str, operands: str, rows: int, weights: int, int8: bool) -> bool:
        """Whether a product goes this way."""
        return (
            form in self.forms
            and operands in self.operands
            and (self.rows is None or rows <= self.rows)
            and (self.weights is None or weights <= self.weights)
            and (int8 or not self.path.int8)
        )

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; ``parsed`` reads it."""
        path = {key: value for key, value in self.path.__dict__.items() if value is not None}
        return {"forms": self.forms, "operands": self.operands, "rows": self.rows, "weights": self.weights,
                "measured": self.measured, **path}  # fmt: skip


Table = Mapping[str, tuple[Entry, ...]]
"""Entries by the beginning of a device's name; ``any`` serves the others. The first that takes a product counts."""


def parsed(text: str, source: str) -> Table:
    """Read a table. Raises ValueError, naming ``source``, for what is none."""
    try:
        document = json.loads(text)
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']!r}, where this release reads {FORMAT}")
        return {name: tuple(_entry(entry) for entry in device["entries"])
                for name, device in document["devices"].items()}  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} is no table of kernel paths: {error}") from error


def _entry(found: Mapping[str, Any]) -> Entry:
    forms, operands = tuple(found["forms"]), tuple(found["operands"])
    if not set(forms) <= set(FORMS) or not set(operands) <= set(OPERANDS.values()):
        raise ValueError(f"unknown among forms {forms} or operands {operands}")
    if not isinstance(found["measured"], bool):
        raise ValueError("measured is true or false")
    tile, decode = found.get("tile"), found.get("decode")
    path = Path(
        found["way"], None if tile is None else tuple(tile), None if decode is None else tuple(decode),
        found["warps"], found["stages"],
    )  # fmt: skip
    return Entry(forms, operands, found["rows"], found["weights"], path, found["measured"])


def user_file() -> File:
    """Where a table measured on this machine lies."""
    named = os.environ.get(VARIABLE)
    cache = os.environ.get("XDG_CACHE_HOME") or File.home() / ".cache"
    return File(named) if named else File(cache) / "hypersam" / "paths.json"


def shipped() -> Table:
    """The table of this release."""
    return parsed(resources.files(__package__).joinpath("paths.json").read_text("utf-8"), "paths.json")


@functools.cache
def _tables() -> tuple[Table, ...]:
    """The user's table, where there is one, then the shipped one; read once."""
    own = user_file()
    if os.environ.get(VARIABLE) or own.is_file():
        return parsed(own.read_text("utf-8"), str(own)), shipped()
    return (shipped(),)


def entries_for(device_name: str) -> tuple[Entry, ...]:
    """The entries that count on a device, the user's own first."""
    found: list[Entry] = []
    for table in _tables():
        names = [name for name in table if name != "any" and device_name.startswith(name)]
        for name in [*sorted(names, key=len, reverse=True), "any"]:
            found += table.get(name, ())
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.lru_cache(maxsize=4096)
def choose(form: str, dtype: torch.dtype, rows: int, weights: int, int8: bool, device: torch.device) -> Path:
    """The path of a product of ``rows`` rows of ``dtype`` with ``weights`` weights. ``int8``: whether that may be."""
    operands = OPERANDS[dtype]
    for entry in entries_for(_device_name(device)):
        if entry.takes(form, operands, rows, weights, int8):
            return entry.path
    raise ValueError(f"no path for {form} with {operands} operands in the table for {_device_name(device)}")
