"""Pictures -> the response that RunPod carries to the client.

Knows nothing of how pictures are made.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from src.catalog import Model
from src.images import image_to_base64
from src.plan import Plan

if TYPE_CHECKING:  # the engine package imports torch; only its shape is needed here
    from src.engine import Generation


def deliver(generation: Generation, plan: Plan, model: Model, revision: str | None) -> dict[str, Any]:
    """The contract's success: base64 pictures in the order of their seeds, and what made them.

    Each picture's file carries the event that makes that one picture again, and the model that made it.
    """
    started = time.perf_counter()
    made_by = {"model": model.name, "model_revision": revision}
    images = [
        image_to_base64(picture, plan.output_format, plan.output_quality, {"input": plan.parameters(seed), **made_by})
        for picture, seed in zip(generation.pictures, plan.seeds, strict=True)
    ]
    inference_time = sum(generation.timings.values())
    timings = {**generation.timings, "encode_images": time.perf_counter() - started}
    timings["total"] = sum(timings.values())
    metadata = {
        **made_by,
        "mode": plan.mode,
        "prompt": plan.prompt,
        "negative_prompt": plan.negative_prompt,
        "true_cfg_scale": plan.true_cfg_scale,
        "seed": plan.seeds[0],
        "seeds": list(plan.seeds),
        "width": plan.width,
        "height": plan.height,
        "num_inference_steps": plan.num_inference_steps,
        "guidance_scale": plan.guidance_scale,
        "max_sequence_length": plan.max_sequence_length,
        "num_images": len(plan.seeds),
        "output_format": plan.output_format,
        "output_quality": plan.output_quality,
        "scheduler": generation.scheduler,
        "loras": [],
        "inference_time": round(inference_time, 4),
        "timings": {phase: round(seconds, 4) for phase, seconds in timings.items()},
        "peak_memory": generation.peak_memory,
        "warnings": [*plan.warnings, *generation.warnings],
    }
    return {"status": "success", "images": images, "metadata": metadata}
