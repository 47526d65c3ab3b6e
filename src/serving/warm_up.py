"""Pictures of our own before the first job: what is compiled is compiled then, and how long a job takes is known.

Knows nothing of who asks for pictures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image

from src.catalog import CONTROL_TYPES, ModeSpec, controlnets_for
from src.errors import InvalidRequest, InvalidSettings
from src.plan.plan import Plan, make_plan
from src.request.reading import read_request
from src.request.schema import PICTURES
from src.settings import Settings

if TYPE_CHECKING:
    from src.engine import AnyEngine

log = logging.getLogger("worker")


class Warm(NamedTuple):
    """One size that was drawn: the seconds of a picture of it, and its work, steps times pixels."""

    width: int
    height: int
    seconds: float
    work: float


def warm_up(
    engine: AnyEngine, settings: Settings, on_device: Callable[[Callable[[], float]], float] = lambda work: work()
) -> Iterator[Warm]:
    """Draw the configured sizes; raises InvalidSettings where one cannot be drawn."""
    model, sizes = engine.model, settings.warmup_sizes
    for width, height in ((model.width, model.height),) if sizes is None else sizes:
        log.debug("warming up with %dx%d", width, height)
        plan = _plan(engine, settings, width, height, model.base)
        for other in _others(plan, engine, settings):
            on_device(partial(engine.warm_up, other, model.num_inference_steps))
        seconds = on_device(partial(engine.warm_up, plan, model.num_inference_steps))
        yield Warm(width, height, seconds, plan.work / plan.steps * model.num_inference_steps)
    engine.keep_compiled()


def _others(plan: Plan, engine: AnyEngine, settings: Settings) -> Iterator[Plan]:
    """What else of the size of `plan` runs graphs of its own: a batch, references that are read once and kept, and
    blocks of ControlNets that are loaded.
    """
    if (several := settings.batch_size) > 1 and not plan.pictures:
        seeds = tuple(range(several))
        yield replace(plan, prompts=plan.prompts * several, seeds=seeds, batch_size=several)
    for mode in engine.model.modes.values():
        if mode.reads_once:
            yield _plan(engine, settings, plan.sampling.width, plan.sampling.height, mode)
    if engine.loaded().controlnets:
        with_network = next(mode for mode in engine.model.modes.values() if mode.controlnet)
        yield _plan(engine, settings, plan.sampling.width, plan.sampling.height, with_network)


def _plan(engine: AnyEngine, settings: Settings, width: int, height: int, mode: ModeSpec) -> Plan:
    """A picture of two steps; a mode that needs pictures gets white ones."""
    model = engine.model
    needs = dict.fromkeys(mode.needs, "warm-up")  # Fill draws nothing without its pictures
    pictures = {name: (Image.new(PICTURES[name], (width, height), "white"),) for name in needs}
    if mode.controlnet:
        loaded = controlnets_for(model, engine.loaded().controlnets)[0]
        needs["control_type"] = next(iter(loaded.types))
    elif "control_image" in needs:
        needs["control_type"] = model.control_type or CONTROL_TYPES[0]
    fields = {"prompt": "warm-up", "num_inference_steps": 2, "width": width, "height": height, **needs}
    try:
        request, faults, _ = read_request({"input": fields})
        return make_plan(
            request, faults, model, pictures, max_pixels=settings.max_pixels, controlnets=settings.controlnets
        )
    except InvalidRequest as error:
        raise InvalidSettings(f"WARMUP_SIZES: {error}") from error


def seconds_of(warm: Warm) -> dict[str, float]:
    """As the start's line tells it."""
    return {f"seconds_of_{warm.width}x{warm.height}": round(warm.seconds, 2)}
