"""RunPod's loop around the worker's synchronous answer: many jobs in hand, one at a time on the device.

Knows nothing of requests, models or pictures' files beyond what a Job reports.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import runpod
from runpod.serverless.modules.rp_logger import RunPodLogger
from runpod.serverless.modules.rp_scale import JobScaler
from runpod.serverless.modules.worker_state import IS_LOCAL_TEST

from src.control_plane import ControlPlane
from src.device import Device
from src.errors import InvalidRequest, InvalidSettings, WorkerError, redact
from src.images import encode_image
from src.job import Job
from src.logs import SDK_LEVELS
from src.plan import Progress, make_plan
from src.prefetch import Prefetch
from src.request import read_request
from src.settings import MAX_PREFETCH, Settings
from src.storage import Bucket

if TYPE_CHECKING:
    from src.engine import Engine

log = logging.getLogger("worker")
Answer = Callable[[object, Job], dict[str, Any]]


def serve(
    answer: Answer,
    settings: Settings,
    engine: Callable[[], Engine],
    bucket: Callable[[], Bucket | None],
) -> int:
    """Check the worker, then take jobs until told to stop; the exit status of the process.

    RunPod's own arguments (--rp_serve_api, --test_input) work. On RunPod the checks are the SDK's fitness checks: what
    fails is named to the platform, and the process ends.
    """
    RunPodLogger().level = SDK_LEVELS[settings.log_level]  # its default, DEBUG, writes results into the log
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # while the model loads; the loop has its own
    worker = Worker(answer, settings)

    def check_bucket() -> None:
        if held := bucket():
            held.check()

    def check_device() -> None:
        from src.engine import check_device

        check_device()

    def load_model() -> None:
        engine()

    def warm_up() -> None:
        worker.warm_up(engine())

    checks = [check_bucket, check_device, load_model, warm_up]
    if IS_LOCAL_TEST or any(argument.startswith(("--test_input", "--rp_serve_api")) for argument in sys.argv):
        for check in checks[:-1]:
            check()
    else:
        for check in checks:
            runpod.serverless.register_fitness_check(_redacted(check))
    runpod.serverless.start({"handler": worker.run, "concurrency_modifier": worker.jobs_in_hand})
    worker.close()
    return worker.exit_status


def _redacted(check: Callable[[], None]) -> Callable[[], None]:
    """`check` under its own name, its failure without secrets: the SDK logs it and reports it."""

    def run() -> None:
        try:
            check()
        except WorkerError as error:
            raise RuntimeError(redact(f"{error.code}: {error}")) from None

    run.__name__ = check.__name__
    return run


class Worker:
    """Runs each job's `answer` on a thread of its own, its device work in the one line, and speaks with RunPod."""

    def __init__(self, answer: Answer, settings: Settings) -> None:
        self.exit_status = 0
        self._answer = answer
        self._settings = settings
        self._device = Device()
        self._threads = ThreadPoolExecutor(MAX_PREFETCH, thread_name_prefix="job")
        self._prefetch = Prefetch(settings.prefetch_jobs)
        self._control_plane: ControlPlane | None = None

    def warm_up(self, engine: Engine) -> None:
        """Draw the configured sizes once, and learn from the first how long a job will take."""
        model = engine.model
        sizes = self._settings.warmup_sizes
        for width, height in ((model.width, model.height),) if sizes is None else sizes:
            fields = {"prompt": "warm-up", "num_inference_steps": 2, "width": width, "height": height}
            try:
                plan = make_plan(*read_request({"input": fields}), model, max_pixels=self._settings.max_pixels)
            except InvalidRequest as error:
                raise InvalidSettings(f"WARMUP_SIZES: {error}") from error
            seconds = self._device.arrive().run(partial(engine.warm_up, plan, model.num_inference_steps))
            log.info("warm-up: a picture of %dx%d takes about %.2f s", width, height, seconds)
            self._prefetch.saw(seconds)

    def jobs_in_hand(self, _: int) -> int:
        """The SDK's concurrency_modifier: asked before each look for jobs, first of all things in its event loop."""
        if self._control_plane is None:
            scaler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)  # the SDK shows it nowhere else
            if not isinstance(scaler, JobScaler):
                raise TypeError(f"runpod's JobScaler should answer SIGTERM, not {scaler!r}")
            self._control_plane = ControlPlane(scaler)
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, self._stop, number.name)
        self._control_plane.end_if_stopping()
        return self._prefetch.jobs

    async def run(self, event: dict[str, Any]) -> dict[str, Any]:
        """The SDK's handler: the answer to one job. A cancelled job is stopped, and gone before this returns."""
        watcher = Watcher()
        job = Job.of(
            event,
            on_progress=watcher.see,
            place=self._device.arrive(),
            timeout=self._settings.request_timeout,
        )
        running = asyncio.get_running_loop().run_in_executor(self._threads, self._answer, event, job)
        telling = asyncio.create_task(self._tell(job, watcher, running))
        try:
            response = await asyncio.shield(running)
        except asyncio.CancelledError:
            job.cancel()
            raise
        finally:
            await _finished(running, telling)
        if job.device_seconds is not None:
            self._prefetch.saw(job.device_seconds)
        if response.get("refresh_worker"):
            self.exit_status = 1
            self._stop("a device that failed")
        return response

    def close(self) -> None:
        """After the loop: nothing is left to do."""
        self._threads.shutdown()
        self._device.close()

    async def _tell(self, job: Job, watcher: Watcher, running: asyncio.Future[Any]) -> None:
        """Post what `watcher` saw, now and then; returns with the job, and nothing is under way then."""
        told = None
        while True:
            done, _ = await asyncio.wait({running}, timeout=self._settings.progress_interval)
            if done or job.cancelled or self._control_plane is None:
                return
            if (progress := watcher.progress()) != told:
                await self._control_plane.post_progress(job.id, progress)
                told = progress

    def _stop(self, reason: str) -> None:
        log.info("stopping because of %s: jobs in hand are finished, no more are taken", reason)
        if self._control_plane is not None:
            self._control_plane.stop()


async def _finished(*tasks: asyncio.Future[Any]) -> None:
    """Wait for all of them, even when told to stop waiting; that is passed on afterwards."""
    told = None
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            told = error
    if told:
        raise told


class Watcher:
    """What the world may know of a job's progress."""

    def __init__(self) -> None:
        self._last = Progress("queued")
        self._preview: str | None = None
        self._denoising_since: float | None = None

    def see(self, progress: Progress) -> None:
        """Called on the job's and on the device's thread, never at once."""
        self._last = progress
        if progress.phase == "denoise" and self._denoising_since is None:
            self._denoising_since = time.monotonic()
        if progress.preview is not None:
            self._preview = base64.b64encode(encode_image(progress.preview, "JPEG", 80)).decode()

    def progress(self) -> dict[str, Any]:
        """As the client's /status shows it; `seconds_left` is None until a step is done."""
        last, since = self._last, self._denoising_since
        left = None
        if since is not None and last.step:
            left = round((time.monotonic() - since) / last.step * (last.steps - last.step), 1)
        told: dict[str, Any] = {
            "phase": last.phase,
            "step": last.step,
            "steps": last.steps,
            "percent": round(100 * last.step / last.steps) if last.steps else 0,
            "seconds_left": left,
        }
        if self._preview is not None:
            told["preview"] = self._preview
        return told
