"""Several ways of doing one thing, each in a process of its own that waits for its turn.

So memory is its own, and passes are interleaved: one of each way a round. Ratios are taken within a round and their
median is given; seconds are the least of all rounds. On a machine that others use the processor's time tells more than
the clock's, so both are recorded. A worker says that it is ready, then makes a pass for every line on its standard
input; what it says is a line of JSON each. It may run under the Python of other projects.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Figures = dict[str, Any]


class Worker:
    """The other side of ``serve``: ``python -m MODULE ARGUMENTS``, with so many threads. ``ready``: what it said first.

    ``large``: it ends after each pass and starts anew, so that several do not hold gigabytes of working memory at once.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], *, threads: int, python: Path | None = None, large: bool = False
    ) -> None:
        self._here = Path(__file__).parent.parent
        self._environment = {
            **os.environ, "PYTHONPATH": str(self._here), "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE",
        }  # fmt: skip
        self._command = [str(python or sys.executable), "-m", module, *arguments]
        self._large = large
        self._process: subprocess.Popen[str] | None = None
        self.ready = self._started()
        if large:
            self.stop()

    def passed(self) -> Figures:
        """Have it make a pass, and return what it says of it."""
        if self._process is None:
            self._started()
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer = self._answer()
        if self._large:
            self.stop()
        return answer

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _started(self) -> Figures:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self._here,
            env=self._environment,
        )  # fmt: skip
        return self._answer()

    def _answer(self) -> Figures:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("answer "):
                answer: Figures = json.loads(line.removeprefix("answer "))
                return answer
        raise SystemExit(f"{' '.join(self._command)} ended without an answer")


def interleaved(workers: Mapping[str, Worker], rounds: int) -> dict[str, list[Figures]]:
    """What every way took, round by round."""
    took: dict[str, list[Figures]] = {method: [] for method in workers}
    for _ in range(rounds):
        for method, worker in workers.items():
            took[method].append(worker.passed())
    return took


def times_faster(peer: Sequence[Figures], own: Sequence[Figures], figure: str) -> float | None:
    """How many times as long the peer took, the median of the rounds; None without a peer."""
    ratios = [a[figure] / b[figure] for a, b in zip(peer, own, strict=False)]
    return statistics.median(ratios) if ratios else None


def clocked(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def serve(ready: Mapping[str, Any], turn: Callable[[], Mapping[str, Any]]) -> None:
    """Be a worker: say ``ready``, then take turns."""
    _say(ready)
    for _ in sys.stdin:
        _say(turn())


def _say(answer: Mapping[str, Any]) -> None:
    print("answer " + json.dumps(dict(answer)), flush=True)


def compressed(checkpoint: Path, artifact: Path, codec: str, options: Mapping[str, Any]) -> None:
    """Compress, unless it was done. In a process of its own, so that this one stays small beside those measured."""
    if artifact.exists():
        return
    code = (
        "import json, sys, hypersam\n"
        "hypersam.compress(*sys.argv[1:3], codec=sys.argv[3], options=json.loads(sys.argv[4]))\n"
    )
    chosen = json.dumps({"fidelity": False, **options})
    subprocess.run([sys.executable, "-c", code, str(checkpoint), str(artifact), codec, chosen], check=True)


def cosine(a: Path, b: Path) -> float:
    """Of two saved arrays."""
    one, other = (np.load(path).astype(np.float64).ravel() for path in (a, b))
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))
