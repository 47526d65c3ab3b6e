"""Memory that was short: how it is told, and how what can be freed is freed."""

from __future__ import annotations

import gc
import traceback

import torch

# How a full host, a full card and cuBLAS say it where torch has no class for it.
_SAYINGS = ("allocate memory", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory was short."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _SAYINGS)
    )


def free_memory(error: BaseException) -> None:
    """Let go of what `error`'s frames hold, the very tensors that did not fit, and of what torch keeps for later."""
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    torch.cuda.empty_cache()
