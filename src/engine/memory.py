"""Memory that was short: how it is recognised, how it is freed, and what is given up then."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from src import errors
from src.weights.ledger import ExtraKind, Ledger

Part = TypeVar("Part")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory was short."""
    return isinstance(error, torch.OutOfMemoryError) or errors.is_out_of_memory(error)


def free_memory(error: BaseException) -> None:
    """Let go of what `error`'s frames hold, the very tensors that did not fit, and of what torch keeps for later."""
    errors.let_go(error)
    gc.collect()
    torch.cuda.empty_cache()


def load_with_room(
    ledger: Ledger,
    load: Callable[[], Part],
    *,
    name: str,
    kind: ExtraKind,
    size: int,
    leave: Callable[[], None],
    kept: bool = False,
) -> Part:
    """What `load` gives, once `ledger` has made room for its `size` in bytes; the other arguments are `Ledger.admit`'s.

    Where memory is short nevertheless, more is let go, until nothing is left to give. Raises what `load` raised last.
    """
    ledger.admit(name, kind, size, leave, kept=kept)
    try:
        while True:
            try:
                return load()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                free_memory(error)
                if not ledger.give():
                    raise
    except BaseException:
        ledger.remove(name)
        raise


class MemoryFallback:
    """What is given up for memory within one plan; each new plan starts with nothing given up."""

    def __init__(self, pipeline: Any, ledger: Ledger) -> None:
        self.warnings: list[str] = []
        self.one_by_one = False
        self._ledger = ledger
        self._freed = False
        self._shrunk = False
        self._tiled = False
        self._vae = pipeline.vae
        self._vae.disable_tiling()
        self._vae.disable_slicing()

    def next(self, phase: str, pictures: int) -> bool:
        """Whether there is another way after memory was short in `phase` with so many pictures at once.

        What changes no picture comes first: what is idle leaves, and more of the model streams.
        """
        if not self._freed:
            self._freed = True
            self._ledger.let_idle_go()
        elif not self._shrunk and self._ledger.shrink():
            self._shrunk = True
        elif pictures > 1 and not self.one_by_one:
            self.one_by_one = True
            self.warnings.append("memory was short: the pictures were drawn one by one")
        elif phase != "decode" and self._ledger.shrink():
            pass
        elif phase == "decode" and not self._tiled:
            self._tiled = True
            self._vae.enable_tiling()
            self._vae.enable_slicing()
            self.warnings.append("memory was short: the pictures were decoded in tiles, which may change some pixels")
        else:
            return False
        return True
