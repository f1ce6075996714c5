"""What faults do to the service: jobs lost, half-made files seen, and seconds until it works again.

A lost job was answered with 202 and neither succeeds nor fails with an error of its own. Half-made are: a listed model
whose file, downloaded, has not the digest of its registration or does not verify; a transfer that ends too soon and
passes for whole; and, once the work is done, any ``*.part``, job's folder or nameless artifact in the data folder.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import fault_cases, random_sam
from benchmarks.fault_host import Tally
from benchmarks.record import append

SEED = 7


def run(checkpoint: Path, only: str, kills: int, tries: int) -> Iterator[dict[str, Any]]:
    """Rows of figures; each that is not skipped is appended to ``results/faults.csv``.

    ``only``: cases whose names have that in them; ``kills``: of a worker or of a job's process; ``tries``: of each
    other fault.
    """
    with tempfile.TemporaryDirectory() as folder:

        def large() -> Path:
            # Its artifact does not fit into what the system buffers for a client.
            return random_sam.write("efficient_sam_s", Path(folder) / "large.pth")

        cases: dict[str, Callable[[], Iterator[Tally]]] = {
            "worker": lambda: fault_cases.worker_killed(checkpoint, kills, SEED),
            "redis": lambda: fault_cases.redis_killed(checkpoint, tries, SEED),
            "upload": lambda: fault_cases.api_killed_in_upload(checkpoint, tries, SEED),
            "download": lambda: fault_cases.api_killed_in_download(large(), tries, SEED),
            "disk": lambda: fault_cases.disk_full(checkpoint, tries),
            "store": lambda: fault_cases.store_unreachable(checkpoint, tries, SEED),
            "clock": lambda: fault_cases.clock_jumps(checkpoint, tries),
        }
        for name, case in cases.items():
            if only in name:
                yield from map(_row, case())


def _row(tally: Tally) -> dict[str, Any]:
    row: dict[str, Any] = {
        "fault": tally.fault, "tries": len(tally.seconds), "lost_jobs": tally.lost, "partial_artifacts": tally.partial,
        "failed_honestly": tally.failed,
        "recover_median_s": statistics.median(tally.seconds) if tally.seconds else "",
        "recover_worst_s": max(tally.seconds, default=""),
    }  # fmt: skip
    if tally.skipped:
        return {"fault": tally.fault, "skipped": tally.skipped}
    append("faults", row)
    return row
