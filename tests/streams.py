"""A device whose streams run by themselves, simulated: which accesses to memory nothing puts in order.

What a stream is asked for happens at once, and a vector clock keeps what it is known to come after: what was asked of
the same stream before, what its events waited for, and what the host had waited for when it asked. Two accesses to the
same memory, one of them a write, are a race where neither is known to come after the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from src.engine.offload import Event, Streams

Clock = dict[str, int]  # how much of each actor's work is known to be done
HOST, COMPUTING, COPYING = "host", "computing", "copying"
ACTORS = (HOST, COMPUTING, COPYING)


class Race(Exception):
    """Says which two accesses are in no order."""


class SimulatedStreams(Streams):
    """Raises Race in the middle of what is asked. `deaf` is who does not wait for others, to see that it is found."""

    error: Race | None = None  # of memory that was let go, where nothing can be raised

    def __init__(self, deaf: str | None = None) -> None:
        self.current = COMPUTING
        self.clocks: dict[str, Clock] = {actor: dict.fromkeys(ACTORS, 0) for actor in ACTORS}
        self.accesses = 0
        self.deaf = deaf
        self._last: dict[tuple[int, int], dict[tuple[str, bool], int]] = {}  # of each range: who, a write or not, when

    @contextmanager
    def copying(self) -> Iterator[None]:
        before, self.current = self.current, COPYING
        try:
            yield
        finally:
            self.current = before

    def event(self) -> Event:
        return SimulatedEvent(self)

    def synchronize(self) -> None:
        if self.deaf != HOST:
            for actor in (COMPUTING, COPYING):
                self.joins(HOST, self.clocks[actor])
            self._last.clear()  # all that comes is after it

    def asks(self) -> str:
        """The current stream, which comes after all that the host has waited for."""
        self.joins(self.current, self.clocks[HOST])
        return self.current

    def joins(self, actor: str, clock: Clock) -> None:
        """From now on `actor` comes after what `clock` knows."""
        mine = self.clocks[actor]
        mine.update({other: max(mine[other], clock[other]) for other in ACTORS})

    def access(self, actor: str, ranges: Iterable[tuple[int, int, bool]]) -> None:
        """`actor` reads or writes (True) from one address to another; raises Race."""
        clock = self.clocks[actor]
        clock[actor] += 1
        for start, end, writes in ranges:
            self.accesses += 1
            for (other_start, other_end), by in self._last.items():
                if start < other_end and other_start < end:
                    for (other, wrote), when in by.items():
                        if (writes or wrote) and when > clock[other]:
                            kinds = ["write" if each else "read" for each in (wrote, writes)]
                            raise Race(f"a {kinds[0]} of {other} and a {kinds[1]} of {actor}")
            self._last.setdefault((start, end), {})[actor, writes] = clock[actor]

    def frees(self, memory: torch.Tensor, actor: str) -> None:
        """When nobody holds `memory` any more, others of `actor` may write to it."""
        weakref.finalize(memory, self._freed, actor, (*_range(memory), True)).atexit = False

    def _freed(self, actor: str, range_: tuple[int, int, bool]) -> None:
        if self.error is None:
            try:
                self.access(actor, [range_])
            except Race as race:
                self.error = race


class SimulatedEvent:
    """A point in what a stream was asked for."""

    def __init__(self, streams: SimulatedStreams) -> None:
        self._streams = streams
        self._recorded = dict.fromkeys(ACTORS, 0)

    def record(self) -> None:
        self._recorded = dict(self._streams.clocks[self._streams.asks()])

    def wait(self) -> None:
        if (stream := self._streams.asks()) != self._streams.deaf:
            self._streams.joins(stream, self._recorded)


class Watched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it every operation of torch's is an access of the current stream; a copy that blocks keeps the host."""

    def __init__(self, streams: SimulatedStreams) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._streams = streams

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        if not any(each.alias_info and not each.alias_info.is_write for each in schema.returns):  # no mere view
            given = zip(schema.arguments, args, strict=False)
            named = ((each, kwargs[each.name]) for each in schema.arguments if each.name in kwargs)
            ranges = [
                (*_range(value), bool(argument.alias_info and argument.alias_info.is_write))
                for argument, value in (*given, *named)
                if isinstance(value, torch.Tensor)
            ]
            stream = self._streams.asks()
            self._streams.access(stream, ranges)
            if func is torch.ops.aten.copy_.default and not (kwargs.get("non_blocking") or True in args[2:]):
                self._streams.joins(HOST, self._streams.clocks[stream])
        return func(*args, **kwargs)


def _range(memory: torch.Tensor) -> tuple[int, int]:
    """Its first byte and the one after its last; what was expanded is shorter than its shape says."""
    if not memory.numel():
        return 0, 0
    steps = zip(memory.shape, memory.stride(), strict=True)
    values = 1 + sum((size - 1) * stride for size, stride in steps)
    return memory.data_ptr(), memory.data_ptr() + values * memory.itemsize
