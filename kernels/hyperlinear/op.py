"""The custom operators ``hypersam::…_linear``, one a codec: one name for torch.compile, a kernel a device.

They are for inference: no gradient is registered. Every one raises ValueError for an ``x`` of another width and
TypeError for one that is not floating. ``int8`` allows int8 operands, activations with a scale a token, where that is
faster; devices without such a path compute as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.hyperlinear import cpu, cpu_int8, lattice, orbit, stream


class Operator:
    """A custom operator that calls its function directly where there is nothing to dispatch: a plain tensor on the
    CPU, no gradient, no trace. PyTorch's way to the same function takes a tenth of a small model's click, and the first
    time it imports the compiler, which takes a second.
    """

    def __init__(self, name: str, function: Callable[..., Tensor], device_types: str | None) -> None:
        self._function = function
        self._operator = torch.library.custom_op(name, function, mutates_args=(), device_types=device_types)
        self.register_kernel = self._operator.register_kernel
        self.register_fake = self._operator.register_fake

    def __call__(self, x: Tensor, *arguments: Any, **more: Any) -> Tensor:
        """The product with ``x``."""
        plain = type(x) is Tensor and x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled())
        if plain and not torch.compiler.is_compiling():
            return self._function(x, *arguments, **more)
        result: Tensor = self._operator(x, *arguments, **more)
        return result


def _operator(name: str, device_types: str | None = None) -> Callable[[Callable[..., Tensor]], Operator]:
    return lambda function: Operator(name, function, device_types)


@_operator("hypersam::birkhoff_linear")
def birkhoff_linear(x: Tensor, indices: Tensor, pairs: Tensor, bias: Tensor | None, int8: bool = False) -> Tensor:
    """``x`` (…, in) times a compressed weight, plus ``bias``: (…, out) in ``x``'s dtype.

    ``indices``: int16 (out, ⌈in / 2⌉). ``pairs``: int64 (n,), two fp32 weights each. ``bias``: (out,) or None.
    Devices without a kernel of their own take the block-wise product.
    """
    _check_birkhoff(x, indices)
    if int8 and cpu_int8.worth_it(x):
        return cpu_int8.linear(x, cpu.int8_weight(indices, pairs, x.shape[-1]), bias)
    return cpu.linear(x, indices, pairs, bias)


@birkhoff_linear.register_kernel("cuda")
def _birkhoff_cuda(x: Tensor, indices: Tensor, pairs: Tensor, bias: Tensor | None, int8: bool = False) -> Tensor:
    _check_birkhoff(x, indices)
    # Imported where a GPU is at hand: machines without one need no triton.
    from kernels.hyperlinear import gpu

    if x.dtype not in gpu.SUPPORTED:
        return cpu.linear(x, indices, pairs, bias)
    with torch.cuda.device(x.device):
        return gpu.linear(x, gpu.CompressedWeight.birkhoff(indices, pairs, x.shape[-1]), bias, int8=int8)


@birkhoff_linear.register_fake
def _birkhoff_fake(x: Tensor, indices: Tensor, pairs: Tensor, bias: Tensor | None, int8: bool = False) -> Tensor:
    _check_birkhoff(x, indices)
    return x.new_empty((*x.shape[:-1], indices.shape[0]))


@_operator("hypersam::lattice_linear")
def lattice_linear(
    x: Tensor, levels: Tensor, step: float, index: Tensor, values: Tensor, bias: Tensor | None, int8: bool = False
) -> Tensor:
    """``x`` (…, in) times a ``lattice`` weight, plus ``bias``: (…, out) in ``x``'s dtype. See ``lattice``."""
    _check(x, levels.shape[1])
    if int8 and cpu_int8.worth_it(x):
        return cpu_int8.linear(x, lattice.int8_weight(levels, step, index, values), bias)
    return lattice.linear(x, levels, step, index, values, bias)


