"""What this worker can do, for clients that ask: `{"input": {"describe": true}}`.

Knows nothing of the device; answering takes none of its time.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from src.aliases import ALIASES, NAMED_SIZES
from src.catalog import FAMILIES, SCHEDULERS, Model
from src.plan import Plan
from src.request import Request
from src.settings import Settings


def describe(model: Model, revision: str | None, settings: Settings) -> dict[str, Any]:
    """The model, its modes, defaults and limits, and the JSON Schema of a request."""
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
                "max_sequence_length": model.max_sequence_length,
                "max_response_mb": settings.max_response_mb,
                "request_timeout": settings.request_timeout,
            },
            "schedulers": {name: {"starts_from_a_picture": row.starts_midway} for name, row in SCHEDULERS.items()},
            "aliases": dict(ALIASES),
            "named_sizes": {name: list(size) for name, size in NAMED_SIZES.items()},
            "delivery": "image_urls" if settings.bucket_endpoint_url else "images",
            "schema": Request.model_json_schema(),
        },
    }


def show_plan(plan: Plan) -> dict[str, Any]:
    """What would be done, for `{"input": {"dry_run": true, ...}}`: the plan as JSON, pictures by their references."""
    told = {field.name: getattr(plan, field.name) for field in fields(plan)}
    told["adapters"] = [adapter.asked.model_dump(exclude_none=True) for adapter in plan.adapters]
    told |= {"pipeline": plan.pipeline.class_name, "pictures": dict(told.pop("references"))}
    for name in ("canvas", "seeds", "warnings", "sigmas"):
        told[name] = None if told[name] is None else list(told[name])
    return {"status": "success", "plan": told}
