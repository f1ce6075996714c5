"""One way of running SAM's image encoder, in a process of its own: ``encoder`` tells it when.

Runs under the Python of other projects too.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.turns import clocked, serve

Run = Callable[[torch.Tensor], torch.Tensor]
SIDE = 1024
"""Pixels of the official models' pictures."""


def official(variant: str, checkpoint: Path) -> torch.nn.Module:
    """segment-anything's own image encoder."""
    from segment_anything import sam_model_registry

    encoder: torch.nn.Module = sam_model_registry[variant.removeprefix("sam_")](checkpoint=checkpoint).image_encoder
    return encoder.eval().requires_grad_(False)


def ready(method: str, variant: str, folder: Path, threads: int) -> tuple[Run, int]:
    """The encoder, fp32 in and out, and the bytes of its weights."""
    checkpoint = folder / f"{variant}_random.pth"
    if method.startswith("ort"):
        return _onnx(method, variant, checkpoint, folder, threads)
    kind = torch.float32 if method.endswith("fp32") else torch.bfloat16
    if method.startswith("official") or method == "torchao int8":
        encoder = official(variant, checkpoint).to(kind)
        if method == "torchao int8":
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            quantize_(encoder, Int8WeightOnlyConfig())
        held = sum(t.numel() * t.element_size() for t in [*encoder.parameters(), *encoder.buffers()])
        return lambda x: encoder(x.to(kind)).float(), held
    from hypersam.loading import load_model
    from kernels.hyperlinear import allow_int8

    _, form, arithmetic = method.split()
    path = checkpoint if form == "dense" else folder / f"{variant}_{form.removesuffix('-stream')}.hsam"
    model = load_model(path, device="cpu", dtype=kind, resident="stream" if form.endswith("-stream") else "levels")
    own = model.network.image_encoder
    allow_int8(own, arithmetic == "int8")
    held = sum(t.numel() * t.element_size() for t in [*own.parameters(), *own.buffers()])
    return lambda x: own(x.to(kind)).float(), held


def _onnx(method: str, variant: str, checkpoint: Path, folder: Path, threads: int) -> tuple[Run, int]:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, small = folder / f"{variant}_fp32.onnx", folder / f"{variant}_int8.onnx"
    if not plain.exists():
        torch.onnx.export(
            official(variant, checkpoint), (torch.zeros(1, 3, SIDE, SIDE),), str(plain), dynamo=False, opset_version=17
        )
    if method == "ort int8" and not small.exists():
        quantize_dynamic(plain, small, weight_type=QuantType.QInt8)
    path = small if method == "ort int8" else plain
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0]), path.stat().st_size


def main() -> None:
    """``encoder_worker METHOD VARIANT FOLDER THREADS``."""
    method, variant, folder, threads = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(threads)
    run, held = ready(method, variant, folder, threads)
    x = torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embedding = run(x)
        np.save(folder / f"{method.replace(' ', '_')}.npy", embedding.numpy())

        def turn() -> dict[str, float]:
            wall, cpu = clocked(lambda: run(x))
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            return {"wall": wall, "cpu": cpu, "peak_mb": peak}

        serve({"weights_mb": held / 1e6}, turn)


if __name__ == "__main__":
    main()
