"""What a picture will look like, guessed while it is denoised."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from PIL import Image

from src.engine.memory import free_memory, is_out_of_memory
from src.engine.pipelines import tokens_to_latents
from src.plan.plan import Plan

SECONDS_BETWEEN = 1.0
_LATENTS = 32  # the longer side: 256 pixels


class Preview:
    """Guesses the finished picture from two steps, at a small size, no oftener than once a second."""

    def __init__(self, pipeline: Any, plan: Plan) -> None:
        self._pipeline = pipeline
        self._canvas = plan.canvas
        self._steps = plan.steps
        self._last: torch.Tensor | None = None
        self._shown = -math.inf

    def look(self, step: int, latents: torch.Tensor) -> Image.Image | None:
        """The first picture of the batch after `step`, from packed `latents` [pictures, tokens, channels].

        None where it is too early, and where there is no memory for it. A flow goes straight from noise to picture
        (arXiv 2209.03003): x(sigma) = x0 + sigma v, so two points are enough to find x0.
        """
        last, self._last = self._last, latents[:1].clone()
        sigmas = self._pipeline.scheduler.sigmas
        if last is None or time.monotonic() - self._shown < SECONDS_BETWEEN:
            return None
        before, now = (float(sigmas[step - self._steps + offset]) for offset in (-1, 0))
        if before == now:
            return None
        self._shown = time.monotonic()
        try:
            return self._decode(self._last - now * (self._last - last) / (now - before))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            free_memory(error)
        return None

    def _decode(self, latents: torch.Tensor) -> Image.Image | None:
        """RGB, a side of 256 pixels at most, from latents [1, tokens, channels]; None of what is not finite."""
        pipeline, vae = self._pipeline, self._pipeline.vae
        unpacked = tokens_to_latents(pipeline, latents, self._canvas)
        shrink = min(1.0, _LATENTS / max(unpacked.shape[-2:]))
        small = torch.nn.functional.interpolate(unpacked, scale_factor=shrink, mode="area")
        decoded = vae.decode(small.to(vae.dtype), return_dict=False)[0]
        if not decoded.isfinite().all():
            return None
        picture: Image.Image = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        return picture
