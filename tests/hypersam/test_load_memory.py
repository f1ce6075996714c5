"""A cold load never builds the dense model: anonymous memory while it runs, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hypersam
from tests.models import ModelSize, save_checkpoint

# 11 million parameters; a layer of the perceptrons is the largest tensor.
LARGE = ModelSize(image=128, patch=16, dim=384, depth=6, heads=6, window=4, global_blocks=(5,), prompt_dim=32)
WARM = ModelSize(image=64, patch=8, dim=128, depth=1, heads=2, window=4, global_blocks=(0,), prompt_dim=32)
# File pages of the artifact come and go as the system likes; what a process has to have is anonymous.
LOADS = """
import gc, json, sys, threading, time
from pathlib import Path
import torch
from hypersam.loading import load_model
resident = sys.argv[3]
load_model(Path(sys.argv[1]), device="cpu", resident=resident)  # compiled loops, pools of threads
gc.collect()

def anonymous():
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("RssAnon"))

before, peak, done = anonymous(), [0], threading.Event()

def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(Path(sys.argv[2]), device="cpu", resident=resident)
done.set()
watcher.join()
print(json.dumps({"rise": max(peak[0], anonymous()) - before, "held": model.resident_bytes()}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load")


@pytest.mark.parametrize(("codec", "resident"), [("lattice", "levels"), ("lattice", "stream"), ("orbit", "levels")])
def test_a_load_takes_little_more_than_what_it_keeps(folder: Path, codec: str, resident: str) -> None:
    artifacts = {name: folder / f"{codec}_{name}.hsam" for name in ("warm", "large")}
    for name, size, preset in (("warm", WARM, "4x"), ("large", LARGE, "6.5x")):
        if not artifacts[name].exists():
            checkpoint = save_checkpoint(folder / f"{name}.pth", size)
            options = {"preset": preset, "policy": "equal_error", "fidelity": False}
            hypersam.compress(checkpoint, artifacts[name], codec=codec, options=options)
    run = subprocess.run(
        [sys.executable, "-c", LOADS, str(artifacts["warm"]), str(artifacts["large"]), resident],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = json.loads(run.stdout)
    assert found["held"] < (folder / "large.pth").stat().st_size / 3
    assert found["rise"] < 1.3 * found["held"] + 4 * LARGE.dim * 4 * LARGE.dim
