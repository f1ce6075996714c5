"""One CSV a benchmark; every row says on what machine, commit and versions it was measured."""

from __future__ import annotations

import csv
import datetime
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Where and with what a row was measured."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    # The rows of this folder are what a run writes, not what it measured.
    dirty = "+" if git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results") else ""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short", "HEAD") + dirty,
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def append(name: str, row: Mapping[str, Any]) -> None:
    """Add a row to ``results/NAME.csv``. A file with other columns is begun anew."""
    full = {**row, **machine()}
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    known = path.read_text().splitlines()[:1] if path.exists() else []
    fresh = known != [",".join(full)]
    with path.open("w" if fresh else "a", newline="") as file:
        writer = csv.DictWriter(file, list(full), lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in full.items()})


def markdown(name: str) -> str:
    """The rows of ``results/NAME.csv`` that have the last one's commit and date, as a table; what all leave empty, and
    the machine, are left out."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows = [row for row in rows if (row["date"], row["commit"]) == (rows[-1]["date"], rows[-1]["commit"])]
    columns = [c for c in rows[0] if c not in machine() and any(row[c] for row in rows)]
    lines = [[c.replace("_", " ") for c in columns], ["---"] * len(columns)]
    lines += [[_rounded(row[c]) for c in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rounded(text: str) -> str:
    """A number with three digits, as far as they are behind the point."""
    try:
        value = float(text)
    except ValueError:
        return text
    if not math.isfinite(value) or value == int(value):
        return text
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"
