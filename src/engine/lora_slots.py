"""Adapters in compiled blocks: next to every linear two matrices whose shapes no adapter changes.

A graph is compiled for shapes, and adapters differ in rank and in the layers that they adapt. Padded with zeros to a
target rank they all look alike, as in PEFT's hotswapping (https://huggingface.co/docs/peft/package_reference/hotswap);
several that count at once stand one below the other, their scales multiplied in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from src.engine.memory import free_memory, is_out_of_memory
from src.weights.placement import block_of, is_modulation

SLOTS = "slots of adapters"  # to the ledger
WithRoom = Callable[[int, Callable[[], None]], None]
_Part = tuple[torch.Tensor, torch.Tensor, float]  # what one adapter adds: down [rank, in], up [out, rank], its scale


class LoraSlots:
    """The slots of one transformer's blocks, for adapters whose ranks are at most the highest of `ranks` together.

    Without `modulation` the linears of adaptive norms have none: they are asked ahead, outside of the blocks.
    """

    def __init__(
        self, transformer: Any, ranks: Sequence[int], device: torch.device, *, modulation: bool = True
    ) -> None:
        self.ranks = tuple(sorted(ranks))
        self._dtype, self._device = transformer.dtype, device
        self._rank = 0  # of the slots that there is memory for
        self.compiled: set[int] = set()  # ranks that there are graphs for
        self._empty: int | None = None  # the rank of slots that are there without any adapter
        self._blocks: dict[str, list[_Site]] = {}
        for name, layer in transformer.named_modules():
            block = block_of(name)
            if block and isinstance(layer, nn.Linear) and (modulation or not is_modulation(name)):
                parent, _, attribute = name.rpartition(".")
                self._blocks.setdefault(block, []).append(_Site(transformer.get_submodule(parent), attribute))

    @contextmanager
    def empty(self, rank: int) -> Iterator[None]:
        """Within it blocks have slots of `rank` without any adapter."""
        self._empty = rank
        try:
            yield
        finally:
            self._empty = None

    def give_up(self) -> None:
        """There are no graphs for slots."""
        self.ranks = ()
        self.compiled.clear()

    def put_in(self, with_room: WithRoom = lambda _, load: load()) -> list[str]:
        """Let slots stand for the adapters that count now, where graphs were compiled for that; warnings.

        A block with something that no slot can hold keeps PEFT's layers, and runs as it is. `with_room` gets the bytes
        that slots take, and what takes them.
        """
        if not self.compiled and self._empty is None:
            return []
        ranks = sorted(self.compiled)
        fitting: dict[_Site, list[_Part]] = {}
        reasons: list[str] = []  # a block each
        for sites in self._blocks.values():
            try:
                fitting |= {site: _parts(site.layer, max(ranks, default=0)) for site in sites}
            except _NoRoom as reason:
                reasons.append(str(reason))
        needed = max((_rank(parts) for parts in fitting.values()), default=0)
        rank = self._empty or next(rank for rank in (0, *ranks) if rank >= needed)
        try:
            if rank not in (0, self._rank):
                self.free()
                with_room(self._size(rank), partial(self._make, rank))
        except Exception as error:
            self.free()
            if not is_out_of_memory(error):
                raise
            free_memory(error)
            return ["blocks ran uncompiled, which is slower: there was no room for the slots of adapters"]
        for site in fitting:
            site.put_in(slot=rank > 0)
        if rank:
            _fill([(site.slot, parts) for site, parts in fitting.items()])
        if not reasons:
            return []
        why = " and ".join(dict.fromkeys(reasons))
        return [f"{len(reasons)} of {len(self._blocks)} blocks ran uncompiled, which is slower: adapters have {why}"]

    def free(self) -> None:
        """Give their memory back; until there is room again, blocks have no slots."""
        self.take_out()
        self._rank = 0
        for site in self._sites():
            site.slot = None

    def _make(self, rank: int) -> None:
        for site in self._sites():
            site.slot = SlotLinear(site.own, rank, self._dtype, self._device)
        self._rank = rank

    def _size(self, rank: int) -> int:
        """Bytes on the device."""
        features = sum(site.own.in_features + site.own.out_features for site in self._sites())
        return int(rank * features * self._dtype.itemsize)

    def _sites(self) -> Iterator[_Site]:
        return itertools.chain.from_iterable(self._blocks.values())

    @property
    def filled(self) -> bool:
        """Whether slots stand in blocks now."""
        return any(site.is_filled for site in self._sites())

    def take_out(self) -> None:
        """Let stand in blocks what stood there before: PEFT's layers, or the model's own."""
        for site in self._sites():
            site.take_out()


class SlotLinear(nn.Module):
    """A linear of a block, and the adapters of one picture."""

    down: nn.Parameter  # [rank, in_features]
    up: nn.Parameter  # [rank, out_features]

    def __init__(self, base: Any, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.base = base
        with torch.inference_mode(False):  # graphs tell tensors of inference from others
            for name, features in (("down", base.in_features), ("up", base.out_features)):
                zeros = torch.zeros(rank, features, dtype=dtype, device=device)
                # Not registered as others are: while another card's engine adds layers, those lose their memory (PEFT).
                self._parameters[name] = nn.Parameter(zeros, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        answer: torch.Tensor = self.base(x)
        return answer + nn.functional.linear(x, self.down) @ self.up


class _NoRoom(Exception):
    """What a slot cannot hold, with its article."""


class _Site:
    """Where a linear of a block stands; it may be PEFT's by now, or a slot."""

    def __init__(self, parent: nn.Module, attribute: str) -> None:
        self.slot: Any = None
        self._parent = parent
        self._attribute = attribute
        self._before: Any = None  # what stood there

    @property
    def layer(self) -> Any:
        """What stands there but for a slot."""
        return getattr(self._parent, self._attribute) if self._before is None else self._before

    @property
    def own(self) -> Any:
        """The model's own linear."""
        return self.layer.get_base_layer() if isinstance(self.layer, LoraLayer) else self.layer

    @property
    def is_filled(self) -> bool:
        return self._before is not None

    def put_in(self, *, slot: bool) -> None:
        """The slot in the layer's place, or the model's own layer."""
        now = self.slot if slot else self.own
        self._before = self.layer
        setattr(self._parent, self._attribute, now)

    def take_out(self) -> None:
        if self._before is not None:
            setattr(self._parent, self._attribute, self._before)
            self._before = None


