"""Weights that are offloaded to the host's memory and onloaded block by block, each just before it is at work.

Knows nothing of FLUX; src/weights/placement.py decides what lives where.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from src.engine.staging import Staging
from src.weights.placement import SLOTS

log = logging.getLogger("worker")

_ALIGNED = 256  # bytes; where CUDA's own allocations begin


class Event(Protocol):
    """A point in what a stream was asked for; torch.cuda.Event is one."""

    def record(self) -> None:
        """It is now, on the current stream."""

    def wait(self) -> None:
        """What the current stream is asked for from now on waits for it."""


class Streams:
    """In which order a device does what it is asked for: the CPU one thing after another."""

    def copying(self) -> AbstractContextManager[object]:
        """Within it the current stream is the one on which weights are copied, not the one on which blocks compute."""
        return nullcontext()

    def event(self) -> Event:
        """A new one."""
        return _Past()

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""


class _Past:
    """Where one thing is done after another, what was asked for is done."""

    def record(self) -> None:
        pass

    def wait(self) -> None:
        pass


class CudaStreams(Streams):
    """On a card weights are copied beside the computing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copying(self) -> AbstractContextManager[object]:
        """As of all streams."""
        return torch.cuda.stream(self._copying)

    def event(self) -> Event:
        """As of all streams."""
        event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return event

    def synchronize(self) -> None:
        """As of all streams."""
        torch.cuda.synchronize(self._device)


class Home:
    """Some weights, and their place in the host's memory from when they first leave the device; `size` is its bytes.

    Nobody writes to weights: what has left once leaves again without a copy.
    """

    def __init__(self, weights: Iterable[nn.Parameter], device: torch.device, staging: Staging | None = None) -> None:
        self._weights = list({id(weight): weight for weight in weights}.values())
        self._device = device
        self._staging = staging or Staging(device)
        self._absent: list[torch.Tensor] = []
        self.size = sum(map(_aligned, self._weights))
        self.memory: torch.Tensor | None = None

    def leave(self) -> None:
        """Let the weights be absent from the device; in their places stand tensors of their shapes and types."""
        if self.memory is None:
            memory = _own_pages(self.size)
            self._staging.fill(zip((weight.data for weight in self._weights), self._views(memory), strict=True))
            _pin(memory, self._device)  # pages that are filled: the driver would have to find each of the others
            # Two or four bytes long each.
            self._absent = [torch.zeros((), dtype=w.dtype, device=self._device).expand(w.shape) for w in self._weights]
            self.memory = memory
        self._set(self._absent)

    def show(self, memory: torch.Tensor) -> None:
        """Let the weights be what lies in `memory`, a copy of their home on the device."""
        with torch.inference_mode(False):  # made within it they would be of another kind, which compiled blocks refuse
            self._set(self._views(memory))

    def come_back(self) -> None:
        """Let the weights be on the device to stay."""
        if self.memory is not None:
            memory = torch.empty(self.size, dtype=torch.uint8, device=self._device)
            memory.copy_(self.memory)
            self.show(memory)

    def forget(self) -> None:
        """Give the host's memory back; only while the weights are on the device."""
        self.memory, self._absent = None, []

    def _set(self, tensors: Iterable[torch.Tensor]) -> None:
        for weight, tensor in zip(self._weights, tensors, strict=True):
            weight.data = tensor

    def _views(self, memory: torch.Tensor) -> Iterator[torch.Tensor]:
        start = 0
        for weight in self._weights:
            size = weight.numel() * weight.itemsize
            yield memory[start : start + size].view(weight.dtype).view(weight.shape)
            start += _aligned(weight)


