"""Every shipped kernel configuration once, against float64: what the GPU benchmark demands before it times anything.

``python -m benchmarks.gpu_check`` runs it alone, for compute-sanitizer too (see gpu_sanitizer.sh): sizes are small.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels.hyperlinear import orbit
from kernels.hyperlinear.gpu import CompressedWeight, linear, paths
from kernels.hyperlinear.gpu.tune import random_weight
from kernels.hyperlinear.gpu.weight import BIRKHOFF, LATTICE

#: Relative RMS error allowed, by operands.
BOUNDS = {"float32": 2e-6, "half": 8e-3, "int8": 2e-2}
Shapes = Sequence[tuple[int, int, int]]
#: rows, out, in: no multiples of a tile, and the last rows of 25 × 196.
SHAPES: Shapes = ((1, 20, 33), (36, 129, 264), (4900 % 128, 200, 384))
#: One shape whose rows are multiples of 16 bytes, as SAM's: the kernels that are timed are those that are checked.
TIMED: Shapes = ((4900 % 128, 200, 384),)
SMOKE: Shapes = ((4, 20, 40),)


def dense(weight: CompressedWeight) -> Tensor:
    """The weight in the basis of its codes, float64 (out, in), by plain torch operations."""
    if weight.form == BIRKHOFF:
        assert weight.table is not None
        return weight.table[weight.codes.long()].view(torch.float32)[:, : weight.columns].double()
    if weight.form == LATTICE:
        return weight.codes.double() * weight.step
    assert weight.table is not None
    assert weight.scales is not None
    symbols = orbit.unpack(weight.codes, weight.bits, weight.columns).long()
    before = torch.nn.functional.pad(symbols[:, :-1], (1, 0))
    return weight.table.double()[before << weight.bits | symbols] * weight.scales.double()[:, None]


def expected(x: Tensor, weight: CompressedWeight, bias: Tensor) -> Tensor:
    """The product in float64."""
    wide = x.double()
    if weight.signs is not None:
        wide = orbit.rotated(wide, weight.block, weight.signs)
    return torch.nn.functional.linear(wide, dense(weight), bias.double())


def failures(
    device: torch.device, shapes: Shapes, *, halves: Sequence[torch.dtype] = (torch.bfloat16, torch.float16),
    tables: Sequence[str] | None = None,
) -> Iterator[tuple[str, float]]:  # fmt: skip
    """Name and error of what is beyond its bound, as it is found. ``tables``: devices of the table; default all."""
    table = paths.shipped()
    configurations = dict.fromkeys(
        (form, operands, entry.path) for name in tables or table for entry in table[name]
        for form, operands in itertools.product(entry.forms, entry.operands)
    )  # fmt: skip
    for form, operands, path in configurations:
        for dtype in (torch.float32,) if operands == "float32" else halves:
            for rows, out_features, in_features in shapes:
                weight = random_weight(form, out_features, in_features, device)
                x = torch.randn(rows, in_features, device=device).to(dtype)
                bias = torch.randn(out_features, device=device)
                out = torch.full((rows, out_features), torch.nan, dtype=dtype, device=device)
                linear(x, weight, bias, path=path, out=out)
                wanted = expected(x, weight, bias)
                error = float((out.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
                # NaN is not within any bound.
                if not error <= BOUNDS["int8" if path.int8 else operands]:
                    yield f"{form} {dtype} {path} {rows}×{out_features}×{in_features}", error


def main() -> None:
    """Check; leaves with exit code 1 and the names of what failed."""
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if found := list(failures(place, SHAPES if place.type == "cuda" else SMOKE)):
        raise SystemExit("\n".join(f"{name}: relative error {error:.2e}" for name, error in found))
    print(f"every shipped configuration is within its bound on {place}")


if __name__ == "__main__":
    main()
