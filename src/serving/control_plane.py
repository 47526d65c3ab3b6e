"""How the SDK's loop talks to RunPod, made lossless and patient, and fair to the endpoint's other workers.

What runpod 1.12 does by itself: it takes jobs by number, looks for them once a second, and waits for an empty worker
before it takes another number; one odd element of an answer hides the jobs beside it, and a job that cannot be read is
never answered; it posts a result again after an HTTP 5xx alone, three times in all; it forgets a stop signal for a job
that is not running yet; an answer without jobs is asked for again hundreds of times a second, and HTTP 429 costs five
seconds; and after SIGTERM it sits out its polls, and never runs the jobs that they bring. Its JobScaler carries the
three calls that do so as public attributes, so they are replaced there and nothing is patched.

Knows nothing of pictures or of the device.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp

from src.errors import Fault, InvalidRequest
from src.serving import sdk
from src.serving.handed_out import read_jobs
from src.serving.logs import ended_unbegun
from src.serving.posting import PatientSession, Results
from src.wording import show

log = logging.getLogger("worker")
T = TypeVar("T")

MOST_JOBS = 1_000  # what the SDK believes to hold at most, so that it never waits to change it
_POLL_SECONDS = 90  # as the SDK has it
_WAIT_SECONDS = 30.0  # that the SDK is kept waiting while there is enough in hand
_LOOK_SECONDS = 0.02  # between two looks at what is in hand
_FAILED_PAUSES = (0.25, 2.0)  # the first and the longest
_EMPTY_PAUSES = (0.05, 1.0)  # after answers that brought nothing and did not wait for a job
_QUICK_SECONDS = 0.5  # an answer that comes sooner did not wait
_GRACE_SECONDS = 0.5  # that a poll has after SIGTERM: RunPod may be handing a job out
_ANSWER_SECONDS = 10.0  # that an answer has which has begun to come
_QUIET_SECONDS = 60.0  # between two lines of the log on one route
_PROGRESS_TIMEOUT = aiohttp.ClientTimeout(total=20)
_REMEMBERED = 1_000  # stop signals for jobs that are not here
_REMEMBERED_SECONDS = 60.0
_JOB_BYTES, _LONGEST_JOB_BYTES = 25_000_000, 64_000_000  # RunPod takes 20 MB, and JSON may write them thrice as long
_STOP_BYTES = 1_000_000


class ControlPlane:
    """Takes over `scaler`'s calls; one for each worker, made within its event loop.

    `wanted` tells how many jobs to ask for now, by the number of those that are on their way to it and the bytes that
    are on their way to RunPod; `trip` is told how long answers took.
    """

    def __init__(self, scaler: Any, wanted: Callable[[int, int], int], trip: Callable[[float], None]) -> None:
        self._scaler = scaler
        self._wanted = wanted
        self._trip = trip
        self._stopping = asyncio.Event()  # ask for no more jobs
        self._leaving = asyncio.Event()  # and take none that is not coming already
        self._no_stops = asyncio.Event()  # nothing is in hand that could be stopped
        self._taking, self._watching = _Poll("job-take"), _Poll("job-stop")
        self._coming: set[str] = set()  # with the SDK, which has not begun them
        self._begun: set[str] = set()
        self._refused: dict[str, str] = {}
        self._stopped_before = OrderedDict[str, float]()  # when a job was stopped that had not begun or come
        self._results = Results(trip)
        self._progress = sdk.client_session()
        self._ended = False
        scaler.jobs_fetcher = self._take
        scaler.jobs_handler = self._handle
        scaler.stop_signals_fetcher = self._stop_signals

    def stop(self) -> None:
        """Take no more jobs; those that were taken are finished and posted, then the SDK's loop ends."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        self._results.leave()
        asyncio.get_running_loop().call_later(_GRACE_SECONDS, self._leaving.set)
        if not self._scaler.current_occupancy():
            self._no_stops.set()

    async def post_progress(self, job_id: str, progress: dict[str, Any]) -> float:
        """Tell RunPod how far a job is, once; the client's /status shows it. The seconds that it took."""
        url = sdk.done_url(quote(job_id, safe="")) + "&isStream=false"
        body = json.dumps({"status": "IN_PROGRESS", "output": progress})
        headers = {
            "X-Request-ID": quote(job_id),
            "Content-Type": "application/x-www-form-urlencoded",
            "charset": "utf-8",
        }
        began = time.monotonic()
        try:
            async with self._progress.post(url, data=body, headers=headers, timeout=_PROGRESS_TIMEOUT):
                self._trip(time.monotonic() - began)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            log.debug("job %s: a progress update was not taken: %s", show(job_id), type(error).__name__)
        return time.monotonic() - began

    # What the SDK calls

    async def _take(self, session: aiohttp.ClientSession, _: int) -> list[dict[str, Any]] | None:
        poll = self._taking
        if not poll.under_way:
            if self._stopping.is_set():
                await self._end()
                return None
            if not (number := await self._until_wanted()):
                return None
            most = max(_LONGEST_JOB_BYTES, number * _JOB_BYTES)
            poll.begin(lambda: sdk.call("get_job")(_Reading(session, poll, most, self._read), number))
        jobs: list[dict[str, Any]] = await poll.finish(self._leaving, _WAIT_SECONDS) or []
        if jobs:
            self._trip(poll.seconds)
        self._coming.update(job["id"] for job in jobs)
        return jobs

    async def _stop_signals(self, session: aiohttp.ClientSession) -> Sequence[str]:
        poll, stopped, deadline = self._watching, list[str](), time.monotonic() + _WAIT_SECONDS
        while not (stopped or self._no_stops.is_set() or time.monotonic() > deadline):  # the SDK sleeps after none
            if not poll.under_way:
                poll.begin(lambda: sdk.call("get_stop_signals")(_Reading(session, poll, _STOP_BYTES, json.loads)))
            stopped = await poll.finish(self._no_stops, _WAIT_SECONDS) or []
        # A job that the SDK holds and has not begun would be lost to it, slot and all, if its task were cancelled now;
        # one that is on its way here would run.
        for id in stopped:
            if id not in self._begun:
                self._stopped_before[id] = time.monotonic()
        while len(self._stopped_before) > _REMEMBERED:
            self._stopped_before.popitem(last=False)
        return [id for id in stopped if id in self._begun]

    async def _handle(self, session: aiohttp.ClientSession, config: dict[str, Any], job: dict[str, Any]) -> None:
        id = job["id"]
        self._coming.discard(id)
        refused = self._refused.pop(id, None)
        if time.monotonic() - self._stopped_before.pop(id, -_REMEMBERED_SECONDS) < _REMEMBERED_SECONDS:
            ended_unbegun(id, "cancelled", "cancelled before it began")
            return
        if refused:
            ended_unbegun(id, "invalid_request", said := f"invalid_request: input {refused}", error=said)
            answer = InvalidRequest([Fault("input", refused)]).to_response(include_traceback=False)
            config = {**config, "handler": lambda _: answer}
        self._begun.add(id)
        try:
            await sdk.call("handle_job")(PatientSession(session, self._results), config, job)
        finally:
            self._begun.discard(id)

    # How

    async def _until_wanted(self) -> int:
        """How many jobs to ask for, once there are any; 0 after a while, or when it is time to stop."""
        deadline = time.monotonic() + _WAIT_SECONDS
        while time.monotonic() < deadline and not self._stopping.is_set():
            if number := self._wanted(len(self._coming), self._results.bytes):
                return number
            await asyncio.sleep(_LOOK_SECONDS)
        return 0

    def _read(self, body: bytes) -> list[dict[str, Any]]:
        """The jobs that came and are not here already."""
        handed_out = read_jobs(body)
        for line in handed_out.left_out:
            log.warning("job-take brought %s: it is left out", line)
        jobs = []
        for id, job in handed_out.jobs.items():
            if id in self._coming or id in self._begun:
                log.warning("job-take brought job %s, which is in hand: it is left out", show(id))
            else:
                jobs.append(job)
                self._refused |= {id: handed_out.refused[id]} if id in handed_out.refused else {}
        return jobs

    async def _end(self) -> None:
        """End the SDK's loop, once nothing is in hand."""
        if self._scaler.current_occupancy() or not self._leaving.is_set():
            await asyncio.sleep(_LOOK_SECONDS)
        elif not self._ended:
            self._ended = True
            self._no_stops.set()
            await self._progress.close()
            self._scaler.kill_worker()


