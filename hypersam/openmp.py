"""OpenMP's threads, which share the cores with everything else that a service does."""

from __future__ import annotations

import os


def sleep_while_waiting() -> None:
    """Have threads that wait for work sleep at once. Call it before torch is loaded; processes started inherit it.

    By default they spin for milliseconds. That is the fastest on cores that nobody else uses, and makes a click several
    times slower as soon as a job runs beside it. What the environment says stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def use_cores(count: int) -> None:
    """Let PyTorch run operations of this thread on so many cores."""
    import torch

    torch.get_num_threads()  # else the thread's first operation would take the number that another thread set last
    torch.set_num_threads(count)
