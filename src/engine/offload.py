"""Weights that are offloaded to the host's memory and onloaded block by block, each just before it is at work.

Knows nothing of FLUX; src/weights/placement.py decides what lives where.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from src.engine.staging import Staging
from src.weights.placement import SLOTS

log = logging.getLogger("worker")

_ALIGNED = 256  # bytes; where CUDA's own allocations begin


class Offloader:
    """Two slots on a device, and the offloaded weights that take turns in them. Not for two threads at once.

    On a card they are copied from pinned memory and beside the computing: while a block is at work, the one that
    followed it the last time is on its way.
    """

    def __init__(self, device: torch.device, staging: Staging | None = None) -> None:
        self.device = device
        self.staging = staging or Staging(device)
        self._offloaded: list[OffloadedWeights] = []
        self._slots: list[_Slot] = []
        self._last: OffloadedWeights | None = None
        self._copying = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def offload(self, *layers: nn.Module) -> OffloadedWeights:
        """Take the weights of `layers` into the host's memory; they are absent but within `onloaded`."""
        weights = OffloadedWeights(self, layers)
        self._offloaded.append(weights)
        self._slots = []  # it may need larger ones
        return weights

    def stream(self, block: nn.Module, *, without: Iterable[nn.Module] = ()) -> None:
        """Offload `block`, but for the layers `without`; it is onloaded whenever it is called."""
        apart = set(without)
        weights = self.offload(*(layer for layer in block.modules() if layer not in apart))
        block.register_forward_pre_hook(lambda *_: weights.onload())
        block.register_forward_hook(lambda *_: weights.release(), always_call=True)

    def prefetch(self, weights: OffloadedWeights) -> _Slot:
        """The slot that holds `weights`, or where it is on its way to now."""
        if not self._slots:
            size = max(each.size for each in self._offloaded)
            self._slots = [_Slot(size, self.device) for _ in range(SLOTS)]
        for slot in self._slots:
            if slot.holds is weights:
                return slot
        slot = next(slot for slot in self._slots if not slot.at_work)
        slot.fill(weights, self._copying)
        return slot

    def release(self, weights: OffloadedWeights) -> None:
        """The slot that holds `weights`, if any does, may be taken by others."""
        for slot in self._slots:
            if slot.holds is weights:
                slot.end()

    def follows(self, weights: OffloadedWeights) -> None:
        """Remember that `weights` comes after the last one."""
        if self._last is not None:
            self._last.next = weights
        self._last = weights


class OffloadedWeights:
    """The weights of some layers, in one piece of the host's memory; `size` is its bytes."""

    def __init__(self, offloader: Offloader, layers: Iterable[nn.Module]) -> None:
        self.next: OffloadedWeights | None = None  # what came after it the last time
        self._offloader = offloader
        weights = {id(weight): weight for layer in layers for weight in layer.parameters(recurse=False)}
        self._weights = list(weights.values())
        # What stands in the place of a weight: of its shape and type, and two or four bytes long.
        self._absent = [torch.zeros((), dtype=w.dtype, device=offloader.device).expand(w.shape) for w in self._weights]
        self.size = sum(map(_aligned, self._weights))
        self.home = _own_pages(self.size)
        offloader.staging.fill(zip((weight.data for weight in self._weights), self._views(self.home), strict=True))
        _pin(self, offloader.device)  # pages that are filled: the driver would have to find each of the others
        self._set(self._absent)

    @contextmanager
    def onloaded(self) -> Iterator[None]:
        """Within it the weights are on the device."""
        try:
            self.onload()
            yield
        finally:
            self.release()

    def onload(self) -> None:
        """Let the computing wait for the weights, and those that follow set out."""
        slot = self._offloader.prefetch(self)
        slot.begin()
        self._set(self._views(slot.memory))
        self._offloader.follows(self)
        if self.next:
            self._offloader.prefetch(self.next)

    def release(self) -> None:
        """The slot is for others, once the computing that was asked for so far is done."""
        self._set(self._absent)
        self._offloader.release(self)

    def _set(self, tensors: Iterable[torch.Tensor]) -> None:
        for weight, tensor in zip(self._weights, tensors, strict=True):
            weight.data = tensor

    def _views(self, memory: torch.Tensor) -> Iterator[torch.Tensor]:
        start = 0
        for weight, absent in zip(self._weights, self._absent, strict=True):
            size = absent.numel() * absent.itemsize
            yield memory[start : start + size].view(absent.dtype).view(absent.shape)
            start += _aligned(weight)


class _Slot:
    """Memory on the device for one block's weights at a time."""

    def __init__(self, size: int, device: torch.device) -> None:
        with torch.inference_mode(False):  # weights point into it, and those are no tensors of inference
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: OffloadedWeights | None = None
        self.at_work = False
        cuda = device.type == "cuda"
        self._arrived: Any = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._done: Any = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self.end()  # the memory may still be in use by what had it before

    def fill(self, weights: OffloadedWeights, copying: torch.cuda.Stream | None) -> None:
        """Copy `weights` here, on the stream `copying` where there is one."""
        self.holds = None  # until they have set out: what came half is nobody's
        memory = self.memory[: weights.size]
        if copying is None:
            memory.copy_(weights.home)
        else:
            copying.wait_event(self._done)
            with torch.cuda.stream(copying):
                memory.copy_(weights.home, non_blocking=True)
                self._arrived.record()
        self.holds = weights

    def begin(self) -> None:
        """From now on the computing uses what is on its way here."""
        self.at_work = True
        if self._arrived:
            self._arrived.wait()

    def end(self) -> None:
        """What was asked for until now is the last that uses it."""
        self.at_work = False
        if self._done:
            self._done.record()


def _aligned(weight: torch.Tensor) -> int:
    return -(-weight.numel() * weight.itemsize // _ALIGNED) * _ALIGNED


def _own_pages(size: int) -> torch.Tensor:
    """`size` bytes in whole pages, to be pinned: of this process alone, and large ones where the system has them.

    What Python maps by default is shared, which is accounted as a file in memory and gets no large pages.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # another system, or a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _pin(weights: OffloadedWeights, device: torch.device) -> None:
    """Lock its home in place, for copies beside the computing; torch's own pinning rounds up to powers of two."""
    if device.type != "cuda":
        return
    cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if error := int(cuda.cudaHostRegister(weights.home.data_ptr(), weights.size, 0)):
        log.warning("host memory cannot be pinned (CUDA error %s): weights will come slowly", error)
        with suppress(RuntimeError):  # the next call would raise the error that is told already
            torch.zeros(1, device=device)
        return
    weakref.finalize(weights, cuda.cudaHostUnregister, weights.home.data_ptr())
