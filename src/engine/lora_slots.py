"""Adapters in compiled blocks: next to every linear two matrices whose shapes no adapter changes.

A graph is compiled for shapes, and adapters differ in rank and in the layers that they adapt. Padded with zeros to a
target rank they all look alike, as in PEFT's hotswapping (https://huggingface.co/docs/peft/package_reference/hotswap);
several that count at once stand one below the other, their scales multiplied in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from src.weights.placement import block_of, is_modulation

_Part = tuple[torch.Tensor, torch.Tensor, float]  # what one adapter adds: down [rank, in], up [out, rank], its scale


class LoraSlots:
    """The slots of one transformer's blocks, for adapters whose ranks are at most the highest of `ranks` together.

    Without `modulation` the linears of adaptive norms have none: they are asked ahead, outside of the blocks.
    """

    def __init__(
        self, transformer: Any, ranks: Sequence[int], device: torch.device, *, modulation: bool = True
    ) -> None:
        self.ranks = tuple(sorted(ranks))
        self._memory = {"dtype": transformer.dtype, "device": device}
        self.compiled: set[int] = set()  # ranks that there are graphs for
        self._empty: int | None = None  # the rank of slots that are there without any adapter
        self._blocks: dict[str, list[_Site]] = {}
        for name, layer in transformer.named_modules():
            block = block_of(name)
            if block and isinstance(layer, nn.Linear) and (modulation or not is_modulation(name)):
                parent, _, attribute = name.rpartition(".")
                self._blocks.setdefault(block, []).append(_Site(transformer.get_submodule(parent), attribute))

    @property
    def size(self) -> int:
        """Bytes on the device."""
        linears = [site.layer for sites in self._blocks.values() for site in sites]
        features = sum(linear.in_features + linear.out_features for linear in linears)
        return int(max(self.ranks, default=0) * features * self._memory["dtype"].itemsize)

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

    def put_in(self) -> list[str]:
        """Let slots stand for the adapters that count now, where graphs were compiled for that; warnings.

        A block with something that no slot can hold keeps PEFT's layers, and runs as it is.
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
        slots = {site: site.put_in(self.ranks if rank else (), self._memory) for site in fitting}
        if rank:
            _fill([(slots[site], parts) for site, parts in fitting.items()], rank)
        if not reasons:
            return []
        why = " and ".join(dict.fromkeys(reasons))
        return [f"{len(reasons)} of {len(self._blocks)} blocks ran uncompiled, which is slower: adapters have {why}"]

    @property
    def filled(self) -> bool:
        """Whether slots stand in blocks now."""
        return any(site.is_filled for sites in self._blocks.values() for site in sites)

    def take_out(self) -> None:
        """Let stand in blocks what stood there before: PEFT's layers, or the model's own."""
        for sites in self._blocks.values():
            for site in sites:
                site.take_out()


class SlotLinear(nn.Module):
    """A linear of a block, and the adapters of one picture."""

    down: nn.Parameter  # [rank, in_features]
    up: nn.Parameter  # [rank, out_features]

    def __init__(self, base: Any, ranks: Sequence[int], memory: dict[str, Any]) -> None:
        super().__init__()
        self.base = base
        with torch.inference_mode(False):  # graphs tell tensors of inference from others
            down = torch.zeros(max(ranks), base.in_features, **memory)
            up = torch.zeros(max(ranks), base.out_features, **memory)
            self._of_rank = {
                rank: (nn.Parameter(down[:rank], requires_grad=False), nn.Parameter(up[:rank], requires_grad=False))
                for rank in ranks
            }

    def use(self, rank: int) -> None:
        """Be of this rank."""
        self.down, self.up = self._of_rank[rank]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        answer: torch.Tensor = self.base(x)
        return answer + nn.functional.linear(x, self.down) @ self.up


class _NoRoom(Exception):
    """What a slot cannot hold, with its article."""


class _Site:
    """Where a linear of a block stands; it may be PEFT's by now, or a slot."""

    def __init__(self, parent: nn.Module, attribute: str) -> None:
        self._parent = parent
        self._attribute = attribute
        self._slot: SlotLinear | None = None
        self._before: Any = None  # what a slot stands for

    @property
    def layer(self) -> Any:
        return getattr(self._parent, self._attribute) if self._before is None else self._before

    @property
    def is_filled(self) -> bool:
        return self._before is not None

    def put_in(self, ranks: Sequence[int], memory: dict[str, Any]) -> Any:
        """A slot of these ranks in the layer's place; the model's own layer where there are none."""
        self._before = self.layer
        own = self._before.get_base_layer() if isinstance(self._before, LoraLayer) else self._before
        if ranks and self._slot is None:
            self._slot = SlotLinear(own, ranks, memory)
        now = self._slot if ranks else own
        setattr(self._parent, self._attribute, now)
        return now

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


def _fill(slots: Sequence[tuple[SlotLinear, Sequence[_Part]]], rank: int) -> None:
    """All at once: a transformer has hundreds of linears, and each copy alone would be a launch of its own."""
    into, values, unused = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
    for slot, parts in slots:
        slot.use(rank)
        start = 0
        for down, up, scale in parts:
            rows = slice(start, start := start + len(down))
            into += slot.down[rows], slot.up[rows]
            values += down, up.T * scale
        if start < rank:
            unused += slot.down[start:], slot.up[start:]
    if unused:
        torch._foreach_zero_(unused)
    if into:
        torch._foreach_copy_(into, values)
