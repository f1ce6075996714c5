from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from hypersam.errors import InvalidOption
from hypersam.report_plot import fidelity_table, tensor_table, write_plot

pytest.importorskip("matplotlib")


def report(*, fidelity: bool = True, sensitivity: float | None = 0.5) -> dict[str, Any]:
    row = {"mask_iou": 0.97, "margin": 0.01, "worst_tenth": 0.8, "by_kind": {"point": 0.96, "box": 0.98},
           "embedding_cosine": 0.999, "nbytes": 100_000, "ratio": 8.0}  # fmt: skip
    return {
        "variant": "sam_vit_b", "codec": "lattice", "ratio": 8.0, "sqnr_db": 24.0,
        "fp32_bytes": 800_000, "source_bytes": 800_123, "resident_bytes": 200_000, "artifact_bytes": 100_000,
        "tensors": [
            {"name": "a.weight", "shape": [64, 64], "encoding": "lattice", "bits_per_weight": 4.1, "sqnr_db": 23.0,
             "sensitivity": sensitivity},
            {"name": "b.weight", "shape": [64, 32], "encoding": "orbit", "bits_per_weight": 4.0, "sqnr_db": 22.0,
             "sensitivity": None if sensitivity is None else 0.0},
            {"name": "b.bias", "shape": [64], "encoding": "raw", "bits_per_weight": 32.0, "sqnr_db": None,
             "sensitivity": None},
        ],
        "fidelity": {"scenes": 2, "prompts": 20, "side": 224, "full_side": 1024,
                     "models": {"compressed": row, "int8": row}} if fidelity else None,
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".svg", ".png"])
@pytest.mark.parametrize("full", [True, False])
def test_a_report_is_drawn(tmp_path, suffix, full):
    told = report() if full else report(fidelity=False, sensitivity=None)
    path = write_plot(told, tmp_path / f"plot{suffix}")
    content = path.read_bytes()
    assert content[:4] in (b"<?xm", b"\x89PNG")
    if suffix == ".svg":
        assert b"bits a weight" in content
        assert (b"worst tenth" in content) == full
        assert write_plot(told, tmp_path / "again.svg").read_bytes() == content


def test_other_suffixes_are_refused(tmp_path):
    with pytest.raises(InvalidOption, match=r"\.svg"):
        write_plot(report(), tmp_path / "plot.bmp")


def test_tables_say_what_the_report_says():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(tensor_table(report()))
    console.print(fidelity_table(report()["fidelity"]))
    text = console.export_text()
    assert "a.weight" in text
    assert "64×32" in text
    assert "compressed" in text
    assert "0.9700" in text
    assert tensor_table(report(), most=1).row_count == 1
