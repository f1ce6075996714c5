"""Products with compressed weights on a GPU beside their peers: layers of SAM-B, L and H, and the whole SAM-H encoder.

Nothing is timed before every kernel configuration for the device has passed against float64. A time is the median of
replays of a CUDA graph that goes round several copies of a layer, so that weights come from memory and no launch is
waited for. The floor is the larger of bytes over the measured bandwidth and operations over the measured rate.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import gpu_check, gpu_encoder
from benchmarks.record import append
from kernels.hyperlinear.gpu import CompressedWeight, Path, linear, paths
from kernels.hyperlinear.gpu.paths import FORMS, choose
from kernels.hyperlinear.gpu.tune import device_seconds, random_weight, wall_seconds

#: Seconds in all; what does not fit any more is left out, and said.
LIMIT = 460.0
_WIDTHS = {"sam_vit_b": 768, "sam_vit_l": 1024, "sam_vit_h": 1280}
#: The paper's kernel: a program a tile, indices decoded through fp32 arithmetic and multiplied in fp32.
_PUBLISHED = Path("fused", tile=(64, 64, 32))
_L2_BYTES = 100 << 20


@dataclass(frozen=True)
class Machine:
    """What a device reaches: bytes a second of a copy (read and written), operations a second of large products."""

    copy: float
    bf16: float
    int8: float

    @classmethod
    def measured(cls, device: torch.device, timer: Callable[..., float], *, side: int = 8192) -> Machine:
        """Of this device, with a product of ``side``."""
        source = torch.randn(side * side, device=device)
        target = torch.empty_like(source)
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        small, other = (torch.randint(-127, 128, (side, side), device=device, dtype=torch.int8) for _ in range(2))
        operations = 2.0 * side**3
        return cls(
            2 * source.nbytes / timer(lambda: target.copy_(source)),
            operations / timer(lambda: a @ b),
            operations / timer(lambda: torch._int_mm(small, other.t())),
        )


def shapes(smoke: bool) -> Iterator[tuple[str, int, int, int]]:
    """model, rows, out, in: image tokens, whole and in 25 windows of 14 × 14, and the mask decoder's."""
    if smoke:
        yield from (("smoke", 20, 48, 32), ("smoke", 7, 32, 32))
        return
    for model, width in _WIDTHS.items():
        # Attention within windows pads 64 × 64 tokens to 25 windows; the MLP sees the tokens alone.
        for rows, out, columns in (
            (4900, 3 * width, width), (4900, width, width), (4096, 3 * width, width), (4096, width, width),
            (4096, 4 * width, width), (4096, width, 4 * width),
        ):  # fmt: skip
            yield model, rows, out, columns
    for rows in (7, 64):
        for out, columns in ((256, 256), (128, 256), (2048, 256), (256, 2048)):
            yield "decoder", rows, out, columns


def run(*, smoke: bool, encoder: bool = True) -> Iterator[dict[str, Any]]:
    """Rows of the three tables as measured, ``table`` saying which. ``smoke``: tiny, anywhere, not recorded."""
    began = time.monotonic()
    if not smoke and not torch.cuda.is_available():
        raise SystemExit("the GPU benchmark needs a CUDA device; --smoke tries out its procedure without one")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    tables = [key for key in paths.shipped() if name.startswith(key)] or ["any"]
    checked = gpu_check.SMOKE if smoke else gpu_check.TIMED
    if found := list(gpu_check.failures(device, checked, halves=(torch.bfloat16,), tables=tables)):
        raise SystemExit("nothing was timed: " + "; ".join(f"{what}: {error:.2e}" for what, error in found))
    timer = device_seconds if device.type == "cuda" else wall_seconds
    machine = Machine.measured(device, timer, side=64 if smoke else 8192)

    def left() -> float:
        return LIMIT - (time.monotonic() - began)

    def given(table: str, row: dict[str, Any]) -> dict[str, Any]:
        if not smoke:
            append(table, row)
        return {"table": table, **row}

    rows = []
    forms = ("lattice", "orbit4") if smoke else FORMS
    for model, count, out, columns in shapes(smoke):
        # The encoder's part is the longer one.
        if encoder and left() < LIMIT / 2:
            yield {"table": "left out", "model": model, "rows": count, "out": out, "in": columns}
            continue
        for row in _layer(model, count, out, columns, forms, device, timer, machine, smoke):
            rows.append(row)
            yield given("gpu_layers", row)
    for row in _summary(rows):
        yield given("gpu_summary", row)
    if encoder:
        for row in gpu_encoder.run(device, smoke=smoke, left=left):
            yield given("gpu_encoder", row) if "images_per_s" in row else {"table": "left out", **row}


