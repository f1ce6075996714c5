"""The codecs' names and presets, as data. No torch here: the command line answers ``--help`` without waiting for it."""

from __future__ import annotations

CODECS = ("lattice", "orbit", "birkhoff")
DEFAULT_CODEC = "lattice"
CODEC_VERSION = "1"
"""Counts up when the same checkpoint and options would give other bytes."""

PRESETS = {"4x": 4.0, "5x": 5.0, "6.5x": 6.5, "8x": 8.0}
"""Ratios of the tensors' fp32 size to the whole artifact."""
DEFAULT_PRESETS = {"lattice": "5x", "orbit": "8x"}
"""By codec, where nothing is asked for."""
