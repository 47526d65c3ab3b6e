"""Several engines of one model, each on a card of its own, as one: whoever asks need not know how many there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from src.catalog import Model
from src.engine.engine import Engine
from src.errors import Fault
from src.job import OnProgress
from src.job_queue import current_device
from src.outputs import Generation, Loaded
from src.plan.plan import Plan
from src.request.adapters import Adapter


class Engines:
    """What is drawn on a device's thread is drawn by that device's engine; elsewhere by the first."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = tuple(engines)
        for engine in self._engines[1:]:
            engine.share_adapters(self._engines[0])

    @property
    def model(self) -> Model:
        """The one that all of them have."""
        return self._engines[0].model

    @property
    def revision(self) -> str | None:
        """Of the model, on the hub."""
        return self._engines[0].revision

    @property
    def devices(self) -> int:
        """How many draw at once."""
        return len(self._engines)

    def run(self, plan: Plan, on_progress: OnProgress | None = None) -> Generation:
        """As Engine.run, on the calling thread's device."""
        return self._engines[current_device() % len(self._engines)].run(plan, on_progress)

    def check_adapters(self, adapters: Sequence[Adapter]) -> tuple[list[Fault], list[str]]:
        """As Engine.check_adapters; what is read is for whichever engine gets the job."""
        return self._engines[0].check_adapters(adapters)

    def loaded(self) -> Loaded:
        """What is in memory of any of the devices, and where the weights live on the first."""
        found = [engine.loaded() for engine in self._engines]
        return Loaded(
            tuple(dict.fromkeys(name for each in found for name in each.adapters)),
            tuple(dict.fromkeys(name for each in found for name in each.controlnets)),
            {**found[0].placement, "devices": [str(engine.device) for engine in self._engines]},
        )

    def fetch(self, plan: Plan, before_download: Callable[[], None] = lambda: None) -> None:
        """As Engine.fetch: the first downloads, the others find it here."""
        for engine in self._engines:
            engine.fetch(plan, before_download)

    def warm_up(self, plan: Plan, steps: int) -> float:
        """As Engine.warm_up, one device after another; the seconds of the slowest."""
        return max(engine.warm_up(plan, steps) for engine in self._engines)
