"""The custom operator ``hypersam::birkhoff_linear``: one name for torch.compile, a kernel a device.

It is for inference: no gradient is registered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.hyperlinear import cpu


@torch.library.custom_op("hypersam::birkhoff_linear", mutates_args=())
def birkhoff_linear(x: Tensor, indices: Tensor, pairs: Tensor, bias: Tensor | None) -> Tensor:
    """``x`` (…, in) times a compressed weight, plus ``bias``: (…, out) in ``x``'s dtype.

    ``indices``: int16 (out, ⌈in / 2⌉). ``pairs``: int64 (n,), two fp32 weights each. ``bias``: (out,) or None.
    Devices without a kernel of their own take the block-wise product. Raises ValueError for an ``x`` of
    another width, TypeError for one that is not floating.
    """
    _check(x, indices)
    return cpu.linear(x, indices, pairs, bias)


@birkhoff_linear.register_kernel("cuda")
def _cuda(x: Tensor, indices: Tensor, pairs: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, indices)
    # Imported where a GPU is at hand: machines without one need no triton.
    from kernels.hyperlinear import triton_kernel

    if x.dtype not in triton_kernel.SUPPORTED:
        return cpu.linear(x, indices, pairs, bias)
    with torch.cuda.device(x.device):
        return triton_kernel.linear(x, indices, pairs, bias)


@birkhoff_linear.register_fake
def _fake(x: Tensor, indices: Tensor, pairs: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, indices)
    return x.new_empty((*x.shape[:-1], indices.shape[0]))


def _check(x: Tensor, indices: Tensor) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating, not {x.dtype}")
    if x.dim() < 1 or (x.shape[-1] + 1) // 2 != indices.shape[1]:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit indices of shape {tuple(indices.shape)}")