def _layer(
    model: str, rows: int, out: int, columns: int, forms: Sequence[str], device: torch.device,
    timer: Callable[..., float], machine: Machine, smoke: bool,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The peers' times at a shape, then ours with each form and arithmetic."""
    copies = 1 if smoke else max(2, min(8, _L2_BYTES // (2 * out * columns)))
    xs = [torch.randn(rows, columns, device=device, dtype=torch.bfloat16) for _ in range(copies)]
    wide = [x.float() for x in xs]
    bias = torch.randn(out, device=device)
    half_bias = bias.to(torch.bfloat16)
    denses = [torch.randn(out, columns, device=device, dtype=torch.bfloat16) / math.sqrt(columns) for _ in xs]
    peers = {
        "bf16": timer(*[functools.partial(F.linear, x, w, half_bias) for x, w in zip(xs, denses, strict=True)]),
        "fp32": timer(*[functools.partial(F.linear, x, w.float(), bias) for x, w in zip(wide, denses, strict=True)]),
    }
    published = random_weight("birkhoff", out, columns, device)
    peers["published"] = timer(functools.partial(linear, wide[0], published, bias, path=_PUBLISHED))
    peers |= _torchao(xs, denses, half_bias, timer)
    for form in forms:
        weights = [random_weight(form, out, columns, device) for _ in xs]
        for int8 in (False, True):
            calls = [functools.partial(linear, x, w, bias, int8=int8) for x, w in zip(xs, weights, strict=True)]
            path = choose(form, torch.bfloat16, rows, out * columns, int8, device)
            if int8 and not path.int8:
                continue  # the table takes the other path for both
            seconds = timer(*calls)
            floor = _floor(weights[0], xs[0], machine, int8)
            yield {
                "model": model, "rows": rows, "out": out, "in": columns, "form": form,
                "arithmetic": "int8" if int8 else "bf16", "way": path.way, "microseconds": 1e6 * seconds,
                "floor_microseconds": 1e6 * floor, "floor_share": floor / seconds,
                **{f"{name}_microseconds": 1e6 * peers.get(name, math.nan) for name in _PEERS},
                **{f"times_{name}": peers.get(name, math.nan) / seconds for name in _PEERS},
            }  # fmt: skip


_PEERS = ("bf16", "fp32", "published", "torchao_int8", "torchao_int4")


def _floor(weight: CompressedWeight, x: Tensor, machine: Machine, int8: bool) -> float:
    """Seconds that no kernel can beat: compressed weight, activations and result moved once, or all products made."""
    moved = weight.codes.nbytes + x.nbytes + x.shape[0] * weight.out_features * x.element_size()
    operations = 2.0 * x.shape[0] * weight.out_features * weight.columns
    return max(moved / machine.copy, operations / (machine.int8 if int8 else machine.bf16))


def _torchao(
    xs: Sequence[Tensor], denses: Sequence[Tensor], bias: Tensor, timer: Callable[..., float]
) -> dict[str, float]:
    """Torchao's weight-only layers where it is installed: seconds by name."""
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        return {}
    found = {}
    for name, config in (("torchao_int8", Int8WeightOnlyConfig), ("torchao_int4", Int4WeightOnlyConfig)):
        layers = []
        for dense in denses:
            layer = nn.Linear(dense.shape[1], dense.shape[0], device=dense.device, dtype=dense.dtype)
            layer.weight.data.copy_(dense)
            layer.bias.data.copy_(bias)
            model = nn.Sequential(layer)
            try:
                quantize_(model, config())
            except (ImportError, RuntimeError, ValueError, AssertionError) as error:
                print(f"{name} does not take {tuple(dense.shape)}: {error}")
                break
            layers.append(model)
        else:
            with torch.no_grad():
                found[name] = timer(*[functools.partial(m, x) for m, x in zip(layers, xs, strict=True)])
    return found


def _summary(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Geometric means over all shapes, and the least over any, by form and arithmetic."""
    for form, arithmetic in dict.fromkeys((row["form"], row["arithmetic"]) for row in rows):
        chosen = [row for row in rows if row["form"] == form and row["arithmetic"] == arithmetic]
        yield {
            "form": form, "arithmetic": arithmetic, "shapes": len(chosen),
            **{f"times_{name}": _mean([row[f"times_{name}"] for row in chosen]) for name in _PEERS},
            "least_times_bf16": min(row["times_bf16"] for row in chosen),
            "floor_share": _mean([row["floor_share"] for row in chosen]),
        }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    """Geometric mean of those that were measured; NaN of none."""
    known = [math.log(value) for value in values if not math.isnan(value)]
    return math.exp(sum(known) / len(known)) if known else math.nan
