"""The process that benchmarks/serving.py measures: one worker, served in this project's way or in the plain one.

`plain` is what workers do: a synchronous handler in runpod.serverless.start. Both run the same road on the same engine.
With SECONDS above 0 the device is a stand-in that sleeps as long and then hands over a photograph of 1024x1024, since
sleeping lets go of the interpreter as a card does; with 0 it is the shipped model. Every turn on the device is
written to LOG as a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import handler
from src.catalog import get_model
from src.engine import Engine, load_engine
from src.job import Job, OnProgress
from src.outputs import Generation
from src.plan.plan import Plan

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("way", choices=("ours", "plain"))
parser.add_argument("seconds", type=float)
parser.add_argument("log", type=Path)


class LoggedEngine:
    """An engine that writes down when it was busy."""

    def __init__(self, engine: Engine, log: Path) -> None:
        self._engine = engine
        self._log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def run(self, plan: Plan, on_progress: OnProgress | None = None) -> Generation:
        began = time.time()
        generation = self._engine.run(plan, on_progress)
        with self._log.open("a") as file:
            file.write(json.dumps({"began": began, "ended": time.time()}) + "\n")
        return generation


def sleeping_engine(seconds: float) -> Engine:
    import numpy as np
    import torch

    from benchmarks.photographs import photographs
    from tests.fakes import FakePipeline

    class Sleeping(FakePipeline):
        photograph = torch.from_numpy(np.array(photographs(1, 1024)[0])).permute(2, 0, 1)[None] / 255

        def __call__(self, **arguments: Any) -> SimpleNamespace:
            steps = arguments["num_inference_steps"]
            for step in range(steps):
                time.sleep(seconds / 8)
                arguments["callback_on_step_end"](self, step, 0, {"latents": torch.zeros(1)})
            return SimpleNamespace(images=self.photograph)

    model = get_model("flux-shapes")
    return Engine(Sleeping(), model, None)


def main() -> None:
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]  # the SDK reads the command line too
    settings = handler.get_settings()
    engine = sleeping_engine(arguments.seconds) if arguments.seconds else load_engine(settings)
    logged = cast(Engine, LoggedEngine(engine, arguments.log))
    if arguments.way == "plain":
        import runpod

        def plain(event: dict[str, Any]) -> dict[str, Any]:
            return handler.respond(event, Job.of(event), lambda: settings, lambda: logged)

        runpod.serverless.start({"handler": plain})
    else:
        from src.serving import logs, loop

        logs.configure(settings)
        answer = partial(handler.respond, settings=lambda: settings, engine=lambda: logged)
        sys.exit(loop.serve(answer, settings, lambda: logged, lambda: None))


if __name__ == "__main__":
    main()
