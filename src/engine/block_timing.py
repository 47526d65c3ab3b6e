"""How long blocks of a transformer take here, compiled and as they are: the cost model is held against that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from src.engine.machine import shortest
from src.weights.placement import GB, Placement


def lists_of_blocks(network: Any) -> dict[str, nn.ModuleList]:
    """The blocks of a transformer or of a ControlNet, by their lists' names: transformer_blocks, say."""
    return {
        name: part
        for name, part in network.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) and type(part[0]).__name__.endswith("TransformerBlock")
    }


class BlockSeconds(NamedTuple):
    """The seconds of one call of a block; `compiled` is None where nothing was compiled."""

    eager: float
    compiled: float | None


def time_blocks(
    transformer: Any, draw: Callable[[], object], synchronize: Callable[[], None], *, compiled: bool
) -> Mapping[str, BlockSeconds]:
    """The seconds of the last block of each kind, with what it gets in `draw`, which is called once.

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
                    took.append(shortest(lambda: block.forward(*inputs, **named), synchronize))
            seconds[kind] = BlockSeconds(took[0], took[1] if compiled else None)

        return hook

    hooks = [
        # First of all, or the hooks that bring weights would have taken them away again.
        blocks[-1].register_forward_hook(time_kind(kind), with_kwargs=True, prepend=True)
        for kind, blocks in lists_of_blocks(transformer).items()
    ]
    try:
        draw()
    finally:
        for hook in hooks:
            hook.remove()
    return seconds


def compared(
    placement: Placement, step: float, peak: int | None, blocks: Mapping[str, BlockSeconds], transformer: Any
) -> str:
    """What was measured, and what the cost model had said, as a line of the log.

    `step` is the seconds of a step, `peak` the bytes of torch's allocator at most, None on the CPU.
    """
    words = [f"a step takes {step:.4f} s, and {placement.step_seconds:.4f} s were modelled"]
    if peak is not None:
        words.append(f"{peak / GB:.2f} GB at the peak, and {placement.peak / GB:.2f} GB were modelled")
    words.append(f"its blocks {of_a_step(transformer, blocks):.4f} s")
    for kind, each in blocks.items():
        compiled = "" if each.compiled is None else f" ({each.compiled * 1000:.2f} ms compiled)"
        words.append(f"one of {kind} {each.eager * 1000:.2f} ms{compiled}")
    return "warm-up: " + "; ".join(words)


def of_a_step(transformer: Any, seconds: Mapping[str, BlockSeconds]) -> float:
    """The seconds of all blocks, compiled where they are."""
    return sum(
        len(transformer.get_submodule(kind)) * (block.eager if block.compiled is None else block.compiled)
        for kind, block in seconds.items()
    )
