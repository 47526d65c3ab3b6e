"""Many jobs on one endpoint: so many open at a time, watched with few calls, sent again where that may help.

Knows nothing of pictures, rows or files: `receive` makes of a job's output what the caller wants of it.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import sys
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from client.errors import (
    CODES,
    RETRYABLE,
    ClientError,
    EndpointFailing,
    EndpointUnusable,
    Forgotten,
    JobFailed,
    Unreachable,
)
from client.transport import Transport
from src.redaction import cut, redact

T = TypeVar("T")

CONCURRENCY = 40  # jobs open at a time
TRIES = 3  # of one job, the first among them
_LOOKED_AT = 8  # of the open jobs; a fifth of more than forty
_SENT_AT_ONCE = 8  # jobs, each with its pictures in memory
_SOONEST = 0.25  # seconds until a job is asked for
_NEW = 10.0  # seconds in which a job that RunPod does not know yet is not taken for one that it has forgotten
_AT_LEAST = 60.0  # seconds after which each job is asked for, whatever stands before it
_MOST_IN_A_ROW = 20  # jobs that fail for reasons of the worker before no more are sent
_LAST_SUBMISSIONS = 15.0  # seconds that jobs on their way to RunPod are waited for at the end, to cancel them as well
_LAST_CANCELS = 20.0  # seconds for cancelling what is open, and a fifth of a second more for each job
_MOST_SHOWN = 2_000  # characters of a job's error


@dataclass(eq=False)
class Job:
    """A request on its way; `input` makes it at the time of its sending, since it may hold pictures."""

    key: Any
    input: Callable[[], Mapping[str, Any]]
    id: str | None = None  # RunPod's, once it has one
    resumed: bool = False  # whether the id is of a run before this one, whose end may have cancelled the job
    tries: int = 0
    sent_at: float = -math.inf  # by time.monotonic; of this run


def _nothing(*_: object) -> None:
    pass


class Queue(Generic[T]):
    """`receive` is awaited with each job that brought an output and RunPod's status of it; it may raise JobFailed.

    `sent` is called with each job once it has an id, before its answer is waited for; `lost` with one that is to be
    sent again, and why.
    """

    def __init__(
        self,
        transport: Transport,
        receive: Callable[[Job, dict[str, Any]], Awaitable[T]],
        *,
        concurrency: int = CONCURRENCY,
        tries: int = TRIES,
        sent: Callable[[Job], None] = _nothing,
        lost: Callable[[Job, JobFailed], None] = _nothing,
    ) -> None:
        self._transport, self._receive = transport, receive
        self._concurrency, self._tries = concurrency, tries
        self._sent, self._lost = sent, lost
        self._line = _Line(max(_LOOKED_AT, concurrency // 5))
        self._sending: set[asyncio.Task[None]] = set()
        self._places = asyncio.Semaphore(_SENT_AT_ONCE)
        self._failed_in_a_row = 0
        self.cancelled = 0

    async def run(
        self, jobs: Iterable[Job], *, in_order: bool = False
    ) -> AsyncGenerator[tuple[Job, T | JobFailed], None]:
        """Each of `jobs` with what became of it: as they end, or `in_order`; a job that has an id is only waited for.

        Whoever ends the iteration early (`aclose`, a cancelled task) has the open jobs cancelled at RunPod. Raises
        EndpointUnusable, Unreachable, EndpointFailing.
        """
        source = iter(jobs)
        tasks: dict[asyncio.Task[T | JobFailed], Job] = {}
        try:
            while True:
                for job in itertools.islice(source, self._concurrency - len(tasks)):
                    tasks[asyncio.create_task(self._see_through(job))] = job
                if not tasks:
                    return
                awaited = [next(iter(tasks))] if in_order else list(tasks)
                done, _ = await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield tasks[task], task.result()
                    del tasks[task]
        finally:
            await self._leave(tasks)

    async def _see_through(self, job: Job) -> T | JobFailed:
        """Send `job` and wait for it; again, where that may help."""
        while True:
            try:
                if job.id is None:
                    await self._send(job)
                answer = await self._answer(job)
            except Forgotten as error:
                failure = JobFailed("forgotten", str(error), retryable=True)
            except JobFailed as error:
                failure = error
                if not job.resumed:
                    self._count(failure)
                elif error.code == "cancelled":
                    failure = JobFailed("cancelled", "the run before this one stopped it", retryable=True)
            else:
                self._failed_in_a_row = 0
                return answer
            if not failure.retryable or job.tries >= self._tries:
                return failure
            self._lost(job, failure)
            job.id, job.resumed = None, False

    def _count(self, failure: JobFailed) -> None:
        self._failed_in_a_row = self._failed_in_a_row + 1 if failure.retryable else 0
        if self._failed_in_a_row >= _MOST_IN_A_ROW:
            raise EndpointFailing(
                f"the last {_MOST_IN_A_ROW} jobs all failed for reasons of the worker, so no more are sent: {failure}"
            )

    async def _send(self, job: Job) -> None:
        """Never cut off while it may bring an id, or there would be a job that nobody knows."""
        sending = asyncio.create_task(self._submit(job))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)
        await asyncio.shield(sending)

    async def _submit(self, job: Job) -> None:
        async with self._places:
            job.tries += 1
            job.id = await self._transport.run(await asyncio.to_thread(job.input))
        job.sent_at = time.monotonic()
        self._sent(job)

    async def _answer(self, job: Job) -> T:
        """What `receive` makes of the job's output, which it does within the job's turn: few outputs are in memory."""
        assert job.id is not None  # noqa: S101
        self._line.join(job)
        try:
            while True:
                await self._line.turn(job)
                try:
                    status = await self._transport.status(job.id)
                except Forgotten:
                    if time.monotonic() < job.sent_at + _NEW:
                        continue
                    raise
                if status["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
                    self._line.count()
                    if failure := failure_of(status):
                        raise failure
                    return await self._receive(job, status)
        finally:
            self._line.leave(job)

    async def _leave(self, tasks: Mapping[asyncio.Task[T | JobFailed], Job]) -> None:
        """Let nothing go on: here, and at RunPod."""
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*self._sending, return_exceptions=True), _LAST_SUBMISSIONS)
        if isinstance(sys.exception(), (EndpointUnusable, Unreachable)):
            return  # nobody would be told
        unanswered = [job for task, job in tasks.items() if job.id and (task.cancelled() or task.exception())]
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.gather(*map(self._cancel, unanswered)), _LAST_CANCELS + len(unanswered) / 5)

    async def _cancel(self, job: Job) -> None:
        with suppress(ClientError):  # it ends by itself, or --resume finds it
            assert job.id is not None  # noqa: S101
            status = await self._transport.cancel(job.id)
            self.cancelled += status["status"] == "CANCELLED"


class _Line:
    """The open jobs, the oldest first; the first few are asked for, each when its turn should have come."""

    def __init__(self, looked_at: int) -> None:
        self._looked_at = looked_at
        self._jobs: dict[Job, asyncio.Event] = {}
        self._ends = deque([time.monotonic()], maxlen=16)  # of the last jobs

    def join(self, job: Job) -> None:
        self._jobs[job] = asyncio.Event()
        self._wake()

    def leave(self, job: Job) -> None:
        del self._jobs[job]
        self._wake()

    def count(self) -> None:
        """One more job has ended."""
        self._ends.append(time.monotonic())

    def _wake(self) -> None:
        for event in itertools.islice(self._jobs.values(), self._looked_at):
            event.set()

    async def turn(self, job: Job) -> None:
        """Until it is worth asking for `job`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._jobs[job].wait(), _AT_LEAST)
        place = next((i for i, each in enumerate(self._jobs, 1) if each is job), 1)
        # Where nothing ends this grows, and with it the wait; all jobs together are asked for once a second at least.
        seconds_a_job = (time.monotonic() - self._ends[0]) / len(self._ends)
        wait = min(max((place - 0.5) * seconds_a_job, _SOONEST), len(self._jobs), self._looked_at)
        await asyncio.sleep(wait * random.uniform(0.8, 1.2))  # noqa: S311


def failure_of(status: Mapping[str, Any]) -> JobFailed | None:
    """Why a job that has ended brought no output, by RunPod's status of it; None where it brought one."""
    state, output, error = str(status["status"]), status.get("output"), status.get("error")
    if isinstance(output, Mapping) and output.get("status") == "error":
        error = error or output.get("error")
    if state == "COMPLETED" and not error:
        if isinstance(output, Mapping):
            return None
        return JobFailed(
            "no_output", "RunPod has no output for the job: most often it was larger than the 10 MB that RunPod carries"
        )
    said = redact(cut(error if isinstance(error, str) else "" if error is None else repr(error), _MOST_SHOWN))
    code, colon, message = said.partition(": ")
    if colon and code in CODES:
        return JobFailed(code, message, retryable=code in RETRYABLE)
    retryable = state in ("FAILED", "TIMED_OUT")  # without a code it is the platform's
    return JobFailed(state.lower(), said or f"RunPod ended the job with {state}", retryable=retryable)
