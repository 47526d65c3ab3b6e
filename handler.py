"""The worker: event -> Request (validated) -> Plan (decided) -> pictures (engine) -> response (delivery).

Importing this module does nothing: the engine is built once per process, before RunPod's loop starts
when this file is run, and on first use elsewhere.
"""

from __future__ import annotations

import os
import signal
import time

if __name__ == "__main__":  # first of all: SIGTERM may come while the imports below take their seconds
    _BEGUN = time.perf_counter()

    def _leave_imports(*_: object) -> None:
        os.write(2, b"INFO worker: stopping because of SIGTERM, while the worker's code was being imported\n")
        os._exit(0)

    signal.signal(signal.SIGTERM, _leave_imports)

import logging
import sys
import threading
import traceback
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from src.catalog import PROFILES
from src.errors import Cancelled, InternalError, InvalidRequest, TimedOut, WorkerError, let_go, of_the_machine
from src.job import Job, OnProgress
from src.plan.plan import Plan, make_plan
from src.redaction import redact
from src.request.adapters import AdapterStore
from src.request.images import load_pictures
from src.request.openai import own_call
from src.request.reading import Reading, read_request
from src.response.delivery import deliver, encodable
from src.response.describe import describe, show_plan
from src.response.openai import in_openai_form
from src.response.storage import BroughtBucket, Bucket, read_bucket
from src.serving.logs import job_ended, keep_secrets_out, log
from src.settings import Settings
from src.stages import START

if TYPE_CHECKING:
    from src.engine import AnyEngine, Engines


_loading = threading.Lock()


@cache
def get_settings() -> Settings:
    """The settings of this process."""
    keep_secrets_out()
    settings = Settings.from_environment()
    settings.add_packages()
    return settings


@cache
def get_bucket() -> Bucket | None:
    """Where this process uploads pictures; None where no bucket is set."""
    return Bucket.from_settings(get_settings())


def get_engine() -> Engines:
    """The engine of this process; the first call loads the model, and others wait for it."""
    with _loading:
        return _load_engine()


@cache
def check_start() -> None:
    """Raise a WorkerError with all that would end the start of this process later."""
    from src.serving import startup

    startup.check_start(get_settings())


@cache
def read_ahead() -> None:
    """Begin to read the model's files, where they are here: before all that takes time without them."""
    from src.weights import read_ahead

    read_ahead.read_ahead(get_settings())


@cache
def find_files() -> None:
    """See that the model's files are here; what came only now is read ahead now."""
    from src.serving import startup
    from src.weights import read_ahead

    if startup.find_files(get_settings()):
        read_ahead.read_ahead(get_settings())


@cache
def _load_engine() -> Engines:
    read_ahead()
    check_start()
    find_files()
    with START.stage("torch"):
        from src.engine import load_engines  # which nobody should wait for who only reads this module
    return load_engines(get_settings())


def handler(event: dict[str, Any], on_progress: OnProgress | None = None) -> Any:
    """Answer one job, `{"id": ..., "input": {...}}`, with a dict; never raises. `on_progress` gets every step.

    A call of OpenAI's API is answered as RunPod passes it on: a list of one where pictures were asked for.
    """
    return answer(event, Job.of(event, on_progress=on_progress))


def answer(event: object, job: Job) -> Any:
    """`handler`, for whoever holds the job and may stop it."""
    answered = respond(event, job, get_settings, get_engine, get_bucket)
    return in_openai_form(event, answered, lambda: get_engine().model)


def respond(
    event: object,
    job: Job,
    settings: Callable[[], Settings],
    engine: Callable[[], AnyEngine],
    bucket: Callable[[], Bucket | None] = lambda: None,
) -> dict[str, Any]:
    """The whole road, and what a client is told where it ends early."""
    include_traceback, plan, brought = False, None, BroughtBucket()
    try:
        include_traceback = settings().include_traceback
        call = own_call(event, lambda: engine().model)
        reading, brought = read_request(call.event), read_bucket(event, settings(), job)
        reading = reading._replace(faults=(*call.faults, *reading.faults, *brought.faults))
        if reading.request.describe and not reading.faults:
            job_ended(job, "described", None)
            return encodable(describe(engine().model, engine().revision, settings(), engine().loaded()))
        plan = _plan(reading, job, settings(), engine())
        if reading.request.dry_run:
            job_ended(job, "planned", plan)
            return encodable(show_plan(plan))
        job.work = plan.work
        engine().fetch(plan, job.step_aside)
        destination = call.destination(brought.bucket or bucket())  # before anything is drawn in vain
        noise = engine().prepare(plan)
        generation = job.on_device(lambda: engine().draw(plan, job.report, noise)).generation()
        response = deliver(
            generation,
            plan,
            engine().model,
            engine().revision,
            job=job,
            bucket=destination,
            max_bytes=int(settings().max_response_mb * 1e6),
        )
        job.check_cancelled()  # nobody would get what was made of it
    except WorkerError as error:
        failure = error
    except Exception as error:  # noqa: BLE001 - a client always gets an answer
        failure = of_the_machine(error) or InternalError(f"{type(error).__name__}: {error}")
        failure.__cause__ = error
    else:
        job_ended(job, "success", plan)
        return encodable(response)
    finally:
        job.give_back_ticket()
        brought.close()
    try:
        let_go(failure)
        return _refuse(failure, job, plan, include_traceback)
    finally:
        del failure  # it holds this frame, and this frame it


def _plan(reading: Reading, job: Job, settings: Settings, engine: AnyEngine) -> Plan:
    """The request decided, with the pictures and adapters that it names, or an error with all that is wrong of them."""
    request, faults, warnings = reading
    pictures, bad_pictures, odd_pictures = load_pictures(request, job)
    adapters, bad_adapters, old_adapters = AdapterStore(settings).load(request, job)
    unfit_adapters, odd_adapters = engine.check_adapters(adapters)
    return make_plan(
        request,
        (*faults, *bad_pictures, *bad_adapters, *unfit_adapters),
        engine.model,
        pictures,
        adapters,
        warnings=(*warnings, *odd_pictures, *old_adapters, *odd_adapters),
        max_pixels=settings.max_pixels,
        batch_size=settings.batch_size,
        controlnets=settings.controlnets,
        speed=PROFILES[settings.profile].speed,
        upsampler=settings.prompt_upsampler is not None,
    )


def _refuse(failure: WorkerError, job: Job, plan: Plan | None, include_traceback: bool) -> dict[str, Any]:
    """Write down and tell what went wrong."""
    expected = isinstance(failure, (InvalidRequest, Cancelled, TimedOut))
    level = logging.INFO if expected else logging.ERROR
    job_ended(job, failure.code, plan, error=failure.summary, level=level)
    if not expected:
        log.error("%s", redact("".join(traceback.format_exception(failure))), extra={"facts": {"job": job.id}})
    return failure.to_response(include_traceback=include_traceback)


def main(begun: float | None = None) -> None:
    """Load the model, then serve; the process `begun` at this time of time.perf_counter()."""
    from src.serving import leaving, logs

    try:
        with START.stage("settings", since=begun):
            settings = get_settings()
            signal.signal(signal.SIGTERM, leaving.leave_at_once)  # during the start; the loop has its own
            logs.configure(settings, sdk=False)
            read_ahead()  # the SDK alone takes a second to import
            logs.configure_sdk()
            from src.serving import loop
        status = loop.serve(answer, settings, get_engine, get_bucket, check_start=check_start, find_files=find_files)
        leaving.leave(status)
    except WorkerError as error:
        sys.exit(redact(f"{error.code}: {error}"))


if __name__ == "__main__":
    main(_BEGUN)
