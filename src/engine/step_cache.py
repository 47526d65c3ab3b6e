"""Fewer steps computed than taken, where a request asks for that."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
from diffusers.hooks import HookRegistry, apply_taylorseer_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.taylorseer_cache import _TAYLORSEER_CACHE_HOOK

from src.catalog import SPEEDS
from src.engine.block_timing import lists_of_blocks
from src.plan.plan import Plan

_LAST = "proj_out"  # the layer whose answers are guessed


@contextmanager
def step_cache(pipeline: Any, plan: Plan) -> Iterator[None]:
    """Within it one picture of `plan` is denoised, or a batch; nothing of it is left to the next.

    Of a step that is guessed the blocks are left out, and the last layer's answer is guessed: what diffusers calls
    the lite mode, which knows no lists of blocks within others, as FLUX.3 has them, nor classes without its mixin.
    """
    row = SPEEDS[plan.sampling.speed]
    if row is None:
        yield
        return
    transformer = pipeline.transformer
    blocks = (f"{name}.{i}" for name, blocks in lists_of_blocks(transformer).items() for i in range(len(blocks)))
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    apply_taylorseer_cache(
        transformer,
        diffusers.TaylorSeerCacheConfig(
            cache_interval=row.interval,
            disable_cache_before_step=row.computed_first,
            taylor_factors_dtype=transformer.dtype,
            skip_predict_identifiers=[re.escape(name) for name in blocks],
            cache_identifiers=[_LAST],
        ),
    )
    registry.invalidate_child_registries_cache()
    try:
        if not plan.spec.cache_context:
            _set_cache_context(transformer, CacheContext("cond"))
        yield
    finally:
        _set_cache_context(transformer, None)
        registry.remove_hook(_TAYLORSEER_CACHE_HOOK, recurse=True)
        registry.invalidate_child_registries_cache()
