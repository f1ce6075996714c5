"""In a container a process uses the cores that it is given time of, whatever it sees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hypersam import cores


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000\n"}, 16),
        ({"cpu.max": "400000 100000\n"}, 4),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "6400000 100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
        ({"cpu.max": "nonsense"}, 16),
    ],
)
def test_the_share_of_a_container(
    files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "_GROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert cores.usable_cores() == expected
    monkeypatch.setattr(os, "environ", given := {"OMP_WAIT_POLICY": "ACTIVE"})
    cores.share_cores()
    assert given["OMP_WAIT_POLICY"] == "ACTIVE"  # what is there stays
    limited = expected < 16 or files.get("cpu.max") == "6400000 100000\n"
    assert given.get("OMP_NUM_THREADS") == (str(expected) if limited else None)


def test_torch_takes_the_number(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_text("100000 100000")
    program = (
        f"import pathlib, hypersam.cores as c; c._GROUP = pathlib.Path({str(tmp_path)!r}); c.share_cores()\n"
        "import torch; print(torch.get_num_threads())"
    )
    given = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=given, check=True)
    assert done.stdout.strip() == "1"