def _parts(layer: Any, highest: int) -> list[_Part]:
    """What the adapters that count add to `layer`. Raises _NoRoom with what a slot of rank `highest` cannot hold."""
    if not isinstance(layer, LoraLayer):
        return []
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    parts: list[_Part] = []
    for name in active:
        down, up = layer.lora_A[name], layer.lora_B[name]
        if name in layer.lora_magnitude_vector:
            raise _NoRoom("a DoRA's magnitudes")
        if not (isinstance(down, nn.Linear) and isinstance(up, nn.Linear)):
            raise _NoRoom("a LoKr's factors")
        if up.bias is not None:
            raise _NoRoom("biases")
        parts.append((down.weight, up.weight, layer.scaling[name]))
    if _rank(parts) > highest:
        raise _NoRoom(f"ranks of {_rank(parts)} together, and LORA_TARGET_RANKS are {highest} at most")
    return parts


def _rank(parts: Sequence[_Part]) -> int:
    return sum(len(down) for down, _, _ in parts)


def _fill(slots: Iterable[tuple[SlotLinear, Sequence[_Part]]]) -> None:
    """All at once: a transformer has hundreds of linears, and each copy alone would be a launch of its own."""
    into, values, unused = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    for slot, parts in slots:
        start = 0
        for down, up, scale in parts:
            rows = slice(start, start := start + len(down))
            into += slot.down[rows], slot.up[rows]
            values += down, up.T * scale
        if start < len(slot.down):
            unused += slot.down[start:], slot.up[start:]
    if unused:
        torch._foreach_zero_(unused)
    if into:
        torch._foreach_copy_(into, values)
