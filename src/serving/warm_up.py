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

from src.catalog import CONTROL_TYPES
from src.errors import InvalidRequest, InvalidSettings
from src.plan.plan import make_plan
from src.request.reading import read_request
from src.request.schema import PICTURES
from src.settings import Settings

if TYPE_CHECKING:
    from src.engine import Engine

log = logging.getLogger("worker")


class Warm(NamedTuple):
    """One size that was drawn: the seconds of a picture of it, and its work, steps times pixels."""

    width: int
    height: int
    seconds: float
    work: float


def warm_up(
    engine: Engine, settings: Settings, on_device: Callable[[Callable[[], float]], float] = lambda work: work()
) -> Iterator[Warm]:
    """Draw the configured sizes; raises InvalidSettings where one cannot be drawn."""
    model, sizes = engine.model, settings.warmup_sizes
    for width, height in ((model.width, model.height),) if sizes is None else sizes:
        needs = dict.fromkeys(model.base.needs, "warm-up")  # Fill draws nothing without its pictures
        pictures = {name: (Image.new(PICTURES[name], (width, height), "white"),) for name in needs}
        if "control_image" in needs:
            needs["control_type"] = model.control_type or CONTROL_TYPES[0]
        fields = {"prompt": "warm-up", "num_inference_steps": 2, "width": width, "height": height, **needs}
        try:
            request, faults, _ = read_request({"input": fields})
            plan = make_plan(request, faults, model, pictures, max_pixels=settings.max_pixels)
        except InvalidRequest as error:
            raise InvalidSettings(f"WARMUP_SIZES: {error}") from error
        log.debug("warming up with %dx%d", width, height)
        if (several := settings.batch_size) > 1 and not pictures:  # another shape, to compile for
            seeds = tuple(range(several))
            batch = replace(plan, prompts=plan.prompts * several, seeds=seeds, batch_size=several)
            on_device(partial(engine.warm_up, batch, model.num_inference_steps))
        seconds = on_device(partial(engine.warm_up, plan, model.num_inference_steps))
        yield Warm(width, height, seconds, plan.work / plan.steps * model.num_inference_steps)


def seconds_of(warm: Warm) -> dict[str, float]:
    """As the start's line tells it."""
    return {f"seconds_of_{warm.width}x{warm.height}": round(warm.seconds, 2)}
