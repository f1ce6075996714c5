"""Rows shared out among threads, for compiled loops that let go of the interpreter."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_LEAST = 1 << 18
"""Weights that are worth a thread: a few times what it takes to wake one up."""


def over_rows(work: Callable[[int, int], None], rows: int, columns: int) -> None:
    """Call ``work(first, last)`` for parts of ``rows``, on as many threads as torch uses, the caller's among them."""
    parts = max(1, min(torch.get_num_threads(), rows, rows * columns // _LEAST))
    bounds = [(rows * part // parts, rows * (part + 1) // parts) for part in range(parts)]
    # By process, because threads do not outlive a fork.
    others = [_pool(os.getpid()).submit(work, *some) for some in bounds[1:]]
    work(*bounds[0])
    for other in others:
        other.result()


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix=f"decode-{process}")
