"""Who is on the card with the model, and what leaves for whom.

    an adapter, a ControlNet or Redux that is wanted  ->  what is idle leaves, then the model's own blocks stream

The placement of a start counts on the model alone. What a job wants with it is admitted here first: idle weights make
room, the cheapest to load again first, then a placement that leaves more of the model in the host's memory. Neither
changes a byte of a picture. Sizes are in bytes; knows nothing of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum

from src.weights.placement import Machine, Placement, Weights, Work, flops, placements

# Jobs in a row after which what nobody wanted leaves, where the model would be faster without it. And for how many
# memory that turned out to be shorter than it was counted is not tried again. A choice of ours.
_PATIENCE = 8
# Of the card's memory, what is freed at once where it turned out to be short. A choice of ours.
_STEP = 1 / 8


class ExtraKind(IntEnum):
    """What is on the card with the model, the cheapest to load again first."""

    ADAPTER = 0
    REDUX = 1
    CONTROLNET = 2


@dataclass(frozen=True)
class PlacementChoice:
    """What the placements of one model are chosen by; `work.extra` aside, which is the ledger's to know."""

    weights: Weights
    machine: Machine
    work: Work
    mode: str

    def fastest(self, extra: int, memory: int, start: Placement) -> Placement:
        """The fastest within `memory` that leaves room for `extra`; where none does, the one that leaves the most.

        Those come first that have adaptive norms where they were at the `start`: compiled blocks fit them.
        """
        every = placements(self.weights, self.machine, replace(self.work, extra=extra), self.mode)
        possible = [found for found in every if found.offloaded <= self.machine.host_memory]
        if not (fitting := [found for found in possible if found.needs <= memory]):
            return min(possible, key=lambda found: found.needs)
        return min(
            fitting,
            key=lambda found: (
                found.modulation_cache != start.modulation_cache, found.seconds(self.work), found.offloaded
            ),
        )  # fmt: skip

    def onloaded(self, network: str, extra: int, memory: int, now: Placement) -> Placement | None:
        """The one within `memory` that has `network` whole on the card and moves the least of the others, if any.

        Adaptive norms stay where they are `now`.
        """
        every = placements(self.weights, self.machine, replace(self.work, extra=extra), self.mode, onloaded=network)
        fitting = [
            found
            for found in every
            if found.modulation_cache == now.modulation_cache
            and found.offloaded <= self.machine.host_memory
            and found.needs <= memory
        ]
        return min(fitting, key=lambda found: found.offloaded, default=None)


@dataclass
class _Extra:
    kind: ExtraKind
    size: int
    leave: Callable[[], None]
    kept: bool
    idle_jobs: int = 0  # in a row that did not want it


