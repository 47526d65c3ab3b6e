"""The ways that benchmarks/gpu.py draws the same picture, a row each. No torch."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

PLAIN = "plain diffusers"
BY_THE_CARD = "+ attention by the card"
AS_SERVED = "+ compiled blocks"  # what a worker does by itself where the model fits


class LeftOut(Exception):
    """Says why a way is not tried here."""


@dataclass(frozen=True)
class Way:
    """One way to draw the same picture: of this worker, unless `diffusers` says which of diffusers' own it is."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    diffusers: str | None = None  # plain, or an offload_type of enable_group_offload
    adapters: tuple[int, ...] = ()  # their ranks
    cap: int | None = None  # gigabytes of the card, its context among them
    compiled: bool = False  # whether it is a fault where blocks run as they are
    speed: str | None = None  # of the request
    against: str | None = PLAIN  # the way whose picture this one's is held against
    steps: int | None = None  # fewer, where a whole picture would take minutes
    wants: tuple[str, ...] = ()  # packages


_EAGER = {"compile": False, "memory_mode": "full"}
_COMPILED = {"compile": True, "memory_mode": "full"}
_FP8 = {"quantization": "fp8", "compile": True}
_ONE, _FOUR = (16,), (16, 32, 16, 32)
_PEFT, _TORCHAO, _ACCELERATE = ("peft",), ("torchao",), ("accelerate",)


def _within(cap: int) -> Way:
    return Way(f"within {cap} GB", cap=cap, against=AS_SERVED)


def _offload(kind: str, steps: int | None = None) -> Way:
    settings = {"memory_mode": f"{kind}_offload", "compile": False}
    return Way(f"diffusers' {kind} offload", settings, against=BY_THE_CARD, steps=steps, wants=_ACCELERATE)


# In the order in which they are drawn: where time is short the last are left out.
WAYS: tuple[Way, ...] = (
    Way(PLAIN, diffusers="plain"),
    Way("this worker, everything resident", {**_EAGER, "attention_backend": "native"}),
    Way(BY_THE_CARD, _EAGER),
    Way(AS_SERVED, _COMPILED, compiled=True),
    Way("+ fp8", _FP8, compiled=True, wants=_TORCHAO),
    Way("profile near", {"profile": "near"}),
    Way("profile fast", {"profile": "fast"}),
    _within(24),
    _within(16),
    Way("diffusers' group offload, blocks", diffusers="block_level"),
    Way("one adapter", _EAGER, adapters=_ONE, against=None, wants=_PEFT),
    Way("one adapter, compiled", _COMPILED, adapters=_ONE, compiled=True, against="one adapter", wants=_PEFT),
    Way("four adapters", _EAGER, adapters=_FOUR, against=None, wants=_PEFT),
    Way("four adapters, compiled", _COMPILED, adapters=_FOUR, compiled=True, against="four adapters", wants=_PEFT),
    Way("fp8, one adapter", _FP8, adapters=_ONE, compiled=True, against="one adapter", wants=_TORCHAO + _PEFT),
    Way("balanced", _COMPILED, speed="balanced"),
    Way("fast", _COMPILED, speed="fast"),
    _within(18),
    _within(12),
    Way("adaptive norms ahead", {"memory_mode": "modulation_cache"}, against=AS_SERVED),
    Way("profile exact", {"profile": "exact"}),
    Way("diffusers' group offload, leaves", diffusers="leaf_level"),
    _offload("model"),
    _offload("sequential", steps=2),
    Way("nf4", {"quantization": "nf4", "compile": False}, wants=("bitsandbytes",)),
)


def with_references(ways: Sequence[Way], measured: Container[str]) -> tuple[Way, ...]:
    """`ways` in the order in which they are drawn: those that have no figures yet, and what they are held against.

    Those whose names are in `measured` come last.
    """
    names = {way.name for way in ways}
    first = {way.name for way in ways if way.name not in measured}
    for way in reversed(WAYS):  # what one is held against stands before it
        if way.name in first and way.against:
            first.add(way.against)
    first.add(PLAIN)
    last = [way for way in WAYS if way.name in names - first]
    return (*(way for way in WAYS if way.name in first), *last)


def chosen(patterns: Sequence[str]) -> tuple[Way, ...]:
    """The rows whose names fit one of `patterns` (`within*`, say); all where there are none.

    Raises ValueError where a pattern fits no row.
    """
    for pattern in patterns:
        if not any(fnmatch(way.name, pattern) for way in WAYS):
            names = ", ".join(way.name for way in WAYS)
            raise ValueError(f"--ways: {pattern!r} fits no way; there are {names}")
    return tuple(way for way in WAYS if not patterns or any(fnmatch(way.name, pattern) for pattern in patterns))
