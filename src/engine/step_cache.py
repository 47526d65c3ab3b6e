"""Fewer steps computed than taken, where a request asks for that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import diffusers

from src.catalog import SPEEDS
from src.plan.plan import Plan


@contextmanager
def step_cache(pipeline: Any, plan: Plan) -> Iterator[None]:
    """Within it one picture of `plan` is denoised, or a batch; nothing of it is left to the next."""
    row = SPEEDS[plan.sampling.speed]
    if row is None:
        yield
        return
    transformer = pipeline.transformer
    transformer.enable_cache(
        diffusers.TaylorSeerCacheConfig(
            cache_interval=row.interval,
            disable_cache_before_step=row.computed_first,
            taylor_factors_dtype=transformer.dtype,
            use_lite_mode=True,  # of the last layer alone
        )
    )
    try:
        with nullcontext() if plan.spec.cache_context else transformer.cache_context("cond"):
            yield
    finally:
        transformer.disable_cache()
