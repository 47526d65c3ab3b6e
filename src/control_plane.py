"""How the SDK's loop talks to RunPod, made lossless.

What runpod 1.12 does by itself, as tests/test_control_plane.py measures: it posts a result again after an HTTP 5xx
alone, three times in all, and drops it after a refused connection, a 429 or a refused body; it forgets a stop signal
for a job that it has taken and not begun; and after SIGTERM it holds on to its polls for up to 90 seconds, and what
they bring is never run. Its JobScaler carries the three calls that do so as public attributes, so they are replaced
there and nothing is patched.

Knows nothing of pictures or of the device.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections import deque
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import aiohttp
from runpod.http_client import AsyncClientSession
from runpod.serverless.modules.rp_http import JOB_DONE_URL
from runpod.serverless.modules.rp_job import get_job, get_stop_signals, handle_job
from runpod.serverless.modules.rp_scale import JobScaler

log = logging.getLogger("worker")
T = TypeVar("T")

_RETRY_SECONDS = (0.2, 0.5, 1, 2, 4, 8, 15, 30, 30, 30)
_PROGRESS_TIMEOUT = aiohttp.ClientTimeout(total=10)
_REFUSED_BODY = (400, 413)


class ControlPlane:
    """Takes over `scaler`'s calls; one for each worker, made within its event loop."""

    def __init__(self, scaler: JobScaler) -> None:
        self._scaler = scaler
        self._stopping = asyncio.Event()
        self._never_start: deque[str] = deque(maxlen=1_000)
        scaler.jobs_fetcher = self._take
        scaler.jobs_handler = self._handle
        scaler.stop_signals_fetcher = self._stop_signals

    def stop(self) -> None:
        """Take no more jobs; those that were taken are finished and posted, then the SDK's loop ends."""
        self._stopping.set()

    def end_if_stopping(self) -> None:
        """For the SDK's look at how many jobs it may hold: it has none in its hands that are not in its queue."""
        if self._stopping.is_set():
            self._scaler.kill_worker()

    async def post_progress(self, job_id: str, progress: dict[str, Any]) -> None:
        """Tell RunPod how far a job is, once; the client's /status shows it."""
        url = JOB_DONE_URL.replace("$ID", job_id) + "&isStream=false"
        body = json.dumps({"status": "IN_PROGRESS", "output": progress})
        headers = {"X-Request-ID": job_id, "Content-Type": "application/x-www-form-urlencoded", "charset": "utf-8"}
        try:
            async with (
                AsyncClientSession() as session,
                session.post(url, data=body, headers=headers, timeout=_PROGRESS_TIMEOUT) as answer,
            ):
                await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            log.debug("job %s: a progress update was not taken: %s", job_id, type(error).__name__)

    async def _take(self, session: aiohttp.ClientSession, jobs: int) -> list[dict[str, Any]] | None:
        return await self._unless_stopping(get_job(session, jobs))

    async def _stop_signals(self, session: aiohttp.ClientSession) -> Sequence[str]:
        stopped = await self._unless_stopping(get_stop_signals(session)) or []
        self._never_start.extend(id for id in stopped if id not in self._scaler.jobs_tasks)
        return stopped

    async def _handle(self, session: aiohttp.ClientSession, config: dict[str, Any], job: dict[str, Any]) -> None:
        if job["id"] in self._never_start:
            log.info("job %s: cancelled before it began", job["id"], extra={"facts": {"job": job["id"]}})
            return
        await handle_job(PatientSession(session), config, job)

    async def _unless_stopping(self, poll: Awaitable[T]) -> T | None:
        """What `poll` brings; None as soon as the worker is told to stop."""
        polling, stopping = asyncio.ensure_future(poll), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait({polling, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return polling.result() if polling.done() else None
        finally:
            for task in (polling, stopping):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


class PatientSession:
    """What the SDK needs of an aiohttp session to post one job's result, with two minutes of patience.

    A body that RunPod refuses is replaced by an error that says so: the SDK would leave the client without any.
    """

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.headers: dict[str, str] = {}  # the SDK writes X-Request-ID here, which the jobs must not share
        self._session = session

    async def request(
        self, method: str, url: str, *, headers: dict[str, str], data: str, **options: Any
    ) -> aiohttp.ClientResponse:
        """The first answer that is final, or that to the last try; raises what the last try raised."""
        headers = {**self.headers, **headers}
        name = headers.get("X-Request-ID")
        for wait in _RETRY_SECONDS:
            try:
                answer = await self._session.request(method, url, headers=headers, data=data, **options)
            except (TimeoutError, aiohttp.ClientError, OSError) as error:
                reason = type(error).__name__
            else:
                if answer.status in _REFUSED_BODY and not data.startswith(_REFUSAL):
                    log.error("job %s: RunPod refused a result of %d bytes", name, len(data))
                    data = _refusal(len(data))
                elif answer.status != 429 and answer.status < 500:
                    return answer
                answer.release()
                reason = f"HTTP {answer.status}"
            log.warning("job %s: posting its result again after %s", name, reason)
            await asyncio.sleep(wait)
        return await self._session.request(method, url, headers=headers, data=data, **options)


_REFUSAL = '{"error": "response_too_large: '


def _refusal(size: int) -> str:
    return (
        f"{_REFUSAL}RunPod refused the result of {size / 1e6:.1f} MB; ask for fewer or smaller pictures or for JPEG, "
        'or set MAX_RESPONSE_MB or a bucket on the worker"}'
    )