class _Poll:
    """One route that is asked again and again. A request is cut off only where nothing of its answer has come."""

    def __init__(self, route: str) -> None:
        self.answering = False
        self.seconds = 0.0  # that the latest took
        self._route = route
        self._task: asyncio.Task[Any] | None = None
        self._fruitless = 0  # in a row
        self._logged_at: float | None = None

    @property
    def under_way(self) -> bool:
        """Whether a request is."""
        return self._task is not None

    def begin(self, ask: Callable[[], Awaitable[Any]]) -> None:
        """Send the next request."""
        self.answering = False
        self._task = asyncio.ensure_future(self._ask(ask))

    async def finish(self, end: asyncio.Event, seconds: float) -> Any:
        """What the request brings; None where it brings nothing for so long, goes on, or there is an `end`."""
        if self._task is None:
            return None
        await _either(self._task, end, seconds)
        if not self._task.done():
            if not end.is_set():
                return None
            if self.answering:
                await asyncio.wait({self._task}, timeout=_ANSWER_SECONDS)
        task, self._task = self._task, None
        if task.done():
            return task.result()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return None

    async def _ask(self, ask: Callable[[], Awaitable[T]]) -> T | None:
        began, brought, pauses = time.monotonic(), None, _FAILED_PAUSES
        try:
            brought = await asyncio.wait_for(ask(), _POLL_SECONDS)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next poll may be answered
            self._tell(error)
        else:
            pauses = _EMPTY_PAUSES
            self._logged_at = None
        self.seconds = time.monotonic() - began
        if brought or (pauses is _EMPTY_PAUSES and self.seconds > _QUICK_SECONDS):
            self._fruitless = 0
            return brought
        first, longest = pauses
        pause = min(longest, first * 2 ** min(self._fruitless, 10))
        self._fruitless += 1
        await asyncio.sleep(pause)
        return None

    def _tell(self, error: Exception) -> None:
        """One line a minute; an HTTP status, and not the URL, whose query may hold a key."""
        status = f" {error.status}" if isinstance(error, aiohttp.ClientResponseError) else ""
        now = time.monotonic()
        if self._logged_at is None or now - self._logged_at > _QUIET_SECONDS:
            self._logged_at = now
            log.warning("%s failed (%s%s): it is asked again", self._route, type(error).__name__, status)