class Ledger:
    """What is held with the model. `arrange` brings the model's weights to another placement; False where it cannot.

    Without a placement nothing of the model moves, and only what is idle leaves. Not for two threads at once.
    """

    def __init__(
        self,
        placement: Placement | None = None,
        choice: PlacementChoice | None = None,
        arrange: Callable[[Placement], bool] = lambda _: False,
    ) -> None:
        self.placement = placement
        self._choice = choice
        self._arrange = arrange
        self._start = placement
        self._extras: dict[str, _Extra] = {}  # the least recently used first
        self._wanted: set[str] = set()
        self._memory = choice.machine.memory if choice else 0  # bytes that may be counted on
        self._patience = 0  # jobs until all of the card's memory is counted on again, and the model may come back
        self._asked: tuple[int, int] | None = None  # for what the placement was last chosen

    @property
    def extra(self) -> int:
        """Bytes of all that is held."""
        return sum(extra.size for extra in self._extras.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that is held, the least recently used first."""
        return tuple(self._extras)

    def begin(self, wanted: Collection[str]) -> None:
        """A job begins that wants these. A model that others made slower is made faster where they are gone."""
        self._wanted = set(wanted)
        for name in [name for name in self._extras if name in self._wanted]:
            self._extras[name] = self._extras.pop(name)
        for name, extra in self._extras.items():
            extra.idle_jobs = 0 if name in self._wanted else extra.idle_jobs + 1
        if self._patience:
            self._patience -= 1
            if not self._patience and self._choice:
                self._memory = self._choice.machine.memory
        if self.placement is not self._start and not self._patience:
            for name in self._idle():
                if self._extras[name].idle_jobs > _PATIENCE:
                    self._let_go(name)
            self._rearrange(self.extra)

    def learn(self, seconds: float) -> None:
        """Choose by what a step's computing was measured to take from now on, not by a product of matrices."""
        if self._choice:
            rate = flops(self._choice.weights, self._choice.work) / seconds
            self._choice = replace(self._choice, machine=replace(self._choice.machine, flops=rate))

    @contextmanager
    def onloaded(self, network: str) -> Iterator[None]:
        """Within it `network` is whole on the card, where that can be: it is at work for each token that it writes.

        What leaves for it comes back after.
        """
        before, whole = self.placement, None
        if self._choice and before and before.streamed.get(network):
            whole = self._choice.onloaded(network, self.extra, self._memory, before)
        moved = whole is not None and self._move(whole)
        try:
            yield
        finally:
            if moved and before:
                self._move(before)

    def done_with(self, name: str) -> None:
        """The job does not want it any more."""
        self._wanted.discard(name)

    def admit(self, name: str, kind: ExtraKind, size: int, leave: Callable[[], None], *, kept: bool = False) -> None:
        """Make room for what is about to be loaded, and count it from now on.

        `leave` takes it off the card; it is called when others need the room, unless it is `kept` or wanted by the job.
        Sizes are estimates: where they say that there is no room for it, it may be tried nevertheless.
        """
        self._make_room(size)
        self._extras[name] = _Extra(kind, size, leave, kept)
        self._wanted.add(name)

    def remove(self, name: str) -> None:
        """It is not on the card any more, if it was."""
        self._extras.pop(name, None)

    def give(self) -> bool:
        """Memory was short, whatever was counted: what is idle leaves, or more of the model; False for neither."""
        return self.let_idle_go() or self.shrink()

    def let_idle_go(self) -> bool:
        """Take all off the card that the job does not want; False where nothing was idle."""
        idle = self._idle()
        for name in idle:
            self._let_go(name)
        return bool(idle)

    def shrink(self) -> bool:
        """Leave more of the model in the host's memory, for some jobs; False where it cannot be less."""
        if not (self.placement and self._start and self._choice):
            return False
        now = self.placement.with_extra(self.extra).needs
        less = int(now - _STEP * self._choice.machine.memory)
        smaller = self._choice.fastest(self.extra, less, self._start)
        if smaller.needs >= now or not self._move(smaller):
            return False
        self._memory, self._patience, self._asked = less, _PATIENCE, None
        return True

    def _make_room(self, size: int) -> None:
        if self._fits(size):
            return
        for name in self._idle():
            self._let_go(name)
            if self._fits(size):
                return
        self._rearrange(self.extra + size)

    def _fits(self, size: int) -> bool:
        return self.placement is None or self.placement.with_extra(self.extra + size).needs <= self._memory

    def _idle(self) -> list[str]:
        """What may leave, the cheapest to load again first, and of one kind the least recently used."""
        idle = [name for name, extra in self._extras.items() if not (extra.kept or name in self._wanted)]
        return sorted(idle, key=lambda name: self._extras[name].kind)

    def _let_go(self, name: str) -> None:
        self._extras.pop(name).leave()

    def _rearrange(self, extra: int) -> None:
        """Take the fastest placement that leaves room for so much."""
        if self._choice and self._start and self._asked != (extra, self._memory):
            self._asked = extra, self._memory
            self._move(self._choice.fastest(extra, self._memory, self._start))

    def _move(self, placement: Placement) -> bool:
        now = self.placement
        if now is None or placement == now.with_extra(placement.extra):
            return False
        if self._start and placement.with_extra(self._start.extra) == self._start:
            placement = self._start
        if not self._arrange(placement):
            self._asked, self._patience = None, _PATIENCE
            return False
        self.placement = placement
        return True
