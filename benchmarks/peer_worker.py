"""Other projects' weight compressors on a state dict. Runs in an environment of its own, see ``peers``.

    python peer_worker.py WEIGHTS.safetensors OUT_FOLDER

``WEIGHTS`` holds matrices (out, in). For each method ``OUT_FOLDER/NAME.safetensors`` gets the dequantised fp32
matrices, and standard output a line of JSON: name, bits a weight (of the tensors that the library keeps, everything
counted), seconds. A method that does not run says so, with the reason.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Coder = Callable[[Tensor], tuple[Tensor, int]]
"""A matrix to its dequantised self and the bits that it takes."""


def _bits(*tensors: Tensor | None) -> int:
    return sum(8 * t.nbytes for t in tensors if t is not None)


def _inner(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor subclass keeps, however deep."""
    if type(tensor) in (Tensor, nn.Parameter):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [each for name in names for each in _inner(getattr(tensor, name))]


def _layer(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def torchao(bits: int) -> Coder:
    """Weight-only quantisation: int8 with a scale a row, int4 in groups of 128 (or what divides the row)."""
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    def code(weight: Tensor) -> tuple[Tensor, int]:
        layer = _layer(weight)
        group = next((g for g in (128, 64, 32, 16) if weight.shape[1] % g == 0), weight.shape[1])
        config = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(group))
        quantize_(layer, config)
        kept = _inner(layer.weight)
        # Int4 levels lie in int8 tensors here; packed they would take half of that.
        shares = [bits / 8 if t.dtype == torch.int8 and t.numel() == weight.numel() else 1 for t in kept]
        size = sum(8 * t.nbytes * share for t, share in zip(kept, shares, strict=True))
        return layer.weight.dequantize().float(), int(size)

    return code


def quanto(bits: int) -> Coder:
    """optimum-quanto's qint8 and qint4, frozen."""
    from optimum.quanto import freeze, qint4, qint8, quantize

    def code(weight: Tensor) -> tuple[Tensor, int]:
        model = nn.Sequential(_layer(weight))
        quantize(model, weights=qint8 if bits == 8 else qint4)
        freeze(model)
        made = model[0].weight
        if bits == 8:
            return made.dequantize().float(), _bits(made._data, made._scale)
        packed = made._data._data if hasattr(made._data, "_data") else made._data
        return made.dequantize().float(), _bits(packed, made._scale, made._shift)

    return code


def hqq(bits: int, group: int) -> Coder:
    """HQQ, its own optimiser of zero points, groups along the row."""
    from hqq.core.quantize import Quantizer

    def code(weight: Tensor) -> tuple[Tensor, int]:
        levels, meta = Quantizer.quantize(weight.clone(), nbits=bits, group_size=group, axis=1, device="cpu",
                                          compute_dtype=torch.float32)  # fmt: skip
        size = _bits(levels) + sum(16 * meta[name].numel() for name in ("scale", "zero"))
        return Quantizer.dequantize(levels, meta).float(), size

    return code


def nf4(block: int) -> Coder:
    """Bitsandbytes' NF4, absolute maxima in fp32."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    def code(weight: Tensor) -> tuple[Tensor, int]:
        # A block a row: where a block goes on in the next row, its code for CPUs (0.50) gives back other values.
        rows = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % block)).view(-1, block)
        levels, state = quantize_4bit(rows, blocksize=block, quant_type="nf4")
        dense = dequantize_4bit(levels, state).float().flatten()[: weight.numel()]
        return dense.view(weight.shape), _bits(levels, state.absmax)

    return code


METHODS: dict[str, tuple[str, Callable[[], Coder]]] = {
    "torchao int8": ("torchao", lambda: torchao(8)),
    "torchao int4 g128": ("torchao", lambda: torchao(4)),
    "quanto int8": ("optimum-quanto", lambda: quanto(8)),
    "quanto int4": ("optimum-quanto", lambda: quanto(4)),
    "hqq4 g64": ("hqq", lambda: hqq(4, 64)),
    "nf4 g64": ("bitsandbytes", lambda: nf4(64)),
}


def run(weights: dict[str, Tensor], folder: Path) -> Iterator[dict[str, object]]:
    """Each method on all matrices."""
    for name, (package, make) in METHODS.items():
        row: dict[str, object] = {"method": name, "package": package}
        try:
            row["version"] = version(package)
            code = make()
            began = time.perf_counter()
            made = {key: code(weight) for key, weight in weights.items()}
            row["seconds"] = time.perf_counter() - began
            save_file({key: dense.contiguous() for key, (dense, _) in made.items()}, folder / f"{name}.safetensors")
            row["bits_per_weight"] = sum(bits for _, bits in made.values()) / sum(w.numel() for w in weights.values())
        except Exception as error:  # whatever a peer meets is told and does not end the others
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        yield row


if __name__ == "__main__":
    for line in run(load_file(sys.argv[1]), Path(sys.argv[2])):
        print(json.dumps(line), flush=True)
