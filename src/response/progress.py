"""What the world may know of a job that is on its way: its phase, its steps, the seconds left, a picture of it so far.

Knows nothing of who asks.
"""

from __future__ import annotations

import base64
import time
from dataclasses import replace
from typing import Any

from src.job import Progress
from src.response.encode import encode_image


class Watcher:
    """What the world may know of a job's progress."""

    def __init__(self) -> None:
        self._last = Progress("queued")
        self._preview: str | None = None
        self._denoising_since: float | None = None
        self._stepped = 0.0  # when the latest step was done

    def see(self, progress: Progress) -> None:
        """Called on the job's and on the device's thread, never at once."""
        if not progress.steps:  # what comes before or after the steps does not undo them
            progress = replace(progress, step=self._last.step, steps=self._last.steps)
        if progress.step > self._last.step:
            self._stepped = time.monotonic()
        self._last = progress
        if progress.phase == "denoise" and self._denoising_since is None:
            self._denoising_since = time.monotonic()
        if progress.preview is not None:
            self._preview = base64.b64encode(encode_image(progress.preview, "JPEG", 80)).decode()

    def seconds_left(self) -> float | None:
        """How long the steps that are left will take; None until one is done."""
        last, since = self._last, self._denoising_since
        if since is None or not last.step:
            return None
        a_step = (self._stepped - since) / last.step
        return max(0.0, a_step * (last.steps - last.step) - (time.monotonic() - self._stepped))

    def progress(self) -> dict[str, Any]:
        """As the client's /status shows it."""
        last, left = self._last, self.seconds_left()
        shown: dict[str, Any] = {
            "phase": last.phase,
            "step": last.step,
            "steps": last.steps,
            "percent": round(100 * last.step / last.steps) if last.steps else 0,
            "seconds_left": None if left is None else round(left, 1),
        }
        if self._preview is not None:
            shown["preview"] = self._preview
        return shown
