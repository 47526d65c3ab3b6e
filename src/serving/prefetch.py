"""When to ask RunPod for the next job: so that the device never waits, and no job waits here that is run elsewhere.

RunPod spreads an endpoint's jobs over its workers. What one of them holds in advance the others cannot run, and it eats
the job's execution time-out. So what is counted are not jobs but the seconds of the device that they will take, and
the next is asked for when what is in hand lasts only as long as it takes to come: on the device that is free first,
where there are several.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from src.job import Job
from src.settings import MAX_PREFETCH

_LOOP_SECONDS = 0.15  # until the SDK's loop starts a job that has come (0.1 s between two looks), and a bit
_MOST_LEAD = 3.0  # seconds of work in advance at most, however far RunPod is
_FIRST_TRIP = 0.1  # what is expected of the way to RunPod and back
_LONGEST_TRIP = 1.0  # a poll that took longer waited for a job rather than for the way
_READ_SOON = 0.5  # seconds after which a job that is still being read is not counted on
_SHARE = 0.3  # of the latest job in what is expected
MAX_DELIVERED_BYTES = 200_000_000  # of results that are on their way
MAX_DELIVERING = 32  # jobs whose pictures are being written or uploaded


class Held(NamedTuple):
    """A job in hand; `left` are the seconds that its steps will still take, None where no step is done."""

    job: Job
    left: float | None = None


class Prefetch:
    """Learns how long jobs take; `fixed` is a number of jobs for each device instead, the running one among them."""

    def __init__(self, fixed: int | None = None) -> None:
        self.devices = 1
        self._fixed = fixed
        self._mean: float | None = None  # seconds of the device a job
        self._rate: float | None = None  # seconds of the device a step and pixel
        self._reading = 0.0  # seconds until a job is ready for the device
        self._trips: deque[float] = deque(maxlen=16)

    def observe(self, seconds: float, work: float | None = None, reading: float = 0.0) -> None:
        """A job of `work` steps times pixels had the device for so many seconds, after `reading` seconds."""
        self._mean = _mixed(self._mean, seconds)
        self._reading = _mixed(self._reading, reading)
        if work:
            self._rate = _mixed(self._rate, seconds / work)

    def trip(self, seconds: float) -> None:
        """A call of RunPod's was answered after so long; one that waited for a job tells no less."""
        self._trips.append(seconds)

    @property
    def lead(self) -> float:
        """Seconds from asking for a job until it is ready for the device."""
        trip = min(self._trips, default=_FIRST_TRIP)
        return min(_MOST_LEAD, _LOOP_SECONDS + 1.5 * min(trip, _LONGEST_TRIP) + self._reading)

    def wanted(self, held: Iterable[Held], coming: int = 0, delivered_bytes: int = 0) -> int:
        """How many jobs to ask for now.

        `held` are those in hand, `coming` is the number of those that are not among them yet, `delivered_bytes` the
        size of the results that are on their way.
        """
        all_held = list(held)
        waiting = [each for each in all_held if each.job.device_seconds is None]
        number = len(waiting) + coming
        if len(all_held) - len(waiting) >= MAX_DELIVERING or delivered_bytes >= MAX_DELIVERED_BYTES:
            return 0
        if self._fixed is not None:
            return max(0, self._fixed * self.devices - number)
        each_takes = self._mean or 1.0
        running = [each for each in waiting if each.job.on_device_since is not None]
        queued = [each for each in waiting if each.job.on_device_since is None]
        free_after = [*map(self._seconds, running), *[0.0] * (self.devices - len(running))]
        heapq.heapify(free_after)
        for seconds in (*map(self._seconds, queued), *[each_takes] * coming):
            heapq.heapreplace(free_after, free_after[0] + seconds)
        missing = 0
        while free_after[0] < self.lead and number + missing < MAX_PREFETCH:
            heapq.heapreplace(free_after, free_after[0] + max(each_takes, 0.01))
            missing += 1
        return missing

    def _seconds(self, held: Held) -> float:
        """How long a job will keep the device from now on."""
        job, now = held.job, time.monotonic()
        expected = (job.work * self._rate if job.work and self._rate else self._mean) or 1.0
        if job.on_device_since is not None:
            return max(0.0, expected - (now - job.on_device_since)) if held.left is None else held.left
        return 0.0 if job.is_being_read and now - job.arrived > _READ_SOON else expected


def _mixed(mean: float | None, latest: float) -> float:
    return latest if mean is None else mean + _SHARE * (latest - mean)
