"""Which network hears each control picture of a request, as what and how much.

Pure decisions: pictures and weights are somebody else's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from src.catalog import CONTROL_TYPES, ControlNet, Hearing, Model, Pipeline, controlnets_for
from src.errors import Fault
from src.pictures import PREPROCESSORS
from src.request import Control, Request
from src.wording import did_you_mean, show

# An option of an entry of `controls`, and the field that says it of control_image; some want a ControlNet.
OWN_OPTIONS = {
    "type": "control_type",
    "scale": "controlnet_conditioning_scale",
    "start": "control_guidance_start",
    "end": "control_guidance_end",
    "preprocess": "preprocess",
}
_HEARD = {"scale", "start", "end"}


@dataclass(frozen=True)
class PlannedControl:
    """One control picture; `net` is None where the model itself hears it."""

    asked: Control
    type: str
    net: ControlNet | None
    mode: int | None  # what a union network calls the type
    scale: float
    start: float
    end: float

    @property
    def network(self) -> str | None:
        """The name of `net`."""
        return self.net.name if self.net else None


def decide_controls(
    request: Request, model: Model, pipeline: Pipeline, steps: int, preferred: Sequence[str]
) -> tuple[tuple[PlannedControl, ...], list[Fault]]:
    """The request's controls in their order, and what is wrong of them; `steps` is how often the model is called."""
    faults: list[Fault] = []
    decided = []
    nets = controlnets_for(model, preferred) if pipeline.controlnet else ()
    types = list(dict.fromkeys(type for net in nets for type in net.types))
    if not pipeline.controlnet:
        types = [model.control_type] if model.control_type else list(CONTROL_TYPES)
    for field, control in request.all_controls():

        def wrong(option: str, message: str, field: str = field) -> None:
            name = OWN_OPTIONS[option] if field == "control_image" else f"{field}.{option}"
            faults.append(Fault(name, message))

        said = control.type or (types[0] if len(types) == 1 else "")
        kind = " ".join(re.sub("[_-]", " ", said.lower()).split())
        if not kind:
            wrong("type", f"is required with {field}; {model.name} allows: {', '.join(types)}")
        elif kind not in types:
            hint = did_you_mean(kind, types)
            wrong("type", f"cannot be {show(control.type)}{hint}; {model.name} allows: {', '.join(types)}")
        if control.preprocess and kind not in PREPROCESSORS:
            wrong("preprocess", f"knows {', '.join(PREPROCESSORS)}; send a {kind} picture as it is")
        net = next((net for net in nets if kind in net.types), None)
        hearing = net.types[kind] if net else Hearing(1.0)
        end = hearing.guidance_end if control.end is None else control.end
        # As diffusers counts them.
        heard = [i for i in range(steps) if i / steps >= control.start and (i + 1) / steps <= end]
        if steps > 0 and not heard:
            wrong("start", f"and the end leave none of {steps} steps to hear it, got {control.start:g} and {end:g}")
        scale = hearing.conditioning_scale if control.scale is None else control.scale
        decided.append(PlannedControl(control, kind, net, hearing.mode, scale, control.start, end))
    if request.control_image is None:
        without = [name for name in OWN_OPTIONS.values() if name in request.said & pipeline.takes]
        faults += [Fault(name, "has no effect without control_image; each of controls has its own") for name in without]
    if not pipeline.controlnet:
        if len(decided) > 1:
            faults.append(Fault("controls", f"{model.name} hears one control picture, got {len(decided)}"))
        asked = [(i, name) for i, control in enumerate(request.controls) for name in _HEARD & control.model_fields_set]
        faults += [Fault(f"controls.{i}.{name}", f"cannot be used by {model.name}") for i, name in sorted(asked)]
    return tuple(decided), faults
