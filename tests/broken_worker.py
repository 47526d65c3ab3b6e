"""handler.py with a device that fails after the warm-up: `python -m tests.broken_worker`."""

from __future__ import annotations

import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import handler
from src.catalog import get_model
from src.engine import Engine
from src.serving import logs, loop
from tests.fakes import FakePipeline


class Breaking(FakePipeline):
    """Fails for ever after its first two calls."""

    def __call__(self, *, prompt_embeds: Any, pooled_prompt_embeds: Any, **others: Any) -> SimpleNamespace:
        if len(self.calls) >= 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().__call__(prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds, **others)


if __name__ == "__main__":
    settings = handler.get_settings()
    model = get_model("flux-shapes")
    engine = Engine(Breaking(), model, None)
    logs.configure(settings)
    answer = partial(handler.respond, settings=lambda: settings, engine=lambda: engine)
    sys.exit(loop.serve(answer, settings, lambda: engine, lambda: None))
