"""One job on its way through the worker: its turn on the device, its progress, and being told to stop.

Knows nothing of RunPod, of models or of how pictures are made.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from src.errors import Cancelled, TimedOut
from src.job_queue import NoTurn, Ticket
from src.wording import show

log = logging.getLogger("worker")
T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """How far a job has got: `step` of `steps` over all its pictures are done.

    `phase` is queued, load_adapters, load_controlnets, upsample_prompt, encode_prompt, denoise, decode, encode_images
    or upload.
    """

    phase: str
    step: int = 0
    steps: int = 0
    preview: Image.Image | None = None  # what the picture will look like, small


OnProgress = Callable[[Progress], None]


class Job:
    """`timeout` is in seconds from now; `queue_up` gives a ticket for the device, without it work is done at once."""

    def __init__(
        self,
        id: str = "local",
        *,
        on_progress: OnProgress | None = None,
        queue_up: Callable[[], Ticket] | None = None,
        timeout: float | None = None,
    ) -> None:
        self.id = id
        self.seconds: dict[str, float] = {}  # per phase: prepare, queued, and those that were reported
        self.work: float | None = None  # steps times pixels, once that is decided
        self.arrived = time.monotonic()
        self.on_device_since: float | None = None  # by time.monotonic
        self.device_seconds: float | None = None  # how long it had the device
        self._on_progress = on_progress or (lambda _: None)
        self._queue_up = queue_up
        self._ticket = queue_up() if queue_up else None
        self._timeout = timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self.cancelled = False
        self._phase = "prepare"
        self._since = time.perf_counter()

    @classmethod
    def of(cls, event: object, **options: Any) -> Job:
        """The job of an event, which may be anything; `options` are those of Job."""
        id = event.get("id") if isinstance(event, Mapping) else None
        plain = isinstance(id, str) and len(id) < 100 and id.isprintable()
        return cls("local" if id is None else str(id) if plain else show(id), **options)

    def report(self, progress: Progress) -> None:
        """Tell whoever watches; raises Cancelled or TimedOut when it is time to stop."""
        if progress.phase != self._phase:
            self.end_phase()
            self._phase = progress.phase
        self.check()
        self._on_progress(progress)

    def end_phase(self) -> None:
        """Count the seconds since the running phase began."""
        now = time.perf_counter()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._since = now

    @property
    def is_being_read(self) -> bool:
        """Whether it is not ready for the device yet."""
        return self._phase == "prepare"

    def cancel(self) -> None:
        """Stop the job at its next report; while it waits for the device it stops now and never gets there."""
        self.cancelled = True
        self.give_back_ticket()

    def give_back_ticket(self) -> None:
        """The job wants no turn on the device any more."""
        if self._ticket is not None:
            self._ticket.give_back()

    def step_aside(self) -> None:
        """Let others pass: what this job waits for may take long. It queues up anew when it is ready."""
        if self._queue_up is not None:
            self.give_back_ticket()
            self._ticket = None

    def on_device(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises; it is run in this job's turn on the device."""

        def turn() -> T:
            self.check()
            self.end_phase()
            self.on_device_since = time.monotonic()
            log.debug("job %s: has the device", self.id, extra={"facts": self._facts("taken")})
            try:
                return work()
            finally:
                self.device_seconds = time.monotonic() - self.on_device_since
                log.debug("job %s: leaves the device", self.id, extra={"facts": self._facts("free")})

        if self._ticket is None and self._queue_up is not None:
            self._ticket = self._queue_up()
        self.report(Progress("queued"))
        if self._ticket is None:
            return turn()
        try:
            return self._ticket.run(
                turn, None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            )
        except NoTurn:
            self.check()
            raise self._timed_out() from None  # what else keeps a turn from coming

    def _facts(self, device: str) -> dict[str, Any]:
        return {"job": self.id, "device": device, "at": time.time()}

    def check(self) -> None:
        """Raise Cancelled or TimedOut when it is time to stop."""
        self.check_cancelled()
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise self._timed_out()

    def check_cancelled(self) -> None:
        """Raise Cancelled where it was told to stop."""
        if self.cancelled:
            raise Cancelled(f"the job was told to stop (at {self._phase})")

    def _timed_out(self) -> TimedOut:
        return TimedOut(
            f"the job took longer than REQUEST_TIMEOUT={self._timeout or 0:g} seconds (at {self._phase}); ask for "
            "fewer steps, fewer pictures or a smaller size"
        )
