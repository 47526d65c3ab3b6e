"""RunPod's loop around the worker's synchronous answer: many jobs in hand, one at a time on each device.

Knows nothing of requests; of a client's job it knows what a Job reports.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

import runpod
from runpod.serverless.modules.rp_logger import RunPodLogger
from runpod.serverless.modules.worker_state import IS_LOCAL_TEST

from src.errors import InvalidSettings, WorkerError
from src.job import Job
from src.job_queue import JobQueue
from src.redaction import redact
from src.response.progress import Watcher
from src.response.storage import Bucket
from src.serving import sdk, startup
from src.serving.control_plane import MOST_JOBS, ControlPlane
from src.serving.logs import SDK_LEVELS
from src.serving.prefetch import MAX_DELIVERING, Held, Prefetch
from src.serving.warm_up import seconds_of, warm_up
from src.settings import MAX_PREFETCH, Settings
from src.stages import START

if TYPE_CHECKING:
    from src.engine import AnyEngine

log = logging.getLogger("worker")
T = TypeVar("T")
Answer = Callable[[object, Job], Any]

_JOBS_OF_THE_SDKS_LOOP = 3  # where it cannot be replaced: keeps a device that needs a second a picture busy
_PROGRESS_SHARE = 5  # times as long as the latest update took passes until the next


def serve(
    answer: Answer,
    settings: Settings,
    engine: Callable[[], AnyEngine],
    bucket: Callable[[], Bucket | None],
    *,
    check_start: Callable[[], None] = lambda: None,
    find_files: Callable[[], None] = lambda: None,
) -> int:
    """Check the worker, then take jobs until told to stop; the exit status of the process.

    RunPod's own arguments (--rp_serve_api, --test_input) work. On RunPod the checks are the SDK's fitness checks: what
    fails is named to the platform, and the process ends.
    """
    RunPodLogger().level = SDK_LEVELS[settings.log_level]  # its default, DEBUG, writes results into the log
    worker = Worker(answer, settings)

    def check_bucket() -> None:
        startup.check_bucket(bucket())

    def check_device() -> None:
        with START.stage("torch"):
            from src.engine import check_device
        with START.stage("device"):
            worker.on_device(check_device)

    def load_model() -> None:
        worker.serve_devices(engine().at_once)

    def warm_up() -> None:
        with START.stage("warm-up") as facts:
            facts.update(worker.warm_up(engine()))

    arguments, _ = runpod.serverless.parser.parse_known_args()
    _check_arguments(arguments)
    checks = [check_start, check_bucket, find_files, check_device, load_model, warm_up]
    serves_http = bool(settings.runpod_realtime_port or arguments.rp_serve_api)
    if IS_LOCAL_TEST or serves_http or arguments.test_input:
        for check in checks if serves_http else checks[:-1]:
            check()
        if not serves_http:
            log.info("no warm-up for a single job: blocks run uncompiled, which is slower")
        START.ready()
    else:
        for check in checks:
            runpod.serverless.register_fitness_check(_redacted(check))
    runpod.serverless.start({"handler": worker.run, "concurrency_modifier": worker.jobs_in_hand})
    worker.close()
    return worker.exit_status


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Raise InvalidSettings where the SDK's HTTP server would refuse to start, but only once the model is loaded."""
    if arguments.rp_serve_api and arguments.rp_api_concurrency != 1:
        raise InvalidSettings(
            f"--rp_api_concurrency={arguments.rp_api_concurrency}: the SDK's HTTP server runs in one process alone; "
            "leave it out, or give 1: jobs wait for a device in any case"
        )


def _redacted(check: Callable[[], None]) -> Callable[[], None]:
    """`check` under its own name, its failure without secrets: the SDK logs it and reports it."""

    def run() -> None:
        try:
            check()
        except WorkerError as error:
            raise RuntimeError(redact(f"{error.code}: {error}")) from None
        except Exception as error:  # noqa: BLE001 - it goes on, without secrets
            raise RuntimeError(redact(f"{type(error).__name__}: {error}")) from None

    run.__name__ = check.__name__
    return run


