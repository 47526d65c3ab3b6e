"""Request + model row -> frozen Plan, or an error with every fault. Every decision about a request is taken here.

Nothing here knows of torch, of memory or of how pictures travel.
"""

from __future__ import annotations

import difflib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from src.catalog import FAMILIES, SCHEDULERS, Model
from src.errors import Fault, InvalidRequest
from src.images import FORMATS
from src.request import MAX_SEED, Request, show

_PICKED_SEEDS = 2**32  # JavaScript reads integers up to 2^53 exactly: a picked seed survives every client


@dataclass(frozen=True)
class Plan:
    """Everything that the engine and the delivery need to know; nothing is left to decide."""

    mode: str
    prompt: str
    negative_prompt: str | None
    true_cfg_scale: float
    width: int
    height: int
    canvas: tuple[int, int]  # width and height that the model draws; the middle of it is delivered
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    scheduler: str | None  # a row of the catalog; None is the model's own
    seeds: tuple[int, ...]  # one a picture
    batch_size: int
    output_format: str
    output_quality: int
    preview: bool = False
    warnings: tuple[str, ...] = ()

    def batches(self) -> Iterator[tuple[int, ...]]:
        """The seeds of the pictures that are denoised together."""
        for first in range(0, len(self.seeds), self.batch_size):
            yield self.seeds[first : first + self.batch_size]

    def parameters(self, seed: int) -> dict[str, Any]:
        """The request that makes the one picture of `seed` again."""
        request: dict[str, Any] = {
            "prompt": self.prompt,
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "max_sequence_length": self.max_sequence_length,
            "seed": seed,
            "output_format": self.output_format,
            "output_quality": self.output_quality,
        }
        if self.negative_prompt is not None:
            request |= {"negative_prompt": self.negative_prompt, "true_cfg_scale": self.true_cfg_scale}
        if self.scheduler is not None:
            request["scheduler"] = self.scheduler
        return request


@dataclass(frozen=True)
class Progress:
    """How far a job has got: `step` of `steps` over all its pictures are done.

    `phase` is queued, encode_prompt, denoise, decode, encode_images or upload.
    """

    phase: str
    step: int = 0
    steps: int = 0
    preview: Image.Image | None = None  # what the picture will look like, small


def make_plan(request: Request, faults: Sequence[Fault], model: Model, *, max_pixels: int, batch_size: int = 1) -> Plan:
    """Decide everything that `request` left open.

    Raises InvalidRequest with the `faults` that reading it found and those that only the model's row shows.
    """
    wrong = {fault.field for fault in faults}
    faults = list(faults)
    warnings = []

    width, height = request.width or model.width, request.height or model.height
    if width * height > max_pixels and not wrong & {"width", "height"}:
        faults.append(
            Fault(
                "width",
                f"times height must be at most {max_pixels:,} pixels, got {width}x{height} = {width * height:,}",
            )
        )

    limit = model.max_sequence_length
    if (request.max_sequence_length or 1) > limit:
        faults.append(
            Fault(
                "max_sequence_length",
                f"must be an integer from 1 to {limit} for {model.name}, got {show(request.max_sequence_length)}",
            )
        )

    if request.scheduler is not None and request.scheduler not in SCHEDULERS:
        close = difflib.get_close_matches(request.scheduler.lower(), SCHEDULERS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        faults.append(
            Fault(
                "scheduler", f"is no scheduler, got {show(request.scheduler)}{hint}; allowed: {', '.join(SCHEDULERS)}"
            )
        )

    negative_prompt = request.negative_prompt or ""
    if negative_prompt.strip() and request.true_cfg_scale == 1 and "true_cfg_scale" not in wrong:
        faults.append(
            Fault(
                "negative_prompt",
                "has no effect while true_cfg_scale is 1; set true_cfg_scale above 1 (4, say) or leave it out",
            )
        )

    if request.guidance_scale is not None and not FAMILIES[model.family].guidance_embeds:
        warnings.append(f"guidance_scale has no effect on {model.name}: it was trained without guidance")

    if "output_quality" in request.model_fields_set and not FORMATS[request.output_format].quality:
        warnings.append(f"output_quality has no effect on {request.output_format}")

    if faults:
        raise InvalidRequest(faults)

    first = secrets.randbelow(_PICKED_SEEDS) if request.seed is None else request.seed
    return Plan(
        mode="text-to-image",
        prompt=request.prompt,
        negative_prompt=negative_prompt if request.true_cfg_scale > 1 else None,
        true_cfg_scale=request.true_cfg_scale,
        width=width,
        height=height,
        canvas=(_round_up(width, model.side_multiple), _round_up(height, model.side_multiple)),
        num_inference_steps=request.num_inference_steps or model.num_inference_steps,
        guidance_scale=model.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        max_sequence_length=request.max_sequence_length or limit,
        scheduler=request.scheduler,
        seeds=tuple((first + i) % (MAX_SEED + 1) for i in range(request.num_images)),
        batch_size=batch_size,
        output_format=request.output_format,
        output_quality=request.output_quality,
        preview=request.preview,
        warnings=tuple(warnings),
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
