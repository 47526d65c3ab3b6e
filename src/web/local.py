"""RunPod's verbs, answered by this process: many jobs in hand, one at a time on the device, results kept for a while.

Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self, TypeVar

from src.errors import InternalError
from src.job import Job
from src.job_queue import JobQueue
from src.response.progress import Watcher
from src.web.endpoint import NotAnswered, UnknownJob

log = logging.getLogger("worker")
T = TypeVar("T")
Answer = Callable[[object, Job], Any]

RESULT_SECONDS = 1_800.0  # how long a result is kept, as RunPod keeps one of /run
MOST_RESULTS, MOST_RESULT_BYTES = 1_000, 500_000_000  # kept at once; the oldest go first
MOST_JOBS, MOST_JOB_BYTES = 1_000, 300_000_000  # taken and not over
_THREADS = 32  # jobs that are read, drawn or delivered; the others wait as they came


@dataclass
class _Open:
    """A job that is taken and not over."""

    size: int
    watcher: Watcher = field(default_factory=Watcher)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    job: Job | None = None  # once it has a thread
    future: Future[None] | None = None
    cancelled: bool = False
    came: float = field(default_factory=time.monotonic)


class _Result(NamedTuple):
    """A job that is over, as /status tells it."""

    status: str
    body: bytes
    until: float  # by time.monotonic


class LocalEndpoint:
    """`answer` is the handler's, `timeout` in seconds; `device_failed` is called where only a new process helps.

    All but the answers themselves happens in one event loop.
    """

    name = "local"
    poll_seconds = 0.05

    def __init__(
        self,
        answer: Answer,
        timeout: float | None = None,
        *,
        device_failed: Callable[[], None] = lambda: None,
        result_seconds: float = RESULT_SECONDS,
        most_results: int = MOST_RESULTS,
        most_result_bytes: int = MOST_RESULT_BYTES,
        most_jobs: int = MOST_JOBS,
        most_job_bytes: int = MOST_JOB_BYTES,
    ) -> None:
        self._answer = answer
        self._timeout = timeout
        self._device_failed = device_failed
        self._result_seconds = result_seconds
        self._most_results = most_results
        self._most_result_bytes = most_result_bytes
        self._most_jobs = most_jobs
        self._most_job_bytes = most_job_bytes
        self._queue = JobQueue()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="job")
        self._open: dict[str, _Open] = {}
        self._results: OrderedDict[str, _Result] = OrderedDict()
        self._result_bytes = 0
        self._counts: Counter[str] = Counter()
        self._closed = False

    def on_device(self, work: Callable[[], T]) -> T:
        """What `work` gives, run on the device's thread."""
        return self._queue.ticket().run(work)

    def serve_devices(self, devices: int) -> None:
        """Let so many jobs have a device at once."""
        self._queue.serve(devices)

    async def run(self, event: Mapping[str, Any], size: int, /) -> str:
        """Take a job; raises NotAnswered where too many are open, or where it wants what only RunPod does."""
        if odd := sorted({"webhook", "policy"} & event.keys()):
            raise NotAnswered(400, f"{', '.join(odd)}: read by RunPod alone; leave it out here, and ask /status")
        held = sum(job.size for job in self._open.values())
        if self._closed or len(self._open) >= self._most_jobs or held + size > self._most_job_bytes:
            why = "is ending" if self._closed else f"has {len(self._open):,} jobs of {held / 1e6:.0f} MB in hand"
            raise NotAnswered(429, f"this server {why} and takes no more now; send the request again later")
        id = str(uuid.uuid4())
        taken = self._open[id] = _Open(size)
        loop = asyncio.get_running_loop()
        taken.future = self._threads.submit(self._work, loop, id, taken, {**event, "id": id})
        return id

    def _work(self, loop: asyncio.AbstractEventLoop, id: str, taken: _Open, event: dict[str, Any]) -> None:
        """The whole of one job, on a thread of its own."""
        # The ticket for the device is taken here, so that whoever has one has a thread as well.
        taken.job = job = Job.of(
            event, on_progress=taken.watcher.see, queue_up=self._queue.ticket, timeout=self._timeout
        )
        if taken.cancelled:
            job.cancel()
        try:
            answered = self._answer(event, job)
        except Exception as error:  # whoever waits gets an answer
            log.error("job %s: %s", id, type(error).__name__, exc_info=error)
            answered = InternalError(type(error).__name__).to_response(include_traceback=False)
        failure, broken = None, False
        if isinstance(answered, dict):  # what RunPod's SDK takes out of it
            failure, broken = answered.pop("error", None), answered.pop("refresh_worker", False)
        status = "FAILED" if failure else "COMPLETED"
        now = time.monotonic()
        began = job.on_device_since or now
        found: dict[str, Any] = {
            "id": id,
            "status": status,
            "delayTime": round(1000 * (began - taken.came)),
            "executionTime": round(1000 * (now - began)),
        }
        if failure:
            found["error"] = failure
        if answered != {}:
            found["output"] = answered
        body = json.dumps(found).encode()
        del answered, found, event
        loop.call_soon_threadsafe(self._end, id, status, body)
        if broken:
            log.error("stopping because of a device that failed")
            loop.call_soon_threadsafe(self._device_failed)

    def _end(self, id: str, status: str, body: bytes) -> None:
        """Keep a result, where nobody has cancelled the job meanwhile."""
        if (ended := self._open.pop(id, None)) is None:
            return
        self._counts[status] += 1
        self._results[id] = _Result(status, body, time.monotonic() + self._result_seconds)
        self._result_bytes += len(body)
        self._forget()
        ended.ended.set()

    def _forget(self) -> None:
        """Let results go that are too old, too many or too large together: the oldest first."""
        while self._results:
            oldest = next(iter(self._results.values()))
            if (
                oldest.until > time.monotonic()
                and len(self._results) <= self._most_results
                and self._result_bytes <= self._most_result_bytes
            ):
                return
            _, gone = self._results.popitem(last=False)
            self._result_bytes -= len(gone.body)

    async def status(self, id: str) -> bytes:
        """What is known of a job; while it runs `output` is its progress."""
        self._forget()
        if result := self._results.get(id):
            return result.body
        if (taken := self._open.get(id)) is None:
            raise UnknownJob
        progress = taken.watcher.progress()
        if progress["phase"] == "queued":
            return json.dumps({"id": id, "status": "IN_QUEUE"}).encode()
        return json.dumps({"id": id, "status": "IN_PROGRESS", "output": progress}).encode()

    async def wait(self, id: str, seconds: float) -> bytes:
        """As `status`, once the job is over or `seconds` are."""
        if taken := self._open.get(id):
            with suppress(TimeoutError):
                await asyncio.wait_for(taken.ended.wait(), seconds)
        return await self.status(id)

    async def cancel(self, id: str) -> bytes:
        """Stop a job at its next step; one that is over stays as it is."""
        if taken := self._open.get(id):
            self._stop(taken)
            self._end(id, "CANCELLED", json.dumps({"id": id, "status": "CANCELLED"}).encode())
        return await self.status(id)

    def _stop(self, taken: _Open) -> None:
        taken.cancelled = True
        if taken.future:
            taken.future.cancel()
        if taken.job:
            taken.job.cancel()

    async def health(self) -> dict[str, Any]:
        """RunPod's counts: of jobs since the start, and of the one worker that this is."""
        phases = Counter(taken.watcher.progress()["phase"] == "queued" for taken in self._open.values())
        return {
            "jobs": {
                "completed": self._counts["COMPLETED"],
                "failed": self._counts["FAILED"],
                "inProgress": phases[False],
                "inQueue": phases[True],
                "retried": 0,
            },
            "workers": {"idle": int(not phases[False]), "running": int(phases[False] > 0), "ready": 1, "throttled": 0},
        }

    def close(self) -> None:
        """Take no more jobs, and cancel those in hand: whoever waits gets an answer at once."""
        self._closed = True
        for id, taken in list(self._open.items()):
            self._stop(taken)
            self._end(id, "CANCELLED", json.dumps({"id": id, "status": "CANCELLED"}).encode())
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def __aenter__(self) -> Self:
        """Nothing is to be opened."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Nobody waits any more."""
        self.close()
