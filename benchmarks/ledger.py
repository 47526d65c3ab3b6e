"""`python -m benchmarks.ledger`: what fits with which model on which card, counted byte by byte.

The bytes of the real models' layers, an allocator that counts, the real ledger and placements; no card and no torch.
RunPod's cards, and three smaller ones, are given what people ask for: ControlNets, eight adapters, Redux. The same is
tried with the placement of the start, as it was before there was a ledger. Writes results/ledger.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from deploy.cards import CARDS
from deploy.plan import weights_of
from src.catalog import controlnets_for, get_model
from src.settings import ROOT, Settings
from src.weights.ledger import ExtraKind, Ledger, PlacementChoice
from src.weights.placement import GB, DoesNotFit, Machine, Placement, Work, choose_placement, smallest

RESULTS = ROOT / "benchmarks" / "results" / "ledger.json"
MODELS = ("FLUX.1-dev", "FLUX.1-schnell", "FLUX.2-klein-4B", "FLUX.2-klein-9B", "FLUX.2-dev")

_NARROW = (Machine(f"{size} GB", size * GB, 64 * GB, 8e13, 2.5e10) for size in (16, 20, 32))  # else as an RTX 4090
MACHINES: Mapping[str, Machine] = {machine.name: machine for machine in (*_NARROW, *(card.machine for card in CARDS))}

Demand = Mapping[str, tuple[ExtraKind, int]]  # what one job wants with the model, and its bytes

# In bfloat16: diffusers' FluxControlNetModel with 5 and 10 blocks and with 6 and none, as the configurations on the hub
# have them; SigLIP so400m and FLUX.1-Redux's embedder.
UNION_PRO, UNION_PRO_2, REDUX = 6_603_913_216, 4_281_753_600, 985_458_816
ADAPTER = 300_000_000  # a LoRA of rank 32 or so
_ADAPTERS: Demand = {f"adapter {number}": (ExtraKind.ADAPTER, ADAPTER) for number in range(8)}
_FLUX_1: Mapping[str, Demand] = {
    "Union-Pro": {"Union-Pro": (ExtraKind.CONTROLNET, UNION_PRO)},
    "Union-Pro-2.0": {"Union-Pro-2.0": (ExtraKind.CONTROLNET, UNION_PRO_2)},
    "Redux": {"Redux": (ExtraKind.REDUX, REDUX)},
}


class CountedMemory:
    """A card's memory as an allocator counts it, in bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.held: dict[str, int] = {}

    def allocate(self, name: str, size: int) -> None:
        """Raises MemoryError where there is no room."""
        if name in self.held:
            raise ValueError(f"{name} is held already")
        if sum(self.held.values()) + size > self.size:
            raise MemoryError(f"{name} takes {size:,} bytes of {self.size:,}, which has {self.held}")
        self.held[name] = size

    def free(self, name: str) -> None:
        """Raises KeyError where it is not held."""
        del self.held[name]


class RememberedChoice(PlacementChoice):
    """Remembers its answers."""

    def fastest(self, extra: int, memory: int, start: Placement) -> Placement:
        """As of all choices."""
        answers: dict[tuple[int, int], Placement] = self.__dict__.setdefault("answers", {})
        if (extra, memory) not in answers:
            answers[extra, memory] = super().fastest(extra, memory, start)
        return answers[extra, memory]


class CountedWorker:
    """What the engine does about memory, with bytes in the place of weights. Raises DoesNotFit where no model fits.

    Without `ledger` the placement of the start stays, as it did once.
    """

    def __init__(self, choice: PlacementChoice, *, ledger: bool = True) -> None:
        self.memory = CountedMemory(choice.machine.memory)
        placement = choose_placement(choice.weights, choice.machine, choice.work, choice.mode)
        self._put(placement)
        self.ledger = Ledger(placement, choice, self._arrange) if ledger else Ledger()

    def job(self, demand: Demand) -> None:
        """One job that wants `demand`; raises MemoryError where there is no room for it."""
        self.ledger.begin(demand)
        for name, (kind, size) in demand.items():
            if name not in self.memory.held:
                self.ledger.admit(name, kind, size, lambda name=name: self.memory.free(name))  # type: ignore[misc]
                self._load(name, size)

    def _load(self, name: str, size: int) -> None:
        try:
            self.memory.allocate(name, size)
        except MemoryError:
            if self.ledger.placement:  # which was to have made room
                raise
            self.ledger.let_idle_go()
            self.memory.allocate(name, size)

    def _arrange(self, placement: Placement) -> bool:
        self.memory.free("model and picture")
        self._put(placement)
        return True

    def _put(self, placement: Placement) -> None:
        self.memory.allocate("model and picture", placement.peak - placement.extra)


def demands_on(model: str) -> dict[str, Demand]:
    """What a job of `model` may want, by what it is called."""
    found: dict[str, Demand] = {"8 adapters": _ADAPTERS}
    return {**_FLUX_1, **found} if controlnets_for(get_model(model)) else found


def choice_of(name: str, machine: Machine) -> PlacementChoice:
    """What a worker with settings of no variable chooses by."""
    model = get_model(name)
    work = Work(
        model.width, model.height, model.num_inference_steps, model.max_sequence_length,
        Settings.model_fields["max_pixels"].default, usual_tokens=model.usual_tokens,
    )  # fmt: skip
    return RememberedChoice(weights_of(model), machine, work, "auto")


def fits_alone(choice: PlacementChoice, demand: Demand) -> bool:
    """Whether there is a placement of the model that leaves room for `demand`."""
    work = replace(choice.work, extra=sum(size for _, size in demand.values()))
    return smallest(choice.weights, choice.machine, work, choice.mode) <= choice.machine.memory


def fits(choice: PlacementChoice, jobs: Iterable[Demand], *, ledger: bool = True) -> CountedWorker | None:
    """The worker after these jobs, one after another; None where one of them found no room."""
    worker = CountedWorker(choice, ledger=ledger)
    try:
        for demand in jobs:
            worker.job(demand)
    except MemoryError:
        return None
    return worker


def on_a_card(name: str, machine: Machine) -> dict[str, Any] | None:
    """Each demand by itself: whether it fits the placement of the start, and how long a picture takes with it then."""
    choice = choice_of(name, machine)
    try:
        start = CountedWorker(choice).ledger.placement
    except DoesNotFit:
        return None
    found: dict[str, Any] = {}
    for called, demand in demands_on(name).items():
        worker = fits(choice, [demand])
        now = worker.ledger.placement if worker else None
        found[called] = {
            "fits_the_placement_of_the_start": fits(choice, [demand], ledger=False) is not None,
            "times_as_long": now.seconds(choice.work) / start.seconds(choice.work) if now and start else None,
        }
    return found


def main() -> None:
    """Write the table."""
    models = {name: {machine: on_a_card(name, found) for machine, found in MACHINES.items()} for name in MODELS}
    RESULTS.write_text(json.dumps({"models": models}, indent=1) + "\n")
    print(json.dumps(models, indent=1))


if __name__ == "__main__":
    main()
