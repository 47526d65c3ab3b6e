"""How the SDK's loop talks to RunPod, made lossless.

What runpod 1.12 does by itself: it posts a result again after an HTTP 5xx alone, three times in all, and drops it after
a refused connection or a 429 (benchmarks/serving.py measures how many); it forgets a stop signal for a job that it has
taken and not begun; while RunPod cannot be reached it asks thousands of times a second; and after SIGTERM it sits out
its polls, and never runs the jobs that they bring. Its JobScaler carries the three calls that do so as public
attributes, so they are replaced there and nothing is patched.

Knows nothing of pictures or of the device.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import aiohttp
from runpod.http_client import AsyncClientSession, TooManyRequests
from runpod.serverless.modules.rp_http import JOB_DONE_URL
from runpod.serverless.modules.rp_job import get_job, get_stop_signals, handle_job
from runpod.serverless.modules.rp_scale import JobScaler

from src.serving.logs import cancelled_unbegun

log = logging.getLogger("worker")
T = TypeVar("T")

PATIENCE_SECONDS = 180  # how long a result is posted again before it is given up
_RETRY_SECONDS = (0.2, 0.5, 1, 2, 4, 8, 15)  # between two tries; the last goes on
_LONGEST_PAUSE = 30.0
_PROGRESS_TIMEOUT = aiohttp.ClientTimeout(total=5)
_TOO_LARGE = 5_000_000  # bytes from which HTTP 400 means that: RunPod refuses more than 10 or 20 MB with it


class ControlPlane:
    """Takes over `scaler`'s calls; one for each worker, made within its event loop."""

    def __init__(self, scaler: JobScaler) -> None:
        self._scaler = scaler
        self._stopping = asyncio.Event()  # no more jobs
        self._ended = asyncio.Event()  # and none is in hand
        self._begun: set[str] = set()
        self._never_start: set[str] = set()
        self._pauses = {"job-take": 0.0, "job-stop": 0.0}
        self._progress = AsyncClientSession()
        scaler.jobs_fetcher = self._take
        scaler.jobs_handler = self._handle
        scaler.stop_signals_fetcher = self._stop_signals

    def stop(self) -> None:
        """Take no more jobs; those that were taken are finished and posted, then the SDK's loop ends."""
        self._stopping.set()

    async def post_progress(self, job_id: str, progress: dict[str, Any]) -> None:
        """Tell RunPod how far a job is, once; the client's /status shows it."""
        url = JOB_DONE_URL.replace("$ID", job_id) + "&isStream=false"
        body = json.dumps({"status": "IN_PROGRESS", "output": progress})
        headers = {"X-Request-ID": job_id, "Content-Type": "application/x-www-form-urlencoded", "charset": "utf-8"}
        try:
            async with self._progress.post(url, data=body, headers=headers, timeout=_PROGRESS_TIMEOUT) as answer:
                await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            log.debug("job %s: a progress update was not taken: %s", job_id, type(error).__name__)

    async def _take(self, session: aiohttp.ClientSession, jobs: int) -> list[dict[str, Any]] | None:
        if not self._stopping.is_set():
            return await self._poll("job-take", lambda: get_job(session, jobs), self._stopping)
        if self._scaler.current_occupancy():
            await asyncio.sleep(0.1)
        elif not self._ended.is_set():
            self._ended.set()
            await self._progress.close()
            self._scaler.kill_worker()
        return None

    async def _stop_signals(self, session: aiohttp.ClientSession) -> Sequence[str]:
        stopped = await self._poll("job-stop", lambda: get_stop_signals(session), self._ended) or []
        # A job that the SDK holds and has not begun would be lost to it, slot and all, if its task were cancelled now.
        self._never_start.update(id for id in stopped if id not in self._begun and self._scaler.job_progress.get(id))
        return [id for id in stopped if id in self._begun]

    async def _handle(self, session: aiohttp.ClientSession, config: dict[str, Any], job: dict[str, Any]) -> None:
        id = job["id"]
        if id in self._never_start:
            self._never_start.discard(id)
            cancelled_unbegun(id)
            return
        self._begun.add(id)
        try:
            await handle_job(PatientSession(session), config, job)
        finally:
            self._begun.discard(id)

    async def _poll(self, route: str, poll: Callable[[], Awaitable[T]], end: asyncio.Event) -> T | None:
        """What `poll` brings; None as soon as there is an `end`, or after a pause where RunPod cannot be reached."""
        try:
            brought = await _unless(end, poll())
        except (TooManyRequests, asyncio.CancelledError):
            raise  # the SDK waits by itself
        except Exception as error:  # noqa: BLE001 - whatever it is, the next poll may be answered
            pause = self._pauses[route] = min(_LONGEST_PAUSE, 2 * self._pauses[route] or 0.5)
            log.warning("%s failed (%s %s), next try in %g s", route, type(error).__name__, _status(error), pause)
            await _unless(end, asyncio.sleep(pause))
            return None
        self._pauses[route] = 0.0
        return brought


