"""Runs a Plan on a loaded pipeline: prompt encoded once, pictures denoised one after another.

Knows nothing of requests, of how a model is found, or of how pictures travel.
"""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from PIL import Image

from src.catalog import SCHEDULERS, Model, Scheduler
from src.errors import DeviceFailed, GenerationFailed, OutOfMemory
from src.plan import Plan, Progress

OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Generation:
    """What a Plan became: RGB pictures of the plan's width and height, in the order of its seeds."""

    pictures: tuple[Image.Image, ...]
    scheduler: str  # the diffusers class that was used
    timings: dict[str, float]  # seconds: encode_prompt, denoise, decode
    warnings: tuple[str, ...]
    peak_memory: int | None  # bytes on the card; None on the CPU


class Engine:
    """A pipeline of the family in `model`'s row, and the only one who calls it; one plan at a time."""

    def __init__(self, pipeline: Any, model: Model, revision: str | None) -> None:
        self.model = model
        self.revision = revision
        self._pipeline = pipeline
        self._own_scheduler = pipeline.scheduler
        pipeline.set_progress_bar_config(disable=True)
        pipeline.enable_attention_slicing()  # FLUX has nothing that it could slice (diffusers 0.42); others may

    def run(self, plan: Plan, on_progress: OnProgress | None = None) -> Generation:
        """Make the plan's pictures; `on_progress` hears of every step, and may raise to stop.

        Raises OutOfMemory, GenerationFailed or DeviceFailed; after the first two the engine is as before.
        """
        report = on_progress or (lambda _: None)
        timings = dict.fromkeys(("encode_prompt", "denoise", "decode"), 0.0)
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
        with _as_worker_errors(plan), torch.inference_mode():
            scheduler = self._set_scheduler(plan)
            report(Progress("encoding prompt", 0, self._steps(plan)))
            started = self._now()
            prompt = self._encode(plan)
            timings["encode_prompt"] = self._now() - started
            pictures: list[Image.Image] = []
            for number, seeds in enumerate(plan.batches()):
                pictures += self._draw(plan, prompt, seeds, number, timings, report)
        return Generation(
            pictures=tuple(_middle(picture, plan.width, plan.height) for picture in pictures),
            scheduler=scheduler,
            timings=timings,
            warnings=self._truncation(plan),
            peak_memory=torch.cuda.max_memory_allocated() if self._on_cuda else None,
        )

    def _draw(
        self,
        plan: Plan,
        prompt: dict[str, torch.Tensor],
        seeds: tuple[int, ...],
        number: int,
        timings: dict[str, float],
        report: OnProgress,
    ) -> list[Image.Image]:
        """Denoise and decode the pictures of `seeds` together."""
        started = self._now()

        def on_step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            done = step + 1
            report(Progress("denoising", number * plan.num_inference_steps + done, self._steps(plan)))
            if done == plan.num_inference_steps:
                if not tensors["latents"].isfinite().all():
                    raise GenerationFailed(
                        f"the model's values are not finite after {done} steps with guidance_scale {plan.guidance_scale}; "
                        "try another seed, scheduler or guidance_scale"
                    )
                timings["denoise"] += self._now() - started
                report(Progress("decoding", number * plan.num_inference_steps + done, self._steps(plan)))
            return {}

        denoised = timings["denoise"]
        result = self._pipeline(
            **prompt,
            true_cfg_scale=plan.true_cfg_scale,
            width=plan.canvas[0],
            height=plan.canvas[1],
            num_inference_steps=plan.num_inference_steps,
            guidance_scale=plan.guidance_scale,
            max_sequence_length=plan.max_sequence_length,
            num_images_per_prompt=len(seeds),
            # On the CPU, so that a seed means the same picture on every card.
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
            callback_on_step_end=on_step_end,
            callback_on_step_end_tensor_inputs=["latents"],
        )
        timings["decode"] += self._now() - started - (timings["denoise"] - denoised)
        return list(result.images)

    def _encode(self, plan: Plan) -> dict[str, torch.Tensor]:
        """The prompts' embeddings under the names of the pipeline's arguments."""
        names = {"": plan.prompt} | ({"negative_": plan.negative_prompt} if plan.negative_prompt is not None else {})
        arguments: dict[str, torch.Tensor] = {}
        for prefix, text in names.items():
            embeds, pooled, _ = self._pipeline.encode_prompt(
                prompt=text, prompt_2=None, max_sequence_length=plan.max_sequence_length
            )
            arguments |= {f"{prefix}prompt_embeds": embeds, f"{prefix}pooled_prompt_embeds": pooled}
        return arguments

    def _set_scheduler(self, plan: Plan) -> str:
        """A new scheduler for every plan, so that nothing of the last one is left in it."""
        row = SCHEDULERS[plan.scheduler] if plan.scheduler else Scheduler(type(self._own_scheduler).__name__)
        own = self._own_scheduler.config
        config = dict(row.config)
        if not row.flow_match and not own.get("use_dynamic_shifting"):
            # These take a shift from FLUX's pipelines only as exp(mu); mu is between base_shift and max_shift.
            mu = math.log(own.get("shift", 1.0))
            config |= {
                "use_dynamic_shifting": True,
                "time_shift_type": "exponential",
                "base_shift": mu,
                "max_shift": mu,
            }
        self._pipeline.scheduler = getattr(diffusers, row.class_name).from_config(own, **config)
        return row.class_name

    def _truncation(self, plan: Plan) -> tuple[str, ...]:
        tokens = len(self._pipeline.tokenizer_2(plan.prompt).input_ids)
        if tokens <= plan.max_sequence_length:
            return ()
        return (f"the prompt has {tokens} tokens and the model read the first {plan.max_sequence_length}",)

    @staticmethod
    def _steps(plan: Plan) -> int:
        return plan.num_inference_steps * len(list(plan.batches()))

    @property
    def _on_cuda(self) -> bool:
        return bool(self._pipeline.device.type == "cuda")

    def _now(self) -> float:
        if self._on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def _middle(picture: Image.Image, width: int, height: int) -> Image.Image:
    """`width` x `height` pixels of the middle of `picture`."""
    if picture.size == (width, height):
        return picture
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


@contextmanager
def _as_worker_errors(plan: Plan) -> Iterator[None]:
    """What torch and diffusers raise, as what a client can act on; memory is given back first."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _out_of_memory(plan, error) from error
    except (RuntimeError, ValueError, TypeError) as error:
        if "allocate memory" in str(error):  # how torch reports a full host
            raise _out_of_memory(plan, error) from error
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
            raise DeviceFailed(f"the device failed and this worker must be replaced: {_first_line(error)}") from error
        raise GenerationFailed(f"the model refused these tensors: {_first_line(error)}") from error


def _out_of_memory(plan: Plan, error: BaseException) -> OutOfMemory:
    traceback.clear_frames(error.__traceback__)  # their locals hold the very tensors that did not fit
    gc.collect()
    torch.cuda.empty_cache()
    return OutOfMemory(
        f"{plan.width}x{plan.height} with {len(plan.seeds)} image(s), {plan.batch_size} at once, needs more memory than "
        "there is; ask for a smaller width, height or num_images, set BATCH_SIZE=1, or choose a larger card"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