class _Reading:
    """What the SDK needs of an aiohttp session to ask one route; the body is read here, within limits."""

    def __init__(
        self, session: aiohttp.ClientSession, poll: _Poll, most_bytes: int, read: Callable[[bytes], Any]
    ) -> None:
        self._session = session
        self._poll = poll
        self._most_bytes = most_bytes
        self._read = read

    @contextlib.asynccontextmanager
    async def get(self, url: str) -> AsyncIterator[_Answer]:
        """The answer."""
        async with self._session.get(url) as answer:
            self._poll.answering = True
            yield _Answer(answer, self._most_bytes, self._read)


class _Answer:
    """An aiohttp response, but for how its JSON is read."""

    def __init__(self, answer: aiohttp.ClientResponse, most_bytes: int, read: Callable[[bytes], Any]) -> None:
        self._answer = answer
        self._most_bytes = most_bytes
        self._read = read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._answer, name)

    async def json(self) -> Any:
        """Raises ValueError where it is none, or too large."""
        body = bytearray()
        async for chunk in self._answer.content.iter_chunked(1 << 16):
            body += chunk
            if len(body) > self._most_bytes:
                self._answer.close()
                raise ValueError(f"more than {self._most_bytes:,} bytes")
        return self._read(bytes(body))


async def _either(task: asyncio.Task[Any], end: asyncio.Event, seconds: float) -> None:
    """Wait until `task` is done, there is an `end`, or for so long."""
    ending = asyncio.ensure_future(end.wait())
    try:
        await asyncio.wait({task, ending}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ending.cancel()
