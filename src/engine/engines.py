"""The cards of this machine at work: an engine on each of them, or one that draws with all of them together.

Whoever asks need not know which, nor how many there are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import MappingProxyType

import torch
from huggingface_hub import snapshot_download

from src.catalog import Model
from src.engine.denoise import Noise
from src.engine.engine import Drawn, Engine
from src.engine.followers import Followers
from src.engine.loading import load_engine
from src.engine.machine import devices, on_device
from src.engine.ulysses import can_share
from src.errors import Fault, InvalidSettings
from src.job import OnProgress
from src.job_queue import current_device
from src.outputs import Loaded
from src.plan.plan import Plan
from src.request.adapters import Adapter
from src.settings import Settings
from src.stages import START
from src.weights.licences import is_non_commercial

log = logging.getLogger("worker")

_MOST_CARDS = 8  # of a pod


def load_engines(
    settings: Settings, download: Callable[..., str] = snapshot_download, on: Sequence[torch.device] | None = None
) -> Engines:
    """The model of MODEL_NAME on each of `on`, every card that is visible by default; as load_engine."""
    engines = _load_engines(settings, download, tuple(on or devices()))
    model, revision = engines.model, engines.revision
    bound = (
        ", which bounds what the worker and its pictures may be used for" if is_non_commercial(model.licence) else ""
    )
    facts = {"model": model.name, "revision": revision, "licence": model.licence}
    log.info(
        "model %s (%s), licence: %s%s",
        model.name,
        revision or ("a file" if model.single_file else "a folder"),
        model.licence,
        bound,
        extra={"facts": facts},
    )
    return engines


def _load_engines(settings: Settings, download: Callable[..., str], on: Sequence[torch.device]) -> Engines:
    if settings.parallel == "picture":
        if len(on) > 1:
            return Engines([_load_together(settings.for_several_cards(), download, on)])
        log.warning("PARALLEL=picture has no effect: there is one device, %s", on[0])
    engines = [load_engine(settings, download, on[0], sharing=len(on))]
    if len(on) > 1:
        with START.stage("cards") as facts:
            for number, device in enumerate(on[1:], 1):
                engines.append(load_engine(settings, download, device, sharing=len(on) - number))
            facts["devices"] = len(engines)
    return Engines(engines)


def _load_together(settings: Settings, download: Callable[..., str], on: Sequence[torch.device]) -> Engine:
    """One engine that draws on all of `on`, which have the whole model each."""
    followers = Followers(on)  # which import torch meanwhile
    try:
        engine = load_engine(settings, download, on[0])
        _check_shareable(engine, len(on))
        if engine.loaded().placement["modulation_cache"]:
            raise InvalidSettings(
                "PARALLEL=picture: the whole model must fit on each card, and it does not; allowed: larger cards, a "
                "smaller MAX_PIXELS, or PARALLEL=jobs"
            )
        with START.stage("cards") as facts, on_device(on[0]):
            followers.lead(engine.transformer, settings)
            facts["devices"] = len(on)
    except BaseException:
        followers.close()
        raise
    engine.draw_together(followers)
    return engine


def _check_shareable(engine: Engine, cards: int) -> None:
    """Raise InvalidSettings where so many cards cannot share the engine's transformer."""
    name, transformer = engine.model.name, engine.transformer
    if getattr(transformer, "_cp_plan", None) is None:
        raise InvalidSettings(f"PARALLEL=picture: cards cannot share the transformer of {name}; allowed: PARALLEL=jobs")
    if any(mode.reads_once for mode in engine.model.modes.values()):
        raise InvalidSettings(
            f"PARALLEL=picture: {name} keeps what it has read of its references, which no share of the tokens holds; "
            "allowed: PARALLEL=jobs"
        )
    heads = transformer.config.num_attention_heads
    if not can_share(heads, cards):
        allowed = ", ".join(str(count) for count in range(2, _MOST_CARDS + 1) if can_share(heads, count))
        raise InvalidSettings(
            f"PARALLEL=picture: {name} has {heads} attention heads, which {cards} cards cannot share; allowed: "
            f"{allowed} of them (CUDA_VISIBLE_DEVICES), or PARALLEL=jobs"
        )


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
    def at_once(self) -> int:
        """How many plans are drawn at once."""
        return len(self._engines)

    def prepare(self, plan: Plan) -> Noise:
        """As Engine.prepare; of several, nobody knows yet which will read the prompts."""
        first = self._engines[0]
        return first.prepare(plan) if len(self._engines) == 1 else first.draw_noise(plan)

    def draw(self, plan: Plan, on_progress: OnProgress | None = None, noise: Noise = MappingProxyType({})) -> Drawn:
        """As Engine.draw, on the calling thread's device."""
        return self._engines[current_device() % len(self._engines)].draw(plan, on_progress, noise)

    def check_adapters(self, adapters: Sequence[Adapter]) -> tuple[list[Fault], list[str]]:
        """As Engine.check_adapters; what is read is for whichever engine gets the job."""
        return self._engines[0].check_adapters(adapters)

    def loaded(self) -> Loaded:
        """What is in memory of any of the devices, and where the weights live on the first."""
        found = [engine.loaded() for engine in self._engines]
        return Loaded(
            tuple(dict.fromkeys(name for each in found for name in each.adapters)),
            tuple(dict.fromkeys(name for each in found for name in each.controlnets)),
            {**found[0].placement, "devices": [name for engine in self._engines for name in engine.devices]},
            found[0].acceleration,
        )

    def fetch(self, plan: Plan, before_download: Callable[[], None] = lambda: None) -> None:
        """As Engine.fetch: the first downloads, the others find it here."""
        for engine in self._engines:
            engine.fetch(plan, before_download)

    def warm_up(self, plan: Plan, steps: int) -> float:
        """As Engine.warm_up, one device after another; the seconds of the slowest."""
        return max(engine.warm_up(plan, steps) for engine in self._engines)

    def keep_compiled(self) -> None:
        """As Engine.keep_compiled; cards of one kind share what was compiled."""
        self._engines[0].keep_compiled()
