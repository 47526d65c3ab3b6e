"""How long blocks of a transformer take here, compiled and as they are: the cost model is held against that."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

_TIMES = 3
KINDS = ("transformer_blocks", "single_transformer_blocks")


class BlockSeconds(NamedTuple):
    """Of one call of a block; `compiled` is None where nothing was compiled."""

    eager: float
    compiled: float | None


def time_blocks(
    transformer: Any, draw: Callable[[], object], synchronize: Callable[[], None], *, compiled: bool
) -> Mapping[str, BlockSeconds]:
    """Of the last block of each kind, with what it gets in `draw`, which is called once.

    Its weights are on the device then, wherever they live otherwise.
    """
    seconds: dict[str, BlockSeconds] = {}

    def time_kind(kind: str) -> Callable[..., None]:
        def hook(block: Any, inputs: tuple[Any, ...], named: dict[str, Any], _: Any) -> None:
            if kind in seconds:
                return
            stances = ["force_eager", *(["eager_on_recompile"] if compiled else [])]
            took = []
            for stance in stances:
                with torch.compiler.set_stance(stance):
                    took.append(_shortest(lambda: block.forward(*inputs, **named), synchronize))
            seconds[kind] = BlockSeconds(took[0], took[1] if compiled else None)

        return hook

    hooks = [
        # First of all, or the hooks that bring weights would have taken them away again.
        getattr(transformer, kind)[-1].register_forward_hook(time_kind(kind), with_kwargs=True, prepend=True)
        for kind in KINDS
        if len(getattr(transformer, kind))
    ]
    try:
        draw()
    finally:
        for hook in hooks:
            hook.remove()
    return seconds


def of_a_step(transformer: Any, seconds: Mapping[str, BlockSeconds]) -> float:
    """What all blocks take, compiled where they are."""
    return sum(
        len(getattr(transformer, kind)) * (block.eager if block.compiled is None else block.compiled)
        for kind, block in seconds.items()
    )


def _shortest(work: Callable[[], object], synchronize: Callable[[], None]) -> float:
    times = []
    for _ in range(_TIMES):
        synchronize()
        begun = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - begun)
    return min(times)
