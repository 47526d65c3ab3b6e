"""What this worker can do, for clients that ask: `{"input": {"describe": true}}`.

Knows nothing of the device; answering takes none of its time.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from src.aliases import ALIASES, NAMED_SIZES, WITHOUT_EFFECT
from src.catalog import FAMILIES, SCHEDULERS, Model, controlnets_for
from src.plan import Plan
from src.request import MAX_SIDE, Request
from src.settings import Settings


@dataclass(frozen=True)
class Held:
    """What the engine holds now: adapters as they were asked for, ControlNets by name, and where its weights live."""

    adapters: tuple[str, ...]
    controlnets: tuple[str, ...]
    placement: Mapping[str, Any]


_MOST_FILES = 200  # of LORA_DIR; an answer must stay small


def describe(model: Model, revision: str | None, settings: Settings, held: Held) -> dict[str, Any]:
    """The model, its modes, defaults and limits, what is held where, and the JSON Schema of a request."""
    return {
        "status": "success",
        "describe": {
            "model": model.name,
            "model_revision": revision,
            "licence": model.licence,
            "modes": {
                mode: {"needs": sorted(row.needs), "takes": sorted(row.takes)} for mode, row in model.pipelines.items()
            },
            "defaults": {
                "width": model.width,
                "height": model.height,
                "num_inference_steps": model.num_inference_steps,
                "guidance_scale": model.guidance_scale if FAMILIES[model.family].guided else None,
                "max_sequence_length": model.max_sequence_length,
            },
            "limits": {
                "max_pixels": settings.max_pixels,
                "max_side": MAX_SIDE,
                "max_guidance_scale": model.max_guidance_scale,
                "max_sequence_length": model.max_sequence_length,
                "max_response_mb": settings.max_response_mb,
                "request_timeout": settings.request_timeout,
            },
            "schedulers": {name: {"starts_from_a_picture": row.starts_midway} for name, row in SCHEDULERS.items()},
            "adapters": {
                "lora_dir": [str(file.relative_to(settings.lora_dir)) for file in _adapters(settings)],
                "in_memory": list(held.adapters),
            },
            "controlnets": {
                net.name: {
                    "types": {
                        kind: {"conditioning_scale": hearing.conditioning_scale, "guidance_end": hearing.guidance_end}
                        for kind, hearing in net.types.items()
                    },
                    "licence": net.licence,
                    "loaded": net.name in held.controlnets,
                }
                for net in controlnets_for(model, settings.controlnets)
            },
            "image_prompt": settings.redux_model if "image_prompt" in model.base.takes else None,
            "placement": dict(held.placement),
            "aliases": dict(ALIASES),
            "without_effect": dict(WITHOUT_EFFECT),
            "named_sizes": {name: list(size) for name, size in NAMED_SIZES.items()},
            "delivery": "image_urls" if settings.bucket_endpoint_url else "images",
            "schema": Request.model_json_schema(),
        },
    }


def _adapters(settings: Settings) -> list[Path]:
    return sorted(itertools.islice(settings.lora_dir.rglob("*.safetensors"), _MOST_FILES))


def show_plan(plan: Plan) -> dict[str, Any]:
    """What would be done, for `{"input": {"dry_run": true, ...}}`: the plan as JSON, pictures by their references."""
    told = {field.name: getattr(plan, field.name) for field in fields(plan)}
    told["controls"] = [
        {
            "type": control.type,
            "controlnet": control.network,
            "scale": control.scale,
            "start": control.start,
            "end": control.end,
            "preprocess": control.asked.preprocess,
        }
        for control in plan.controls
    ]
    told["adapters"] = [adapter.told() for adapter in plan.adapters]
    told |= {"pipeline": plan.pipeline.class_name, "pictures": dict(told.pop("references"))}
    for name in ("canvas", "prompts", "seeds", "warnings", "sigmas"):
        told[name] = None if told[name] is None else list(told[name])
    return {"status": "success", "plan": told}
