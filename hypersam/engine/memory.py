"""What to do when a device has no memory left: tell it from other errors, and give back what nobody needs."""

from __future__ import annotations

import gc

import torch


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the host, could not give memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # The host's allocator has no exception class of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def release() -> None:
    """Give freed memory back to the device."""
    gc.collect()  # a traceback's frames may hold tensors in cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
