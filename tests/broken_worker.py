"""handler.py with a device that fails after the warm-up: `python -m tests.broken_worker`."""

from __future__ import annotations

import sys
from functools import partial

import handler
from src.catalog import find_model
from src.engine import Engine
from src.serving import logs, loop
from tests.fakes import FakePipeline


class Breaking(FakePipeline):
    """Fails for ever after its first two calls."""

    def __call__(self, **arguments: object) -> object:
        if len(self.calls) >= 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().__call__(**arguments)


if __name__ == "__main__":
    settings = handler.get_settings()
    model = find_model("flux-shapes")
    assert model is not None
    engine = Engine(Breaking(), model, None)
    logs.configure(settings)
    answer = partial(handler.respond, settings=lambda: settings, engine=lambda: engine)
    sys.exit(loop.serve(answer, settings, lambda: engine, lambda: None))
