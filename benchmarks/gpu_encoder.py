"""The whole image encoder of SAM-H from compressed weights beside the same encoder with dense ones.

The dense twin holds what the compressed weights decode to, in bf16, with the same attention. Other tensors are random.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import random_sam
from hypersam.sam.families.decoder import DecoderConfig
from hypersam.sam.families.sam_vit import ImageEncoder, SamViTConfig
from kernels.hyperlinear import HyperLinear, allow_int8
from kernels.hyperlinear.gpu.tune import random_weight
from kernels.hyperlinear.gpu.weight import BIRKHOFF, LATTICE
from kernels.hyperlinear.module import BirkhoffLinear, LatticeLinear, OrbitLinear
from kernels.hyperlinear.orbit import Weight

_SMOKE = SamViTConfig(
    image_size=64, patch=16, embed_dim=32, heads=2, mlp_dim=64, windows=(2, 0),
    decoder=DecoderConfig(
        dim=16, mask_in_chans=4, multimask_outputs=3, depth=1, mlp_dim=32, iou_depth=2, iou_hidden=16
    ),
)  # fmt: skip
#: Seconds that must remain for a comparison to begin.
_NEEDED = {"eager": 20.0, "graph": 20.0, "compiled": 100.0}


def run(device: torch.device, *, smoke: bool, left: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """Rows of images a second, peak memory, and how near the embedding is to the dense one; without ``images_per_s``
    what there was no time for. ``left``: seconds that remain.
    """
    config = _SMOKE if smoke else random_sam.config("sam_vit_h")
    for form in ("orbit4", "lattice", "birkhoff"):
        torch.manual_seed(0)
        encoder = _compressed(config, form, device)
        for batch, mode in ((1, "eager"), (1, "graph"), (1, "compiled"), (8, "eager"), (8, "graph")):
            # Graphs need a device; the compiler takes its time, so one form stands for all.
            if (smoke and mode != "eager") or (mode == "compiled" and form != "orbit4"):
                continue
            name = {"model": "smoke" if smoke else "sam_vit_h", "form": form, "batch": batch, "mode": mode}
            if left() < _NEEDED[mode] and not smoke:
                yield name
                continue
            yield from ({**name, **row} for row in _compared(encoder, config, batch, mode, device))
        del encoder


def _compared(
    encoder: ImageEncoder, config: SamViTConfig, batch: int, mode: str, device: torch.device
) -> Iterator[dict[str, Any]]:
    """The dense twin, then the compressed encoder without int8 and with it. Memory is given as if each were alone."""
    pixels = torch.randn(batch, 3, config.image_size, config.image_size, device=device, dtype=torch.bfloat16)
    twin = _dense(encoder, config, device)
    held = sum(t.nbytes for t in (*encoder.parameters(), *encoder.buffers())) / 1e6
    dense_seconds, peak, target = _measured(twin, pixels, mode)
    del twin
    measured = {"dense": (dense_seconds, peak - held, target)}
    for arithmetic in ("bf16", "int8"):
        allow_int8(encoder, arithmetic == "int8")
        measured[arithmetic] = _measured(encoder, pixels, mode)
    allow_int8(encoder, False)
    for arithmetic, (seconds, peak, got) in measured.items():
        yield {
            "arithmetic": arithmetic, "images_per_s": batch / seconds, "times_dense": dense_seconds / seconds,
            "peak_mb": peak, "cosine_with_dense": _cosine(got, target),
        }  # fmt: skip


def _measured(encoder: ImageEncoder, pixels: Tensor, mode: str) -> tuple[float, float, Tensor]:
    """Median seconds of a pass, peak memory in MB and the embedding."""
    cuda = pixels.is_cuda
    # Blocks are alike, so that the compiler meets two of them and not 32: with windows and without.
    blocks: list[Any] = list(encoder.blocks) if mode == "compiled" else []
    torch._dynamo.reset()
    for block in blocks:
        block.compile(fullgraph=True)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    with torch.inference_mode():
        once: Callable[[], Any] = lambda: encoder(pixels)  # noqa: E731
        result: Tensor = once()
        if mode == "graph":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = encoder(pixels)
            once = graph.replay
        for _ in range(7 if cuda else 1):
            began = time.perf_counter()
            once()
            if cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        got = result.float().cpu()
    peak = torch.cuda.max_memory_allocated() / 1e6 if cuda else math.nan
    for block in blocks:
        block._compiled_call_impl = None
    return sorted(times)[len(times) // 2], peak, got


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), 0))


def _built(config: SamViTConfig, device: torch.device, make: Callable[[str, nn.Linear], nn.Module]) -> ImageEncoder:
    """An encoder whose linear layers ``make`` provides and whose other tensors are random, in bf16."""
    with torch.device("meta"):
        encoder = ImageEncoder(config)
    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(encoder.get_submodule(parent), child, make(name, layer))
    draw = torch.Generator(device).manual_seed(1)
    for module in encoder.modules():
        if isinstance(module, (HyperLinear, nn.Linear)):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = torch.randn(parameter.shape, device=device, generator=draw)
            if parameter.ndim == 4:
                value /= math.sqrt(math.prod(parameter.shape[1:]))
            else:
                value = value * 0.05 + (1.0 if name == "weight" else 0.0)
            setattr(module, name, nn.Parameter(value.to(torch.bfloat16), requires_grad=False))
    return encoder.eval()


def _compressed(config: SamViTConfig, form: str, device: torch.device) -> ImageEncoder:
    def make(_: str, layer: nn.Linear) -> nn.Module:
        weight = random_weight(form, layer.out_features, layer.in_features, device)
        bias = (torch.randn(layer.out_features, device=device) * 0.02).to(torch.bfloat16)
        index = torch.empty(0, dtype=torch.int64, device=device)
        values = torch.empty(0, dtype=torch.int32, device=device)
        if weight.form == BIRKHOFF:
            assert weight.table is not None
            return BirkhoffLinear(layer.in_features, layer.out_features, weight.codes, weight.table, bias)
        if weight.form == LATTICE:
            return LatticeLinear(weight.codes, weight.step, index, values, bias)
        assert weight.table is not None
        assert weight.scales is not None
        assert weight.signs is not None
        scales = weight.scales.view(torch.int32)
        return OrbitLinear(
            Weight(weight.codes, weight.bits, weight.table, scales, weight.block, weight.signs, index, values), bias
        )

    return _built(config, device, make)


def _dense(encoder: ImageEncoder, config: SamViTConfig, device: torch.device) -> ImageEncoder:
    """The twin with dense weights in bf16; the other tensors are drawn alike."""

    def make(name: str, layer: nn.Linear) -> nn.Module:
        held = encoder.get_submodule(name)
        assert isinstance(held, HyperLinear)
        made = nn.Linear(layer.in_features, layer.out_features, device=device, dtype=torch.bfloat16)
        made.weight.data.copy_(held.dense())
        made.bias.data.copy_(held.bias)
        return made.requires_grad_(False)

    return _built(config, device, make)
