"""The worker: event -> Request (validated) -> Plan (decided) -> pictures (engine) -> response (delivery).

Importing this module does nothing: the engine is built once per process, before RunPod's loop starts
when this file is run, and on first use elsewhere.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from src.delivery import deliver
from src.errors import InternalError, WorkerError, redact
from src.plan import Progress, make_plan
from src.request import read_request
from src.settings import Settings

if TYPE_CHECKING:
    from src.engine import Engine

log = logging.getLogger("worker")


@cache
def get_settings() -> Settings:
    """The settings of this process."""
    return Settings.from_environment()


@cache
def get_engine() -> Engine:
    """The engine of this process; the first call loads the model."""
    from src.engine import load_engine  # torch, which nobody should wait for who only reads this module

    return load_engine(get_settings())


def handler(event: dict[str, Any], on_progress: Callable[[Progress], None] | None = None) -> dict[str, Any]:
    """Answer one job, `{"id": ..., "input": {...}}`; never raises. `on_progress` hears of every step."""
    include_traceback = True
    try:
        settings = get_settings()
        include_traceback = settings.include_traceback
        return answer(event, get_engine(), settings, on_progress)
    except WorkerError as error:
        failure = error
    except Exception as error:
        failure = InternalError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
    job = event.get("id") if isinstance(event, dict) else None
    log.error("job %s: %s: %s", job, failure.code, redact(str(failure)), exc_info=failure.__cause__)
    return failure.to_response(include_traceback=include_traceback)


def answer(
    event: object, engine: Engine, settings: Settings, on_progress: Callable[[Progress], None] | None = None
) -> dict[str, Any]:
    """The whole road; raises WorkerError."""
    request = read_request(event)
    plan = make_plan(request, engine.model, max_pixels=settings.max_pixels, batch_size=settings.batch_size)
    generation = engine.run(plan, on_progress)
    return deliver(generation, plan, engine.model, engine.revision)


def main() -> None:
    """Load the model, then serve."""
    from src.serving import serve

    try:
        settings = get_settings()
        logging.basicConfig(level=settings.log_level, format="%(levelname)s %(name)s: %(message)s")
        get_engine()
    except WorkerError as error:
        sys.exit(redact(f"{error.code}: {error}"))
    serve(handler)


if __name__ == "__main__":
    main()