class Worker:
    """Runs each job's `answer` on a thread of its own, its device work in the one queue, and speaks with RunPod."""

    def __init__(self, answer: Answer, settings: Settings) -> None:
        self.exit_status = 0
        self._answer = answer
        self._settings = settings
        self._queue = JobQueue()
        self._threads = ThreadPoolExecutor(MAX_PREFETCH + MAX_DELIVERING, thread_name_prefix="job")
        self._prefetch = Prefetch(settings.prefetch_jobs)
        self._looked_for_scaler = False
        self._control_plane: ControlPlane | None = None
        self._in_hand: dict[Job, Watcher] = {}

    def on_device(self, work: Callable[[], T]) -> T:
        """What `work` gives, run on the device's thread."""
        return self._queue.ticket().run(work)

    def serve_devices(self, devices: int) -> None:
        """Let so many jobs have a device at once."""
        self._queue.serve(devices)
        self._prefetch.devices = devices

    def warm_up(self, engine: AnyEngine) -> dict[str, float]:
        """Draw the configured sizes, and learn from them how long a job will take; a picture's seconds, by size."""
        took: dict[str, float] = {}
        for warm in warm_up(engine, self._settings, self.on_device):
            took |= seconds_of(warm)
            self._prefetch.observe(warm.seconds, warm.work)
        return took

    def jobs_in_hand(self, _: int) -> int:
        """The SDK's concurrency_modifier: asked before each look for jobs, first of all things in its event loop.

        Always the same, since the SDK waits for an empty worker to change it.
        """
        if not self._looked_for_scaler:
            self._looked_for_scaler = True
            self._take_over(sdk.running_scaler())
            START.ready()
        return (
            MOST_JOBS
            if self._control_plane
            else self._prefetch.devices * (self._settings.prefetch_jobs or _JOBS_OF_THE_SDKS_LOOP)
        )

    def _take_over(self, scaler: Any) -> None:
        """Replace the SDK's calls, or none of them where one is not the SDK's own."""
        if moved := sdk.moved(scaler):
            log.warning(
                "runpod %s is not as this worker knows it, so its own loop runs: %s; pictures are the same, and "
                "requirements.txt has the version that is known",
                runpod.__version__,
                "; ".join(moved),
            )
            return
        self._control_plane = ControlPlane(scaler, self._wanted, self._prefetch.trip)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop, number.name)

    def _wanted(self, coming: int, delivered_bytes: int) -> int:
        """How many jobs to ask for now."""
        held = [Held(job, watcher.seconds_left()) for job, watcher in self._in_hand.items()]
        return self._prefetch.wanted(held, coming, delivered_bytes)

    async def run(self, event: dict[str, Any]) -> Any:
        """The SDK's handler: the answer to one job. A cancelled job is stopped, and gone before this returns."""
        watcher = Watcher()
        job = Job.of(
            event, on_progress=watcher.see, queue_up=self._queue.ticket, timeout=self._settings.request_timeout
        )
        running = asyncio.get_running_loop().run_in_executor(self._threads, self._answer, event, job)
        telling = asyncio.create_task(self._tell(event["id"], job, watcher, running))
        self._in_hand[job] = watcher
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            job.cancel()
            raise
        finally:
            try:
                await _finished(running, telling)
            finally:
                del self._in_hand[job]
                self._learn(job, running.result())

    def _learn(self, job: Job, response: Any) -> None:
        """How long jobs take, and whether the device still works; pictures for OpenAI's clients are a list."""
        succeeded = isinstance(response, list) or response.get("status") == "success"
        if job.device_seconds is not None and succeeded:
            self._prefetch.observe(job.device_seconds, job.work, job.seconds.get("prepare", 0.0))
        if isinstance(response, dict) and response.get("refresh_worker"):
            self.exit_status = 1
            self._stop("a device that failed")
            if self._in_hand:
                del response["refresh_worker"]  # RunPod would end the process while the others are being told

    def close(self) -> None:
        """After the loop: nothing is left to do."""
        self._threads.shutdown()
        self._queue.close()

    async def _tell(self, id: str, job: Job, watcher: Watcher, running: asyncio.Future[Any]) -> None:
        """Post what `watcher` saw, now and then; returns with the job, and nothing is under way then."""
        posted, pause = None, self._settings.progress_interval
        while True:
            done, _ = await asyncio.wait({running}, timeout=pause)
            if done or job.cancelled or self._control_plane is None:
                return
            if (progress := watcher.progress()) != posted:
                seconds = await self._control_plane.post_progress(id, progress)
                pause = max(self._settings.progress_interval, _PROGRESS_SHARE * seconds)  # the result waits for it
                posted = progress

    def _stop(self, reason: str) -> None:
        log.info("stopping because of %s: jobs in hand are finished, no more are taken", reason)
        if self._control_plane is not None:
            for number in (signal.SIGTERM, signal.SIGINT):  # once more, it changes nothing
                asyncio.get_running_loop().remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)
            self._control_plane.stop()
        else:  # the SDK's own HTTP server ends by this, after the answers under way
            asyncio.get_running_loop().call_later(1.0, signal.raise_signal, signal.SIGTERM)


async def _finished(*tasks: asyncio.Future[Any]) -> None:
    """Wait for all of them, even when told to stop waiting; that is passed on afterwards."""
    cancelled = None
    while pending := [task for task in tasks if not task.done()]:
        try:
            await asyncio.wait(pending)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled:
        raise cancelled
