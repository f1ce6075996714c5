"""Shared by all tests."""

from __future__ import annotations

import os

import torch

# Without a GPU Triton's kernels run in its interpreter. The kernel's decorator reads this when its module is first
# imported, by whichever test, so it is set before any of them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
