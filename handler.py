"""The worker: event -> Request (validated) -> Plan (decided) -> pictures (engine) -> response (delivery).

Importing this module does nothing: the engine is built once per process, before RunPod's loop starts
when this file is run, and on first use elsewhere.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from src.delivery import deliver
from src.errors import InternalError, InvalidRequest, WorkerError, redact
from src.plan import make_plan
from src.request import read_request, show
from src.settings import Settings

if TYPE_CHECKING:
    from src.engine import Engine, OnProgress

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


def handler(event: dict[str, Any], on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Answer one job, `{"id": ..., "input": {...}}`; never raises. `on_progress` hears of every step."""
    return respond(event, get_settings, get_engine, on_progress)


def respond(
    event: object,
    settings: Callable[[], Settings],
    engine: Callable[[], Engine],
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """The whole road, and what a client is told where it ends early."""
    include_traceback = False
    try:
        include_traceback = settings().include_traceback
        request, faults = read_request(event)
        plan = make_plan(
            request, faults, engine().model, max_pixels=settings().max_pixels, batch_size=settings().batch_size
        )
        generation = engine().run(plan, on_progress)
        return deliver(generation, plan, engine().model, engine().revision)
    except WorkerError as error:
        failure = error
    except Exception as error:  # noqa: BLE001 - a client always gets an answer
        failure = InternalError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
    job = event.get("id") if isinstance(event, dict) else None
    log.error("job %s: %s", redact(show(job)), failure.summary)
    if not isinstance(failure, InvalidRequest):
        log.error("%s", redact("".join(traceback.format_exception(failure))))
    return failure.to_response(include_traceback=include_traceback)


def main() -> None:
    """Load the model, then serve."""
    from src.serving import serve

    try:
        settings = get_settings()
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        log.setLevel(settings.log_level)
        get_engine()
    except WorkerError as error:
        sys.exit(redact(f"{error.code}: {error}"))
    serve(handler)


if __name__ == "__main__":
    main()
