"""Write ``orbit.json`` anew: ``python -m tests.kernels.golden.make_orbit``. Only a new version of the format may."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels.codec import orbit, orbit_naive
from kernels.codec.orbit import Plan
from kernels.codec.orbit_tables import BITS, LAWS, table

CASES: tuple[tuple[int, tuple[int, ...], int, torch.dtype, Plan], ...] = (
    (3, (2, 11), 11, torch.float32, Plan(0)),
    (4, (3, 2, 8), 16, torch.float32, Plan(0, block=16)),
    (4, (2, 300), 300, torch.float32, Plan(2, threshold=3.0)),
    (5, (3, 12), 12, torch.float16, Plan(1, block=4, seed=(1 << 64) - 1)),
    (6, (9,), 9, torch.bfloat16, Plan(2, threshold=2.0)),
    (4, (2, 280), 280, torch.float32, Plan(1, threshold=4.0)),
)


def main() -> None:
    """Code the cases by the naive version and write what a decoder must make of them."""
    cases: list[dict[str, Any]] = []
    for number, (k, shape, columns, dtype, plan) in enumerate(CASES):
        rng = np.random.default_rng(number)
        weight = torch.from_numpy(rng.standard_t(4, shape).astype(np.float32) * np.float32(0.05))
        if number == 5:
            weight[1, 270] = 1e30  # so that the outliers need fp32
            weight[0, 3] = 7.0
        weight = weight.to(dtype)
        encoded = orbit_naive.encode(weight, k, plan, columns=columns)
        cases.append(
            {
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "constants": encoded.constants(),
                "threshold": plan.threshold if plan.threshold < math.inf else None,
                "weight": [float(value).hex() for value in weight.flatten().tolist()],
                "stream": base64.b64encode(encoded.stream().numpy().tobytes()).decode(),
                "levels": orbit.codes_to_levels(encoded).tolist(),
                "decoded": [float(value).hex() for value in orbit_naive.decode(encoded).flatten().tolist()],
            }
        )
    tables = {
        f"{k} {name}": hashlib.sha256(table(k, law).levels.tobytes()).hexdigest()
        for k in BITS
        for law, name in enumerate(LAWS)
    }
    path = Path(__file__).with_name("orbit.json")
    path.write_text(json.dumps({"tables": tables, "cases": cases}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
