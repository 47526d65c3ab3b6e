"""What this worker can do, for clients that ask: `{"input": {"describe": true}}`.

Knows nothing of the device; answering takes none of its time.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src import __version__
from src.catalog import EVERY_MODE_TAKES, FAMILIES, FORMATS, SPEEDS, Model, controlnets_for, schedulers_for
from src.outputs import Loaded
from src.plan.plan import Plan
from src.redaction import hide_known_in
from src.request.aliases import ALIASES, NAMED_SIZES, WITHOUT_EFFECT
from src.request.schema import Request
from src.settings import Settings

_MOST_FILES = 200  # of LORA_DIR; an answer must stay small


def describe(model: Model, revision: str | None, settings: Settings, loaded: Loaded) -> dict[str, Any]:
    """The model, its modes, defaults and limits, what is loaded where, and the JSON Schema of a request."""
    answer: dict[str, Any] = {
        "status": "success",
        "describe": {
            "worker_version": __version__,
            "model": model.name,
            "model_revision": revision,
            "base_model": model.base_model,
            "single_file": dict(model.single_file) if model.single_file else None,
            "licence": model.licence,
            "takes": sorted(EVERY_MODE_TAKES),
            "modes": {
                mode: {"needs": sorted(row.needs), "takes": sorted(row.takes), "references": row.references}
                for mode, row in model.modes.items()
            },
            "defaults": {
                "width": model.width,
                "height": model.height,
                "num_inference_steps": model.num_inference_steps,
                "guidance_scale": model.guidance_scale if FAMILIES[model.family].guided else None,
                "true_cfg_scale": model.true_cfg_scale if "true_cfg_scale" in model.base.takes else None,
                "max_sequence_length": model.max_sequence_length,
            },
            "limits": {
                "max_pixels": settings.max_pixels,
                "max_side": model.max_side,
                "max_guidance_scale": model.max_guidance_scale,
                "max_sequence_length": model.max_sequence_length,
                "max_response_mb": settings.max_response_mb,
                "request_timeout": settings.request_timeout,
            },
            "output_formats": {name: {"takes_quality": row.quality} for name, row in FORMATS.items()},
            "speeds": list(SPEEDS),
            "schedulers": {
                name: {"starts_from_a_picture": row.starts_midway} for name, row in schedulers_for(model).items()
            },
            "adapters": {
                "lora_dir": [str(file.relative_to(settings.lora_dir)) for file in _adapters(settings)],
                **_in_memory(settings, loaded.adapters),
            },
            "controlnets": {
                net.name: {
                    "types": {
                        kind: {"conditioning_scale": row.conditioning_scale, "guidance_end": row.guidance_end}
                        for kind, row in net.types.items()
                    },
                    "licence": net.licence,
                    "loaded": net.name in loaded.controlnets,
                }
                for net in controlnets_for(model, settings.controlnets)
            },
            "image_prompt": settings.redux_model if "image_prompt" in model.base.takes else None,
            "prompt_upsampler": settings.prompt_upsampler if model.upsamples else None,
            "placement": dict(loaded.placement),
            "acceleration": dict(loaded.acceleration),
            "aliases": dict(ALIASES),
            "without_effect": dict(WITHOUT_EFFECT),
            "named_sizes": {name: list(size) for name, size in NAMED_SIZES.items()},
            "delivery": "image_urls" if settings.bucket_endpoint_url else "images",
            "schema": Request.model_json_schema(),
        },
    }
    return hide_known_in(answer)


def _adapters(settings: Settings) -> list[Path]:
    return sorted(itertools.islice(settings.lora_dir.rglob("*.safetensors"), _MOST_FILES))


def _in_memory(settings: Settings, adapters: Sequence[str]) -> dict[str, Any]:
    """The adapters in memory that lie in LORA_DIR; of the others, which clients named, how many there are."""
    own = [name for path in adapters if (name := _name_in(settings.lora_dir.resolve(), path))]
    return {"in_memory": own, "others_in_memory": len(adapters) - len(own)}


def _name_in(root: Path, path: str) -> str:
    """The file that `path` names below `root`, by its own name, however a client wrote it; empty for any other."""
    try:
        file = (root / path).resolve()
        return str(file.relative_to(root)) if file.is_relative_to(root) and file.is_file() else ""
    except (OSError, ValueError):  # too long for a name, or no name at all
        return ""


def show_plan(plan: Plan) -> dict[str, Any]:
    """What would be done, for `{"input": {"dry_run": true, ...}}`: the plan as JSON, pictures by their references."""
    controls = [
        {
            "type": control.type,
            "controlnet": control.network,
            "scale": control.scale,
            "start": control.start,
            "end": control.end,
            "preprocess": control.preprocess,
        }
        for control in plan.controls
    ]
    answer: dict[str, Any] = {
        "status": "success",
        "plan": {
            "mode": plan.mode,
            "pipeline": plan.spec.class_name,
            **plan.sampling.values(),
            "prompts": list(plan.prompts),
            "seeds": list(plan.seeds),
            "canvas": list(plan.canvas),
            "steps": plan.steps,
            "batch_size": plan.batch_size,
            "pictures": plan.sampling.pictures(),
            "controls": controls,
            "adapters": [adapter.summary() for adapter in plan.adapters],
            "preview": plan.preview,
            "warnings": list(plan.warnings),
        },
    }
    return hide_known_in(answer)
