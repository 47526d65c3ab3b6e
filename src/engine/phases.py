"""The phases of one plan: how long each takes, and who is told of them."""

from __future__ import annotations

import time
from collections.abc import Callable

from PIL import Image

from src.job import OnProgress, Progress


class Phases:
    """`steps` is the number of all pictures' together; `synchronize` waits for the device."""

    def __init__(self, steps: int, report: OnProgress, synchronize: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self.current = ""
        self.steps_done = 0
        self._report = report
        self._synchronize = synchronize
        self._steps = steps
        self._since = 0.0

    def begin(self, phase: str) -> None:
        """End the current phase, if any, and begin another."""
        self.end()
        self.current, self._since = phase, time.perf_counter()
        self._report(Progress(phase, self.steps_done, self._steps))

    def go_on(self) -> None:
        """The phase goes on; raises where it is to stop."""
        self._report(Progress(self.current, self.steps_done, self._steps))

    def step(self, pictures: int, preview: Image.Image | None) -> None:
        """One step of so many pictures is done."""
        self.steps_done += pictures
        self._report(Progress(self.current, self.steps_done, self._steps, preview))

    def end(self) -> None:
        """End the current phase; its seconds add to those that it had before."""
        if self.current:
            self._synchronize()
            self.seconds[self.current] = self.seconds.get(self.current, 0.0) + time.perf_counter() - self._since
