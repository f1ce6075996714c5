"""How many cores a process may use, and OpenMP's threads, which share them with all else that a service does."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """The cores that the process may run on; in a container no more than its share of their time.

    A container that is given the time of two cores of sixty-four sees all of them. With a thread on each it would have
    used up its share of a tenth of a second in the first few milliseconds, and stand still for the rest.
    """
    visible = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = _share()
    return visible if share is None else max(1, min(visible, int(share)))


def _share() -> float | None:
    """Cores' worth of time that the control group gives; None where it gives all."""
    with contextlib.suppress(
        OSError, ValueError, ZeroDivisionError
    ):  # the second version; without a limit it reads "max 100000"
        quota, period = (_GROUP / "cpu.max").read_text().split()
        return int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = ((_GROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def share_cores() -> None:
    """Set up OpenMP's threads. Call it before torch is loaded; processes started inherit it.

    Threads that wait for work sleep at once. By default they spin for milliseconds, which is the fastest on cores that
    nobody else uses, and makes a click several times slower as soon as a job runs beside it. There are no more of them
    than the process has cores. What the environment says stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if _share() is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))


def use_cores(count: int) -> None:
    """Let PyTorch run operations of this thread on so many cores."""
    import torch

    torch.get_num_threads()  # else the thread's first operation would take the number that another thread set last
    torch.set_num_threads(count)
