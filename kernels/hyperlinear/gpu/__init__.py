"""Products with compressed weights on a GPU, through Triton (or its interpreter).

``linear`` is the way in: it takes the path that the table names, or one that is given. No path waits for the device,
keeps state between calls, or sums in an order that changes, so that products can be captured into CUDA graphs and
give the same bits each time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.hyperlinear.gpu import activations, decode, product
from kernels.hyperlinear.gpu.paths import Path, choose
from kernels.hyperlinear.gpu.product import SUPPORTED
from kernels.hyperlinear.gpu.weight import CompressedWeight


def linear(
    x: Tensor, weight: CompressedWeight, bias: Tensor | None, *, int8: bool = False, path: Path | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``x`` (…, in), fp32, fp16 or bf16, times the transposed weight, plus ``bias``: (…, out) in ``x``'s dtype.

    ``int8``: allows paths whose operands are int8, activations with a scale a token. ``path``: instead of the table's.
    ``out``: where to write, (rows of x, out), dense rows, of ``x``'s dtype. Raises TypeError for another dtype.
    """
    if x.dtype not in SUPPORTED:
        raise TypeError(f"the kernels multiply {', '.join(map(str, SUPPORTED))}, not {x.dtype}")
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    rows, shape = flat.shape[0], (*x.shape[:-1], weight.out_features)
    if path is None and rows:
        weights = weight.out_features * weight.columns
        path = choose(weight.name, x.dtype, rows, weights, int8, x.device)
    if out is None:
        if path is not None and path.way == "decode":
            return _library(flat, weight, bias, path, None).view(shape)
        out = torch.empty((rows, weight.out_features), dtype=x.dtype, device=x.device)
    if path is not None and rows:
        _fill(out, flat, weight, bias, path)
    return out.view(shape)


def _fill(out: Tensor, x: Tensor, weight: CompressedWeight, bias: Tensor | None, path: Path) -> None:
    if path.tile is None:
        _library(x, weight, bias, path, out)
    elif path.int8:
        weight = product.int8_weight(weight)
        plain = weight if path.decode is None else decode.levels(weight, path.decode)
        quantised, scales = activations.quantise(x, weight.block, weight.signs)
        product.fill(out, quantised, plain, bias, path.tile, warps=path.warps, stages=path.stages, x_scales=scales)
    else:
        product.fill(out, _rotated(x, weight), weight, bias, path.tile, warps=path.warps, stages=path.stages)


def _library(x: Tensor, weight: CompressedWeight, bias: Tensor | None, path: Path, out: Tensor | None) -> Tensor:
    """Decode once, then the library's product."""
    if path.decode is None:
        raise ValueError("a path that decodes needs a tile to decode")
    scratch = torch.empty((weight.out_features, weight.columns), dtype=x.dtype, device=x.device)
    decode.fill(scratch, weight, path.decode)
    turned = _rotated(x, weight)
    if out is None:
        return F.linear(turned, scratch, None if bias is None else bias.to(x.dtype))
    if bias is None:
        return torch.mm(turned, scratch.t(), out=out)
    return torch.addmm(bias.to(x.dtype), turned, scratch.t(), out=out)


def _rotated(x: Tensor, weight: CompressedWeight) -> Tensor:
    return x if weight.signs is None else activations.rotate(x, weight.block, weight.signs)


__all__ = ["SUPPORTED", "CompressedWeight", "Path", "linear"]
