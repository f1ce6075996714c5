"""A compression's report as a picture and as tables, from the report's dictionary alone (``CompressReport.as_dict()``).

The picture needs matplotlib, which is imported when it is drawn; the tables need rich.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hypersam.errors import InvalidOption

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png", ".pdf")
_ENCODINGS = {"lattice": "o", "orbit": "s", "half": "^", "raw": "D", "birkhoff": "P"}
_COLOURS = "viridis"
_ACCENT, _MUTED = "#2a6f97", "#a9b4c2"


def write_plot(report: Mapping[str, Any], path: Path | str) -> Path:
    """Draw a report into ``path`` (SVG, PNG or PDF by its suffix) and return the path.

    Above: bits a weight and SQNR of every tensor in the model's order; a dot grows with its tensor, its colour is the
    sensitivity. Below: sizes, and agreement with the original beside the yardsticks'.
    Raises InvalidOption for another suffix or where matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise InvalidOption(f"a plot is written as {', '.join(FORMATS)}, not {path.suffix or 'without a suffix'!r}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidOption("drawing needs matplotlib: pip install matplotlib") from error
    fidelity = report.get("fidelity")
    # No pyplot: it keeps figures in global state. Fixed ids and no date, so that the same report gives the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "hypersam", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(11, 8.5), layout="constrained")
        grid = figure.add_gridspec(3, 2, height_ratios=(3, 3, 2))
        _tensors(figure.add_subplot(grid[0, :]), report["tensors"], "bits_per_weight", "bits a weight")
        _tensors(figure.add_subplot(grid[1, :]), report["tensors"], "sqnr_db", "SQNR, dB")
        _sizes(figure.add_subplot(grid[2, 0]), report)
        if fidelity:
            _fidelity(figure.add_subplot(grid[2, 1]), fidelity)
        figure.suptitle(_title(report))
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        figure.savefig(path, dpi=150, metadata=metadata)
    return path


def tensor_table(report: Mapping[str, Any], *, most: int | None = None) -> Table:
    """A row a tensor: shape, coding, bits, SQNR, and its sensitivity. ``most``: only the so many largest."""
    table = Table("tensor", "shape", "coding", box=None)
    for heading in ("bits", "SQNR dB", "sensitivity"):
        table.add_column(heading, justify="right")
    rows = list(report["tensors"])
    if most is not None:
        largest = sorted(rows, key=lambda row: -math.prod(row["shape"]))[:most]
        kept = {row["name"] for row in largest}
        rows = [row for row in rows if row["name"] in kept]
    for row in rows:
        table.add_row(
            row["name"], "×".join(map(str, row["shape"])) or "1", row["encoding"], f"{row['bits_per_weight']:.2f}",
            _number(row.get("sqnr_db"), ".1f"), _number(row.get("sensitivity"), ".2e"),
        )  # fmt: skip
    return table


def fidelity_table(fidelity: Mapping[str, Any]) -> Table:
    """A row a model: how far its masks and embeddings agree with the original's."""
    table = Table("model", box=None)
    for heading in ("masks' IoU", "±", "by click", "by box", "worst tenth", "embedding cosine", "times smaller"):
        table.add_column(heading, justify="right")
    for name, row in fidelity["models"].items():
        table.add_row(
            name, f"{row['mask_iou']:.4f}", f"{row['margin']:.4f}", _number(row["by_kind"].get("point"), ".4f"),
            _number(row["by_kind"].get("box"), ".4f"), f"{row['worst_tenth']:.4f}", f"{row['embedding_cosine']:.5f}",
            _number(row.get("ratio"), ".2f"),
        )  # fmt: skip
    return table


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _title(report: Mapping[str, Any]) -> str:
    parts = [str(report.get("variant", "model")), str(report.get("codec", ""))]
    if (ratio := report.get("ratio")) is not None:
        parts.append(f"{ratio:.2f} times smaller")
    if (sqnr := report.get("sqnr_db")) is not None:
        parts.append(f"{sqnr:.1f} dB")
    return " · ".join(part for part in parts if part)


def _tensors(axes: Axes, tensors: Sequence[Mapping[str, Any]], value: str, label: str) -> None:
    """One dot a tensor; those without the value (no error, so no SQNR) are left out."""
    colour = _relative_sensitivities(tensors)
    drawn = None
    for encoding, marker in _ENCODINGS.items():
        rows = [i for i, t in enumerate(tensors) if t["encoding"] == encoding and t.get(value) is not None]
        if not rows:
            continue
        sizes = [6 + 3 * math.sqrt(math.prod(tensors[i]["shape"])) / 20 for i in rows]
        known = any(math.isfinite(colour[i]) for i in rows)
        style: dict[str, Any] = (
            {"c": [colour[i] for i in rows], "cmap": _COLOURS, "vmin": -4.0, "vmax": 2.0}
            if known
            else {"color": _ACCENT}
        )
        dots = axes.scatter(
            rows, [tensors[i][value] for i in rows], s=sizes, marker=marker, label=encoding,
            plotnonfinite=True, linewidths=0, **style,
        )  # fmt: skip
        drawn = dots if known else drawn
    axes.set_ylabel(label)
    axes.set_xlabel("tensor, in the model's order")
    axes.grid(alpha=0.25)
    if axes.collections:
        axes.legend(loc="best", fontsize=8, frameon=False)
    if drawn is not None and axes.figure is not None:
        axes.figure.colorbar(drawn, ax=axes, label="log10 of sensitivity\nover the median")


def _relative_sensitivities(tensors: Sequence[Mapping[str, Any]]) -> list[float]:
    """log10 of each sensitivity over the median of them all; NaN where there is none."""
    known = sorted(t["sensitivity"] for t in tensors if t.get("sensitivity"))
    if not known:
        return [math.nan] * len(tensors)
    median = known[len(known) // 2]
    return [math.log10(t["sensitivity"] / median) if t.get("sensitivity") else math.nan for t in tensors]


def _sizes(axes: Axes, report: Mapping[str, Any]) -> None:
    """Bars of the sizes that the report knows, in MB."""
    named = (("fp32", "fp32_bytes"), ("file given", "source_bytes"), ("in memory", "resident_bytes"),
             ("compressed", "artifact_bytes"))  # fmt: skip
    bars = [(label, report[key] / 1e6) for label, key in named if report.get(key)]
    for name, row in (report.get("fidelity") or {"models": {}})["models"].items():
        if row.get("nbytes") and name in ("int8", "int4"):
            bars.insert(-1, (name, row["nbytes"] / 1e6))
    colours = [_ACCENT if label in ("compressed", "in memory") else _MUTED for label, _ in bars]
    drawn = axes.barh([label for label, _ in bars], [size for _, size in bars], color=colours)
    axes.bar_label(drawn, fmt="%.1f", padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_xlabel("size, MB")


def _fidelity(axes: Axes, fidelity: Mapping[str, Any]) -> None:
    """Bars of the masks' IoU with the original's: the mean, and over the tenth that agrees least."""
    models = fidelity["models"]
    at = range(len(models))
    axes.barh([i - 0.2 for i in at], [m["mask_iou"] for m in models.values()], 0.4, color=_ACCENT, label="mean",
              xerr=[m["margin"] for m in models.values()])  # fmt: skip
    axes.barh(
        [i + 0.2 for i in at], [m["worst_tenth"] for m in models.values()], 0.4, color=_MUTED, label="worst tenth"
    )
    axes.set_yticks(list(at), list(models))
    axes.set_xlim(0, 1)
    axes.set_xlabel(f"masks' IoU with the original's, {fidelity['prompts']} prompts at {fidelity['side']} pixels")
    axes.invert_yaxis()
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=8, frameon=False)
