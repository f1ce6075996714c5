"""Shared by the tests of the kernels room."""

from __future__ import annotations

import os

import pytest
import torch

# The kernel's decorator reads this when its module is imported, so it must be set before that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
