"""How many jobs to hold at once, so that the device never waits for the next one.

The SDK looks for jobs once a second while it holds as many as it may, and a change of that number waits until none
is held. So the number must cover a second and a bit of the device's work, and change seldom.
"""

from __future__ import annotations

import math

from src.settings import MAX_PREFETCH

REFILL_SECONDS = 1.6  # the SDK's pause of 1 s, its 0.1 s between looks at its own queue, and the way to RunPod
LONG_SECONDS = 60  # so long a job waits better on a worker that is idle: the pause then costs 3 % at most
_LEVELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, MAX_PREFETCH)
_MEMORY = 0.3  # the share of the latest job in the mean
_PATIENCE = 4  # jobs in a row that want fewer


class Concurrency:
    """Adapts to the jobs that it sees; `fixed` does not."""

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._mean: float | None = None  # seconds
        self._level = 2
        self._fewer = 0

    @property
    def jobs(self) -> int:
        """How many to hold, the running one among them."""
        return self._fixed or self._level

    def observe(self, seconds: float) -> None:
        """A job had the device for so long; the first is the warm-up's."""
        first = self._mean is None
        self._mean = seconds if self._mean is None else self._mean + _MEMORY * (seconds - self._mean)
        wanted = _level(self._mean)
        self._fewer = self._fewer + 1 if wanted < self._level else 0
        if first or wanted > self._level or self._fewer >= _PATIENCE:
            self._level, self._fewer = wanted, 0


def _level(seconds: float) -> int:
    if seconds >= LONG_SECONDS:
        return 1
    needed = 1 + math.ceil(REFILL_SECONDS / max(seconds, 0.01))
    return next((level for level in _LEVELS if level >= needed), MAX_PREFETCH)
