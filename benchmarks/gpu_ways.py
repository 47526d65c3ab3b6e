"""The ways that benchmarks/gpu.py draws the same picture, a row each. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

PLAIN = "plain diffusers"  # what all others are held against
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
    steps: int | None = None  # fewer, where a whole picture would take minutes
    wants: tuple[str, ...] = ()  # packages


_EAGER = {"compile": False, "memory_mode": "full"}
_COMPILED = {"compile": True, "memory_mode": "full"}
_ONE, _FOUR = (16,), (16, 32, 16, 32)

# In the order in which they are drawn: where time is short the last are left out.
WAYS: tuple[Way, ...] = (
    Way(PLAIN, diffusers="plain"),
    Way("this worker, everything resident", {**_EAGER, "attention_backend": "native"}),
    Way("+ attention by the card", _EAGER),
    Way(AS_SERVED, _COMPILED, compiled=True),
    Way("+ fp8", {"quantization": "fp8", "compile": True}, compiled=True, wants=("torchao",)),
    Way("profile near", {"profile": "near"}),
    Way("profile fast", {"profile": "fast"}),
    Way("within 24 GB", cap=24),
    Way("within 16 GB", cap=16),
    Way("diffusers' group offload, blocks", diffusers="block_level"),
    Way("one adapter", _EAGER, adapters=_ONE, wants=("peft",)),
    Way("one adapter, compiled", _COMPILED, adapters=_ONE, compiled=True, wants=("peft",)),
    Way("four adapters", _EAGER, adapters=_FOUR, wants=("peft",)),
    Way("four adapters, compiled", _COMPILED, adapters=_FOUR, compiled=True, wants=("peft",)),
    Way(
        "fp8, one adapter",
        {"quantization": "fp8", "compile": True},
        adapters=_ONE,
        compiled=True,
        wants=("torchao", "peft"),
    ),
    Way("balanced", _COMPILED, speed="balanced"),
    Way("fast", _COMPILED, speed="fast"),
    Way("within 18 GB", cap=18),
    Way("within 12 GB", cap=12),
    Way("adaptive norms ahead", {"memory_mode": "modulation_cache"}),
    Way("profile exact", {"profile": "exact"}),
    Way("diffusers' group offload, leaves", diffusers="leaf_level"),
    Way("diffusers' model offload", {"memory_mode": "model_offload", "compile": False}, wants=("accelerate",)),
    Way(
        "diffusers' sequential offload",
        {"memory_mode": "sequential_offload", "compile": False},
        steps=2,
        wants=("accelerate",),
    ),
    Way("nf4", {"quantization": "nf4", "compile": False}, wants=("bitsandbytes",)),
)


def reference(way: Way) -> str | None:
    """The way whose picture `way`'s is held against: the plain one, or the first with the same adapters."""
    if not way.adapters:
        return PLAIN
    first = next(each.name for each in WAYS if each.adapters == way.adapters)
    return None if first == way.name else first


def chosen(patterns: Sequence[str]) -> tuple[Way, ...]:
    """The rows whose names fit one of `patterns` (`within*`, say); all where there are none.

    Raises ValueError where a pattern fits no row.
    """
    for pattern in patterns:
        if not any(fnmatch(way.name, pattern) for way in WAYS):
            names = ", ".join(way.name for way in WAYS)
            raise ValueError(f"--ways: {pattern!r} fits no way; there are {names}")
    return tuple(way for way in WAYS if not patterns or any(fnmatch(way.name, pattern) for pattern in patterns))