class Offloader:
    """Two slots on a device, and the offloaded weights that take turns in them. Not for two threads at once.

    On a card they are copied from pinned memory and beside the computing: while a block is at work, the one that
    followed it the last time is on its way.
    """

    def __init__(self, device: torch.device, streams: Streams | None = None) -> None:
        self.device = device
        self._streams = streams or (CudaStreams(device) if device.type == "cuda" else Streams())
        self._offloaded: list[OffloadedWeights] = []
        self._hooks: list[RemovableHandle] = []
        self._slots: list[_Slot] = []
        self._last: OffloadedWeights | None = None

    def offload(self, *homes: Home) -> OffloadedWeights:
        """Let the weights of `homes` leave the device; they are absent but within `onloaded`."""
        weights = OffloadedWeights(self, homes)
        self._offloaded.append(weights)
        self._drop_slots()  # it may need larger ones
        return weights

    def stream(self, block: nn.Module, *homes: Home) -> None:
        """Offload `homes`, which are onloaded whenever `block` is called."""
        weights = self.offload(*homes)
        self._hooks += [
            block.register_forward_pre_hook(lambda *_: weights.onload()),
            block.register_forward_hook(lambda *_: weights.release(), always_call=True),
        ]

    def reset(self) -> None:
        """Nothing is onloaded any more, and nothing on its way: weights may leave and come back. Not within a call."""
        for weights in self._offloaded:
            weights.release()
        for hook in self._hooks:
            hook.remove()
        self._offloaded, self._hooks, self._last = [], [], None
        self._drop_slots()

    def prefetch(self, weights: OffloadedWeights) -> _Slot:
        """The slot that holds `weights`, or where it is on its way to now."""
        if not self._slots:
            size = max(each.size for each in self._offloaded)
            self._slots = [_Slot(size, self.device, self._streams) for _ in range(SLOTS)]
        for slot in self._slots:
            if slot.holds is weights:
                return slot
        slot = next(slot for slot in self._slots if not slot.at_work)
        slot.fill(weights)
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

    def _drop_slots(self) -> None:
        if self._slots:
            self._streams.synchronize()  # what is still on its way would land in memory that is others' by then
            self._slots = []


class OffloadedWeights:
    """The weights of some homes, which come to the device together; `size` is their bytes."""

    def __init__(self, offloader: Offloader, homes: Iterable[Home]) -> None:
        self.next: OffloadedWeights | None = None  # what came after it the last time
        self.homes = tuple(homes)
        self.size = sum(home.size for home in self.homes)
        self._offloader = offloader
        for home in self.homes:
            home.leave()

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
        for home, memory in self.within(slot.memory):
            home.show(memory)
        self._offloader.follows(self)
        if self.next:
            self._offloader.prefetch(self.next)

    def release(self) -> None:
        """The slot is for others, once the computing that was asked for so far is done."""
        for home in self.homes:
            home.leave()
        self._offloader.release(self)

    def within(self, memory: torch.Tensor) -> Iterator[tuple[Home, torch.Tensor]]:
        """The part of a slot's memory that each home's weights have."""
        start = 0
        for home in self.homes:
            yield home, memory[start : start + home.size]
            start += home.size


class _Slot:
    """Memory on the device for one block's weights at a time."""

    def __init__(self, size: int, device: torch.device, streams: Streams) -> None:
        with torch.inference_mode(False):  # weights point into it, and those are no tensors of inference
            self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: OffloadedWeights | None = None
        self.at_work = False
        self._streams = streams
        self._arrived, self._done = streams.event(), streams.event()
        self.end()  # the memory may still be in use by what had it before

    def fill(self, weights: OffloadedWeights) -> None:
        """Copy `weights` here, once those that were here are not needed any more."""
        self.holds = None  # until they have set out: what came half is nobody's
        with self._streams.copying():
            self._done.wait()
            for home, memory in weights.within(self.memory):
                if home.memory is not None:
                    memory.copy_(home.memory, non_blocking=True)
            self._arrived.record()
        self.holds = weights

    def begin(self) -> None:
        """From now on the computing uses what is on its way here."""
        self.at_work = True
        self._arrived.wait()

    def end(self) -> None:
        """What was asked for until now is the last that uses it."""
        self.at_work = False
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


def _pin(memory: torch.Tensor, device: torch.device) -> None:
    """Lock it in place, for copies beside the computing; torch's own pinning rounds up to powers of two."""
    if device.type != "cuda":
        return
    cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if error := int(cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)):
        log.warning("host memory cannot be pinned (CUDA error %s): weights will come slowly", error)
        with suppress(RuntimeError):  # the next call would raise the error that is told already
            torch.zeros(1, device=device)
        return
    weakref.finalize(memory, cuda.cudaHostUnregister, memory.data_ptr())
