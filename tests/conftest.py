"""Shared by all tests."""

from __future__ import annotations

import os

import pytest
import torch

# Without a GPU Triton's kernels run in its interpreter. The kernel's decorator reads this when its module is first
# imported, by whichever test, so it is set before any of them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
