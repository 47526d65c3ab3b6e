"""Which network reads each control picture of a request, as what and how much.

Pure decisions: pictures and weights are somebody else's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from src.catalog import CONTROL_TYPES, ControlDefaults, ControlNet, Model, ModeSpec, controlnets_for
from src.errors import Fault
from src.plan.preprocessors import PREPROCESSORS
from src.request.schema import CONTROL_OPTIONS, Request
from src.wording import did_you_mean, show

_OF_CONTROLNETS = ("scale", "start", "end")  # options that a model which reads the picture by itself has not


@dataclass(frozen=True)
class PlannedControl:
    """One control picture; `net` is None where the model itself reads it."""

    type: str
    net: ControlNet | None
    control_mode: int | None  # what a union network calls the type
    scale: float
    start: float
    end: float
    preprocess: bool

    @property
    def network(self) -> str | None:
        """The name of `net`."""
        return self.net.name if self.net else None

    def options(self) -> dict[str, Any]:
        """The options of a request's entry that say all this again."""
        of_net = {name: getattr(self, name) for name in _OF_CONTROLNETS} if self.net else {}
        return {"type": self.type, **of_net, "preprocess": self.preprocess}


def decide_controls(
    request: Request, model: Model, spec: ModeSpec, steps: int, preferred: Sequence[str]
) -> tuple[tuple[PlannedControl, ...], list[Fault]]:
    """The request's controls in their order, and their faults; `steps` is how often the model is called."""
    faults: list[Fault] = []
    decided = []
    nets = controlnets_for(model, preferred) if spec.controlnet else ()
    types = list(dict.fromkeys(type for net in nets for type in net.types))
    if not spec.controlnet:
        types = [model.control_type] if model.control_type else list(CONTROL_TYPES)
    for i, control in enumerate(request.controls):
        field = request.entry_field("controls", i)

        def wrong(option: str, message: str, field: str = field) -> None:
            name = CONTROL_OPTIONS[option] if field == "control_image" else f"{field}.{option}"
            faults.append(Fault(name, message))

        asked = control.type or (types[0] if len(types) == 1 else "")
        kind = " ".join(re.sub("[_-]", " ", asked.lower()).split())
        if not kind:
            wrong("type", f"is required with {field}; {model.name} allows: {', '.join(types)}")
        elif kind not in types:
            hint = did_you_mean(kind, types)
            wrong("type", f"cannot be {show(control.type)}{hint}; {model.name} allows: {', '.join(types)}")
        elif control.preprocess and kind not in PREPROCESSORS:
            wrong("preprocess", f"can make {', '.join(PREPROCESSORS)} pictures; send a {kind} picture as it is")
        net = next((net for net in nets if kind in net.types), None)
        defaults = net.types[kind] if net else ControlDefaults(1.0)
        end = defaults.guidance_end if control.end is None else control.end
        # As diffusers counts them.
        steps_within = [i for i in range(steps) if i / steps >= control.start and (i + 1) / steps <= end]
        if steps > 0 and not steps_within:
            got = f"a start of {control.start:g} and an end of {end:g}"
            wrong("start", f"must leave one of {steps} steps before the end, got {got}")
        scale = defaults.conditioning_scale if control.scale is None else control.scale
        decided.append(PlannedControl(kind, net, defaults.control_mode, scale, control.start, end, control.preprocess))
        if not spec.controlnet and field != "control_image":
            for option in _OF_CONTROLNETS:
                if option in control.model_fields_set:
                    wrong(option, f"cannot be used by {model.name}")
    if not spec.controlnet and len(decided) > 1:
        faults.append(Fault("controls", f"must hold one control picture on {model.name}, got {len(decided)}"))
    return tuple(decided), faults
