"""Make ``lattice.json``: golden vectors of the ``lattice`` codec, by its oracle.

``python -m tests.kernels.golden.make_lattice`` writes the file anew. Only for a new version of the format.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from kernels.codec import lattice_naive
from tests.kernels.test_lattice import golden_weight

# Shape, dtype, columns, step, offset, exponent, [flat place, value] changed, row of zeros.
CASES: list[tuple[list[int], str, int, float, float, int, list[list[float]], int | None]] = [
    ([4, 6], "float32", 6, 2.0**-6, 0.0, 13, [[8, 1000.0]], 2),
    ([37], "bfloat16", 37, 0.0123, 0.987, 16, [], None),
    ([132, 129], "float32", 129, 0.035, 0.0, 14, [[5000, -77.5], [130, 3.4e38]], 7),
    ([17, 4100], "float16", 4100, 0.4, 0.0, 14, [[69000, 65504.0]], 3),
]


def main() -> None:
    """Write the vectors beside this program."""
    cases = []
    for seed, (shape, dtype, columns, step, offset, exponent, changes, zero_row) in enumerate(CASES, 1):
        case: dict[str, Any] = {
            "shape": shape, "dtype": dtype, "seed": seed, "exponent": exponent, "changes": changes,
            "zero_row": zero_row, "constants": {"columns": columns},
        }  # fmt: skip
        coded = lattice_naive.encode(golden_weight(case), step, columns=columns, offset=offset)
        dense = lattice_naive.decode(coded, dtype=torch.float32)
        case["constants"] = coded.constants()
        case["decoded_fp32_sha256"] = hashlib.sha256(dense.numpy().astype("<f4").tobytes()).hexdigest()
        if dense.numel() < 100:
            case["decoded"] = dense.reshape(-1).tolist()
        case["stream"] = base64.b64encode(coded.stream().numpy().tobytes()).decode()
        cases.append(case)
    document = {"format": "lattice", "version": 1, "cases": cases}
    Path(__file__).with_name("lattice.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
