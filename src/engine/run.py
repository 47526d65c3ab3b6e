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

# How a full host, a full card and cuBLAS say it where torch has no class for it.
_NO_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Generation:
    """What a Plan became: RGB pictures of the plan's width and height, in the order of its seeds."""

    pictures: tuple[Image.Image, ...]
    scheduler: str  # the row of the catalog that was used, or the class of the model's own where it has none
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
        own = Scheduler(type(pipeline.scheduler).__name__)
        self._own_scheduler_name = next((name for name, row in SCHEDULERS.items() if row == own), own.class_name)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.enable_attention_slicing()  # FLUX has nothing that it could slice (diffusers 0.42); others may

    def run(self, plan: Plan, on_progress: OnProgress | None = None) -> Generation:
        """Make the plan's pictures; `on_progress` hears of every step, and may raise to stop.

        Raises OutOfMemory, GenerationFailed or DeviceFailed; after the first two the engine is as before.
        """
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
        watch = _Watch(plan, on_progress or (lambda _: None), torch.cuda.synchronize if self._on_cuda else lambda: None)
        with _as_worker_errors(plan), torch.inference_mode():
            scheduler = self._set_scheduler(plan)
            watch.begin("encode_prompt")
            prompt = self._encode(plan)
            pictures = [picture for seeds in plan.batches() for picture in self._draw(plan, prompt, seeds, watch)]
            watch.end()
        return Generation(
            pictures=tuple(_middle(picture, plan.width, plan.height) for picture in pictures),
            scheduler=scheduler,
            timings=watch.seconds,
            warnings=self._truncation(plan),
            peak_memory=torch.cuda.max_memory_allocated() if self._on_cuda else None,
        )

    def _draw(
        self, plan: Plan, prompt: dict[str, torch.Tensor], seeds: tuple[int, ...], watch: _Watch
    ) -> list[Image.Image]:
        """Denoise and decode the pictures of `seeds` together."""

        def on_step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            watch.step()
            if step + 1 == plan.num_inference_steps:
                if not tensors["latents"].isfinite().all():
                    raise GenerationFailed(
                        f"the model's values are not finite after {step + 1} steps with guidance_scale "
                        f"{plan.guidance_scale}; try another seed, scheduler or guidance_scale"
                    )
                watch.begin("decode")
            return {}

        watch.begin("denoise")
        torch.manual_seed(seeds[0])  # for schedulers that add noise of their own: no pipeline hands them the generator
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
        name = plan.scheduler or self._own_scheduler_name
        row = SCHEDULERS.get(name) or Scheduler(name)
        own = self._own_scheduler.config
        scheduler = getattr(diffusers, row.class_name).from_config({**own, **row.config})
        if not row.flow_match:
            # These take a shift from FLUX's pipelines only as exp(mu), where mu lies between base_shift and
            # max_shift; from_config drops both.
            mu = math.log(own["shift"])
            shifts = (own["base_shift"], own["max_shift"]) if own["use_dynamic_shifting"] else (mu, mu)
            scheduler.register_to_config(
                use_dynamic_shifting=True, time_shift_type="exponential", base_shift=shifts[0], max_shift=shifts[1]
            )
        self._pipeline.scheduler = scheduler
        return name

    def _truncation(self, plan: Plan) -> tuple[str, ...]:
        limit = plan.max_sequence_length
        texts = {"prompt": plan.prompt, "negative_prompt": plan.negative_prompt or ""}
        counts = {name: len(self._pipeline.tokenizer_2(text).input_ids) for name, text in texts.items()}
        return tuple(
            f"{name} has {count} tokens and the model read the first {limit}"
            for name, count in counts.items()
            if count > limit
        )

    @property
    def _on_cuda(self) -> bool:
        return bool(self._pipeline.device.type == "cuda")


class _Watch:
    """Times the phases of one plan and reports its progress; `settle` waits for the device."""

    def __init__(self, plan: Plan, report: OnProgress, settle: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._report = report
        self._settle = settle
        self._steps = plan.num_inference_steps * len(list(plan.batches()))
        self._step = 0
        self._phase = ""
        self._since = 0.0

    def begin(self, phase: str) -> None:
        """End the running phase, if any, and begin another."""
        self.end()
        self._phase, self._since = phase, time.perf_counter()
        self._report(Progress(phase, self._step, self._steps))

    def step(self) -> None:
        """One step is done."""
        self._step += 1
        self._report(Progress(self._phase, self._step, self._steps))

    def end(self) -> None:
        """End the running phase; its seconds add to those that it had before."""
        if self._phase:
            self._settle()
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + time.perf_counter() - self._since


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
        if any(words in str(error) for words in _NO_MEMORY):
            raise _out_of_memory(plan, error) from error
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
            raise DeviceFailed(f"the device failed and this worker must be replaced: {_first_line(error)}") from error
        raise GenerationFailed(f"the model refused these tensors: {_first_line(error)}") from error


def _out_of_memory(plan: Plan, error: BaseException) -> OutOfMemory:
    traceback.clear_frames(error.__traceback__)  # their locals hold the very tensors that did not fit
    gc.collect()
    torch.cuda.empty_cache()
    return OutOfMemory(
        f"{plan.width}x{plan.height} with {len(plan.seeds)} image(s), {plan.batch_size} at once, needs more memory "
        "than there is; ask for a smaller width, height or num_images, set BATCH_SIZE=1, or choose a larger card"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