class PatientSession:
    """What the SDK needs of an aiohttp session to post one job's result, and three minutes of patience.

    A body that RunPod refuses for its size is replaced by an error: the SDK would leave the client without a word.
    """

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.headers: dict[str, str] = {}  # the SDK writes X-Request-ID here, which the jobs must not share
        self._session = session

    async def request(
        self, method: str, url: str, *, headers: dict[str, str], data: str, **options: Any
    ) -> aiohttp.ClientResponse:
        """The first answer that is final. Out of time it raises aiohttp.ClientError, which the SDK does not retry."""
        headers = {**self.headers, **headers}
        id = headers.get("X-Request-ID")
        timeout = aiohttp.ClientTimeout(total=30 + len(data) / 1e6)
        deadline = time.monotonic() + PATIENCE_SECONDS
        tries = 0
        while True:
            tries += 1
            try:
                answer = await self._session.request(
                    method, url, headers=headers, data=data, timeout=timeout, **options
                )
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                reason = type(error).__name__
            else:
                status, large = answer.status, len(data) >= _TOO_LARGE
                # Later 400s may mean that an earlier try, whose answer was lost, did arrive.
                if status == 413 or (status == 400 and large and tries == 1):
                    log.error(
                        "job %s: RunPod refused a result of %d bytes", id, len(data), extra={"facts": {"job": id}}
                    )
                    data = _refusal(data)
                elif status not in (408, 425, 429) and status < 500:
                    return answer
                answer.release()
                reason = f"HTTP {status}"
            wait = _RETRY_SECONDS[min(tries, len(_RETRY_SECONDS)) - 1]
            if time.monotonic() + wait > deadline:
                raise aiohttp.ClientError(f"gave up after {tries} tries, the last: {reason}")
            log.warning("job %s: posting its result again after %s", id, reason, extra={"facts": {"job": id}})
            await asyncio.sleep(wait)


async def _unless(end: asyncio.Event, work: Awaitable[T]) -> T | None:
    """What `work` gives; None as soon as there is an `end`."""
    working, ending = asyncio.ensure_future(work), asyncio.ensure_future(end.wait())
    try:
        await asyncio.wait({working, ending}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, ending):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


def _status(error: Exception) -> str:
    """An HTTP status, and not the URL, whose query may hold a key."""
    return str(error.status) if isinstance(error, aiohttp.ClientResponseError) else ""


def _refusal(data: str) -> str:
    posted = json.loads(data)
    size = len(data) / 1e6
    error = (
        f"response_too_large: RunPod refused the result of {size:.1f} MB; ask for fewer or smaller pictures or for "
        "JPEG, or set MAX_RESPONSE_MB or a bucket on the worker"
    )
    return json.dumps({"error": error, **({"stopPod": True} if posted.get("stopPod") else {})})
