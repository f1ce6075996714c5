"""``python -m hypersam.doctor_device DEVICE``: opens the device, compiles a kernel, prints findings as one JSON line.

With a GPU the kernel is compiled for it, run, and its result compared. Without one it is only compiled, for compute
capability 9.0: that shows that Triton and its assembler work here, and nothing of a GPU.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hypersam.errors import HypersamError
from hypersam.findings import Finding, broken, fine, warning
from hypersam.loading import resolve_device
from hypersam.settings import GIB

_WITHOUT_GPU = GPUTarget("cuda", 90, 32)
_LENGTH = 1000


@triton.jit
def _add_one(given, result, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(result + place, tl.load(given + place, mask=place < length) + 1, mask=place < length)


def findings(name: str) -> list[Finding]:
    """Return what is found of the device with that name, and of a kernel compiled for it."""
    try:
        device = resolve_device(name)
    except HypersamError as error:
        return [broken("device", str(error), "set HYPERSAM_DEVICE to auto or cpu, or make the GPU visible here (a "
                       "container needs NVIDIA's container toolkit and a reservation)")]  # fmt: skip
    if device.type == "cpu":
        return [_cpu(name), kernel(device)]
    try:
        free, total = torch.cuda.mem_get_info(device)
        major, minor = torch.cuda.get_device_capability(device)
        title = torch.cuda.get_device_name(device)
    except RuntimeError as error:
        return [broken("device", f"{device} cannot be opened: {error}", "see whether nvidia-smi works, and whether the "
                       "driver is new enough for this torch")]  # fmt: skip
    says = f"{title}, compute capability {major}.{minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
    facts = {"type": "cuda", "name": title, "capability": [major, minor], "free_bytes": free, "total_bytes": total,
             "cuda": torch.version.cuda}  # fmt: skip
    return [fine("device", says, **facts), kernel(device)]


def _cpu(name: str) -> Finding:
    threads = torch.get_num_threads()
    says = f"the processor, {threads} threads"
    if name == "auto" and torch.version.cuda is not None:
        return fine("device", f"{says}; no CUDA device is visible", type="cpu", threads=threads)
    return fine("device", says, type="cpu", threads=threads)


def kernel(device: torch.device) -> Finding:
    """Compile a kernel; on a GPU run it too."""
    began = time.perf_counter()
    try:
        if device.type == "cpu":
            signature = {"given": "*fp32", "result": "*fp32", "length": "i32", "BLOCK": "constexpr"}
            source = ASTSource(_add_one, signature=signature, constexprs={"BLOCK": 256})
            made = triton.compile(source, target=_WITHOUT_GPU)
            right = ".target sm_90" in made.asm["ptx"] and len(made.asm["cubin"]) > 0
        else:
            with torch.cuda.device(device):
                given = torch.arange(_LENGTH, dtype=torch.float32, device=device)
                result = torch.full_like(given, float("nan"))
                _add_one[(triton.cdiv(_LENGTH, 256),)](given, result, _LENGTH, BLOCK=256)
                right = torch.equal(result, given + 1)
    except Exception as error:  # whatever Triton, its assembler, the C compiler or the driver raise
        bad = broken if device.type == "cuda" else warning
        return bad("kernel", f"Triton cannot compile: {type(error).__name__}: {error}"[:500],
                   "see what is said of the compiler and the kernel cache; install triton anew")  # fmt: skip
    took = time.perf_counter() - began
    if not right:
        return broken("kernel", "a compiled kernel gives a wrong result", "update the driver; do not trust this device")
    how = "compiled for compute capability 9.0, not run" if device.type == "cpu" else "compiled and run"
    return fine("kernel", f"{how} in {took:.1f} s", seconds=round(took, 3), run=device.type == "cuda")


if __name__ == "__main__":
    sys.stdout.write(json.dumps([finding.as_dict() for finding in findings(sys.argv[1])]) + "\n")
