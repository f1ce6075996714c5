"""The shipped kernels compiled for Hopper without a GPU: which matrix instructions, registers and spills they get.

Run in a process without TRITON_INTERPRET: ``python -m benchmarks gpu-compile``.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.hyperlinear.gpu import paths, product
from kernels.hyperlinear.gpu.paths import Path as KernelPath
from kernels.hyperlinear.gpu.weight import BIRKHOFF, LATTICE, ORBIT

_POINTERS = {"x_scales": "fp32", "scales": "fp32", "values": "fp32", "bias": "fp32", "index": "i64"}
_ALIGNED = ("x", "codes", "out", "in_features", "x_row_stride", "code_stride")


def run(forms: tuple[str, ...] = paths.FORMS) -> Iterator[dict[str, Any]]:
    """A row for each product kernel of the H100's table that has one. What does not compile raises Triton's error."""
    wanted = dict.fromkeys(
        (form, operands, entry.path) for entry in paths.shipped()["NVIDIA H100"]
        for form, operands in itertools.product(entry.forms, entry.operands)
        if entry.path.tile is not None and form in forms
    )  # fmt: skip
    for form, operands, path in wanted:
        began = time.perf_counter()
        kernel = triton.compile(
            source(form, operands, path), target=GPUTarget("cuda", 90, 32),
            options={"num_warps": path.warps, "num_stages": path.stages},
        )  # fmt: skip
        text = kernel.asm["ptx"]
        yield {
            "form": form, "operands": operands, "path": f"{path.way} {path.tile}", "warps": path.warps,
            "stages": path.stages, "seconds": time.perf_counter() - began, "wgmma": text.count("wgmma.mma_async"),
            "mma_sync": text.count("mma.sync"), "shared_bytes": kernel.metadata.shared, **_resources(text),
        }  # fmt: skip


def source(form: str, operands: str, path: KernelPath) -> ASTSource:
    """The product kernel as Triton's compiler takes it, with the arguments that SAM's layers give."""
    assert path.tile is not None
    number, bits = (BIRKHOFF, 0) if form == "birkhoff" else (LATTICE, 0) if form == "lattice" else (ORBIT, int(form[5]))
    if path.way == "int8_decode":
        number, bits = LATTICE, 0
    real = "fp32" if operands == "float32" else "bf16"
    pointers = _POINTERS | {
        "x": "i8" if path.int8 else real, "out": real, "codes": {BIRKHOFF: "i16", LATTICE: "i8", ORBIT: "u8"}[number],
        "table": "i8" if number != BIRKHOFF else "i16" if path.int8 else "i64",
    }  # fmt: skip
    constants = {
        "FORM": number, "BITS": bits, "BLOCK_ROWS": path.tile[0], "BLOCK_OUT": path.tile[1], "BLOCK_IN": path.tile[2],
        "GROUP": 8, "CORRECTED": False, "WIDEN": False,
    }  # fmt: skip
    kernel = product._product_kernel
    if not isinstance(kernel, triton.JITFunction):
        raise SystemExit("TRITON_INTERPRET is set: nothing is compiled")
    names = kernel.arg_names

    def kind(name: str) -> str:
        if name in pointers:
            return "*" + pointers[name]
        return "constexpr" if name in constants else "fp32" if name == "step" else "i32"

    return ASTSource(
        kernel,
        {name: kind(name) for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in _ALIGNED},
    )


def _resources(text: str) -> dict[str, int]:
    """Registers of a thread, and bytes that it spills, from the assembler that Triton brings."""
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(text)
        said = subprocess.run(
            [assembler, "-v", "--gpu-name=sm_90a", file, "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
    numbers = {"registers": r"Used (\d+) registers", "spilled_bytes": r"(\d+) bytes spill stores"}
    return {name: int(found[1]) if (found := re.search(form, said)) else -1 for name, form in numbers.items()}