@lattice_linear.register_kernel("cuda")
def _lattice_cuda(
    x: Tensor, levels: Tensor, step: float, index: Tensor, values: Tensor, bias: Tensor | None, int8: bool = False
) -> Tensor:
    _check(x, levels.shape[1])
    from kernels.hyperlinear import gpu

    if x.dtype not in gpu.SUPPORTED:
        return lattice.linear(x, levels, step, index, values, bias)
    with torch.cuda.device(x.device):
        return gpu.linear(x, gpu.CompressedWeight.lattice(levels, step, index, values), bias, int8=int8)


@lattice_linear.register_fake
def _lattice_fake(
    x: Tensor, levels: Tensor, step: float, index: Tensor, values: Tensor, bias: Tensor | None, int8: bool = False
) -> Tensor:
    _check(x, levels.shape[1])
    return x.new_empty((*x.shape[:-1], levels.shape[0]))


@_operator("hypersam::stream_linear", device_types="cpu")
def stream_linear(
    x: Tensor, words: Tensor, states: Tensor, classes: Tensor, escapes: Tensor, starts: Tensor, columns: int,
    step: float, beta: int, in_features: int, out_features: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """``x`` (…, in) times an entropy-coded weight, plus ``bias``: (…, out) in ``x``'s dtype. See ``stream``."""
    _check(x, in_features)
    held = stream.Stream(words, states, classes, escapes, starts, columns, step, beta)
    return stream.linear(x, held, bias)


@stream_linear.register_fake
def _stream_fake(
    x: Tensor, words: Tensor, states: Tensor, classes: Tensor, escapes: Tensor, starts: Tensor, columns: int,
    step: float, beta: int, in_features: int, out_features: int, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    _check(x, in_features)
    return x.new_empty((*x.shape[:-1], out_features))


@_operator("hypersam::orbit_linear")
def orbit_linear(
    x: Tensor, codes: Tensor, bits: int, table: Tensor, scales: Tensor, block: int, signs: Tensor,
    index: Tensor, values: Tensor, bias: Tensor | None, int8: bool = False,
) -> Tensor:  # fmt: skip
    """``x`` (…, in) times an ``orbit`` weight, plus ``bias``: (…, out) in ``x``'s dtype. See ``orbit``."""
    _check(x, signs.shape[0])
    weight = orbit.Weight(codes, bits, table, scales, block, signs, index, values)
    if int8 and cpu_int8.worth_it(x):
        return cpu_int8.linear(orbit.rotated(x, block, signs), orbit.int8_weight(weight), bias).to(x.dtype)
    return orbit.linear(x, weight, bias)


@orbit_linear.register_kernel("cuda")
def _orbit_cuda(
    x: Tensor, codes: Tensor, bits: int, table: Tensor, scales: Tensor, block: int, signs: Tensor,
    index: Tensor, values: Tensor, bias: Tensor | None, int8: bool = False,
) -> Tensor:  # fmt: skip
    _check(x, signs.shape[0])
    from kernels.hyperlinear import gpu

    if x.dtype not in gpu.SUPPORTED:
        return orbit.linear(x, orbit.Weight(codes, bits, table, scales, block, signs, index, values), bias)
    weight = gpu.CompressedWeight.orbit(codes, bits, table, scales, block, signs, index, values)
    with torch.cuda.device(x.device):
        return gpu.linear(x, weight, bias, int8=int8)


@orbit_linear.register_fake
def _orbit_fake(
    x: Tensor, codes: Tensor, bits: int, table: Tensor, scales: Tensor, block: int, signs: Tensor,
    index: Tensor, values: Tensor, bias: Tensor | None, int8: bool = False,
) -> Tensor:  # fmt: skip
    _check(x, signs.shape[0])
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _check_birkhoff(x: Tensor, indices: Tensor) -> None:
    """``indices`` alone do not tell whether the last column is padding."""
    _check(x, x.shape[-1] if x.dim() and (x.shape[-1] + 1) // 2 == indices.shape[1] else 2 * indices.shape[1])


def _check(x: Tensor, in_features: int) -> None:
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating, not {x.dtype}")
    if x.dim() < 1 or x.shape[-1] != in_features:
        raise ValueError(f"x of shape {tuple(x.shape)} does not fit a weight of {in_features} columns")
