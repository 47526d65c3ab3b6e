"""Runs a Plan on a loaded pipeline: prompt encoded once, pictures denoised one after another.

Knows nothing of requests, of how a model is found, or of how pictures travel.
"""

from __future__ import annotations

import math
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from PIL import Image

from src.catalog import SCHEDULERS, Model, Scheduler
from src.describe import Held
from src.engine import schedulers
from src.engine.acceleration import Compiled
from src.engine.adapters import Adapters
from src.engine.controlnets import ControlNets
from src.engine.memory import free_memory, is_out_of_memory
from src.engine.placing import Placed
from src.engine.prompts import Embeddings, Prompts
from src.engine.redux import Redux
from src.engine.step_cache import step_cache
from src.errors import DeviceFailed, Fault, GenerationFailed, OutOfMemory
from src.files import Files
from src.job import OnProgress, Progress
from src.lora import Adapter
from src.plan import Plan
from src.settings import Settings

# Request field -> pipeline argument; image_prompt becomes part of the prompt's embeddings.
_ARGUMENTS = {"init_image": "image", "mask_image": "mask_image", "control_image": "control_image"}
_SECONDS_BETWEEN_PREVIEWS = 1.0
_PREVIEW_LATENTS = 32  # the longer side: 256 pixels


@dataclass(frozen=True)
class Generation:
    """What a Plan became: RGB pictures of the plan's width and height, in the order of its seeds."""

    pictures: tuple[Image.Image, ...]
    scheduler: str  # the row of the catalog that was used, or the class of the model's own where it has none
    timings: dict[str, float]  # seconds: encode_prompt, denoise, decode
    warnings: tuple[str, ...]
    peak_memory: int | None  # bytes on the card; None on the CPU
    quantization: str | None = None  # of the weights; None is exact


class Engine:
    """A pipeline of the family in `model`'s row, and the only one who calls it; one plan at a time."""

    def __init__(
        self,
        pipeline: Any,
        model: Model,
        revision: str | None,
        *,
        files: Files | None = None,
        placed: Placed | None = None,
        compiled: Compiled | None = None,
    ) -> None:
        self.model = model
        self.revision = revision
        self._pipeline = pipeline
        self._views = {model.base.class_name: pipeline}
        self._placed = placed or Placed(pipeline, None, pipeline.device)
        self._compiled = compiled
        self._alone = threading.Lock()
        files = files or Files(Settings())
        self._adapters = Adapters(pipeline, files.settings.max_loras)
        device = self._placed.device
        self._controlnets = ControlNets(pipeline, model, files, device)
        self._redux = Redux(pipeline, files, device)
        self._prompts = Prompts(pipeline, self._redux, device)
        self._own_scheduler = pipeline.scheduler
        own = Scheduler(type(pipeline.scheduler).__name__)
        self._own_scheduler_name = next((name for name, row in SCHEDULERS.items() if row == own), own.class_name)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.enable_attention_slicing()  # FLUX has nothing that it could slice (diffusers 0.42); others may

    def run(self, plan: Plan, on_progress: OnProgress | None = None) -> Generation:
        """Make the plan's pictures; `on_progress` hears of every step, and what it raises stops the plan there.

        Where memory is short it is freed, then pictures are drawn one by one, then decoded in tiles; warnings say so.

        Raises OutOfMemory, GenerationFailed, DeviceFailed or what `on_progress` raised; the engine is then as before,
        but for DeviceFailed.
        """
        with self._alone, _as_worker_errors(plan), self._left_clean(), torch.inference_mode():
            return self._run(plan, on_progress or (lambda _: None))

    def _run(self, plan: Plan, on_progress: OnProgress) -> Generation:
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats()
        watch = _Watch(plan, on_progress, torch.cuda.synchronize if self._on_cuda else lambda: None)
        view = self._view(plan)
        scheduler = self._set_scheduler(view, plan)
        arguments: dict[str, Any] = {}
        if plan.adapters:
            watch.begin("load_adapters")
        self._adapters.use(plan.adapters)
        if plan.pipeline.controlnet:
            watch.begin("load_controlnets")
            for other in self._views.values():
                other.controlnet = None  # or it would hold networks that make room now
            view.controlnet, arguments = self._controlnets.use(plan.controls)
        watch.begin("encode_prompt")
        prompts = {prompt: self._encode(plan, prompt) for prompt in dict.fromkeys(plan.prompts)}
        self._placed.prepare(view)
        drawing = _Drawing(view, plan, arguments, watch, self._placed)
        pictures = [picture for prompt, seeds in plan.batches() for picture in drawing.draw(seeds, prompts[prompt])]
        watch.end()
        return Generation(
            pictures=tuple(_finished(picture, plan) for picture in pictures),
            scheduler=scheduler,
            timings=watch.seconds,
            warnings=(*self._prompts.truncation(plan), *drawing.warnings),
            peak_memory=torch.cuda.max_memory_allocated() if self._on_cuda else None,
            quantization=self._placed.quantization,
        )

    def adapter_faults(self, adapters: Sequence[Adapter]) -> list[Fault]:
        """Why adapters do not fit this model; takes no time of the device."""
        return self._adapters.faults(adapters)

    def held(self) -> Held:
        """What is in memory, and where."""
        placement = self._placed.placement
        return Held(self._adapters.in_memory, self._controlnets.in_memory, placement.told() if placement else {})

    def load_controlnets(self, names: Sequence[str]) -> None:
        """Load these at the start, and keep them."""
        self._controlnets.load(names)

    def fetch(self, plan: Plan, before_download: Callable[[], None] = lambda: None) -> None:
        """See that all that only this plan needs is on this machine and made for this model; takes no device time.

        Raises ModelUnavailable with the reason where it is not.
        """
        self._controlnets.fetch(plan.controls, before_download)
        if "image_prompt" in plan.pictures:
            self._redux.fetch(before_download)

    def warm_up(self, plan: Plan, steps: int) -> float:
        """Draw `plan` twice and throw it away; the seconds that it takes, once warm, with `steps` steps."""
        if self._compiled:
            self._compiled.warm_up(lambda: self.run(plan))
        else:
            self.run(plan)
        seconds = self.run(plan).timings
        return sum(seconds.values()) + seconds["denoise"] * (steps / plan.steps - 1)

    @contextmanager
    def _left_clean(self) -> Iterator[None]:
        """However a plan ends, nothing of it stays: no tensors in dead frames, no weights that hooks brought in."""
        try:
            yield
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)
            self._pipeline.maybe_free_model_hooks()
            raise

    def _encode(self, plan: Plan, prompt: str) -> Embeddings:
        """The prompt's embeddings; memory that is short is freed once."""
        try:
            return self._prompts.read(plan, prompt)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            free_memory(error)
        return self._prompts.read(plan, prompt)

    def _view(self, plan: Plan) -> Any:
        """The pipeline of the plan's mode, which shares every weight with the one that was loaded."""
        name = plan.pipeline.class_name
        if name not in self._views:
            networks = {"controlnet": None} if plan.pipeline.controlnet else {}  # set for each plan
            with torch.inference_mode(False), torch.no_grad():  # fp8 weights cannot be looked at within it
                view = getattr(diffusers, name).from_pipe(self._pipeline, dtype=self._pipeline.dtype, **networks)
            view.set_progress_bar_config(disable=True)
            self._views[name] = view
        return self._views[name]

    def _set_scheduler(self, view: Any, plan: Plan) -> str:
        """A new scheduler for every plan, so that nothing of the last one is left in it."""
        name = plan.scheduler or self._own_scheduler_name
        row = SCHEDULERS.get(name) or Scheduler(name)
        own = dict(self._own_scheduler.config)
        if plan.shift is not None:
            own |= {"shift": plan.shift, "use_dynamic_shifting": False}
        found = getattr(schedulers, row.class_name, None) or getattr(diffusers, row.class_name)
        scheduler = found.from_config({**own, **row.config})
        scheduler.register_to_config(use_dynamic_shifting=own["use_dynamic_shifting"])  # Heun's own drops it
        if not row.flow_match:
            # These take a shift from FLUX's pipelines only as exp(mu), where mu lies between base_shift and
            # max_shift; from_config drops both.
            mu = math.log(own["shift"])
            shifts = (own["base_shift"], own["max_shift"]) if own["use_dynamic_shifting"] else (mu, mu)
            scheduler.register_to_config(
                use_dynamic_shifting=True, time_shift_type="exponential", base_shift=shifts[0], max_shift=shifts[1]
            )
        view.scheduler = scheduler
        return name

    @property
    def _on_cuda(self) -> bool:
        return self._placed.device.type == "cuda"


class _Drawing:
    """Turns seeds into pictures of one plan, together as long as there is memory for that."""

    def __init__(self, view: Any, plan: Plan, arguments: Mapping[str, Any], watch: _Watch, placed: Placed) -> None:
        self._view = view
        self._placed = placed
        self._plan = plan
        self._watch = watch
        self._thrift = _Thrift(view)
        self._arguments: dict[str, Any] = {
            **arguments,
            **{
                _ARGUMENTS[name]: list(pictures) if self._takes_several(name) else pictures[0]
                for name, pictures in plan.pictures.items()
                if name in _ARGUMENTS
            },
            "width": plan.canvas[0],
            "height": plan.canvas[1],
            "num_inference_steps": plan.num_inference_steps,
            "guidance_scale": plan.guidance_scale,
            "max_sequence_length": plan.max_sequence_length,
        }
        if plan.pipeline.own_sizes:
            self._arguments |= {"max_area": plan.canvas[0] * plan.canvas[1], "_auto_resize": False}
        if plan.sigmas is not None:
            self._arguments["sigmas"] = list(plan.sigmas)
        for name in ("true_cfg_scale", "strength"):
            if name in plan.pipeline.takes:
                self._arguments[name] = getattr(plan, name)

    @property
    def warnings(self) -> list[str]:
        return self._thrift.warnings

    def _takes_several(self, name: str) -> bool:
        row = self._plan.pipeline
        return (name == "control_image" and row.controlnet) or (name == "init_image" and row.references > 1)

    def draw(self, seeds: tuple[int, ...], prompt: Embeddings) -> list[Image.Image]:
        """Denoise and decode the pictures of `seeds`, all of the one `prompt`."""
        step = self._watch.steps_done
        while True:
            try:
                return self._call(seeds, prompt)
            except Exception as error:
                if not is_out_of_memory(error) or not self._thrift.try_harder(self._watch.phase, len(seeds)):
                    raise
                free_memory(error)
            self._watch.steps_done = step
            if self._thrift.one_by_one and len(seeds) > 1:
                return [picture for seed in seeds for picture in self.draw((seed,), prompt)]

    def _call(self, seeds: tuple[int, ...], prompt: Embeddings) -> list[Image.Image]:
        plan, watch = self._plan, self._watch
        preview = _Preview(self._view, plan) if plan.preview else None

        def on_step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents = tensors["latents"]
            watch.step(len(seeds), preview.look(step, latents) if preview else None)
            if step + 1 == plan.steps:
                if not latents.isfinite().all():
                    raise GenerationFailed(
                        f"the model's values are not finite after {step + 1} steps with guidance_scale "
                        f"{plan.guidance_scale}; try another seed, scheduler or guidance_scale"
                    )
                watch.begin("decode")
            return {}

        watch.begin("denoise")
        torch.manual_seed(seeds[0])  # for schedulers that add noise of their own: no pipeline hands them the generator
        # On the CPU, so that a seed means the same picture on every card.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        with self._placed.denoising(self._view.scheduler, plan.steps, plan.heard), step_cache(self._view, plan):
            result = self._view(
                **self._arguments,
                **prompt,
                **self._start(generators, prompt["prompt_embeds"]),
                num_images_per_prompt=len(seeds),
                generator=generators,
                output_type="pt",
                callback_on_step_end=on_step_end,
                callback_on_step_end_tensor_inputs=["latents"],
            )
        return _pictures(result.images)

    def _start(self, generators: list[torch.Generator], like: torch.Tensor) -> dict[str, torch.Tensor]:
        """The noise that a seed means without its control pictures: encoding those draws from the generator first."""
        if not self._plan.pipeline.controlnet or "init_image" in self._plan.pictures:
            return {}
        width, height = self._plan.canvas
        channels = self._view.transformer.config.in_channels // 4
        noise, _ = self._view.prepare_latents(
            len(generators), channels, height, width, like.dtype, like.device, generators
        )
        return {"latents": noise}


class _Watch:
    """Times the phases of one plan and reports its progress; `settle` waits for the device."""

    def __init__(self, plan: Plan, report: OnProgress, settle: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self.phase = ""
        self.steps_done = 0
        self._report = report
        self._settle = settle
        self._steps = plan.steps * len(plan.seeds)
        self._since = 0.0

    def begin(self, phase: str) -> None:
        """End the running phase, if any, and begin another."""
        self.end()
        self.phase, self._since = phase, time.perf_counter()
        self._report(Progress(phase, self.steps_done, self._steps))

    def step(self, pictures: int, preview: Image.Image | None) -> None:
        """One step of so many pictures is done."""
        self.steps_done += pictures
        self._report(Progress(self.phase, self.steps_done, self._steps, preview))

    def end(self) -> None:
        """End the running phase; its seconds add to those that it had before."""
        if self.phase:
            self._settle()
            self.seconds[self.phase] = self.seconds.get(self.phase, 0.0) + time.perf_counter() - self._since


class _Thrift:
    """What is given up for memory within one plan; each new plan starts with nothing given up."""

    def __init__(self, pipeline: Any) -> None:
        self.warnings: list[str] = []
        self.one_by_one = False
        self._freed = False
        self._tiled = False
        self._vae = pipeline.vae
        self._vae.disable_tiling()
        self._vae.disable_slicing()

    def try_harder(self, phase: str, pictures: int) -> bool:
        """Whether there is another way after memory was short in `phase` with so many pictures at once."""
        if not self._freed:
            self._freed = True
        elif pictures > 1 and not self.one_by_one:
            self.one_by_one = True
            self.warnings.append("memory was short: the pictures were drawn one by one")
        elif phase == "decode" and not self._tiled:
            self._tiled = True
            self._vae.enable_tiling()
            self._vae.enable_slicing()
            self.warnings.append("memory was short: the pictures were decoded in tiles, which may change some pixels")
        else:
            return False
        return True


class _Preview:
    """Guesses the finished picture from two steps, at a small size, no oftener than once a second."""

    def __init__(self, pipeline: Any, plan: Plan) -> None:
        self._pipeline = pipeline
        self._canvas = plan.canvas
        self._steps = plan.steps
        self._last: torch.Tensor | None = None
        self._shown = -math.inf

    def look(self, step: int, latents: torch.Tensor) -> Image.Image | None:
        """The first picture of the batch after `step`; None where it is too early.

        A flow goes straight from noise to picture (arXiv 2209.03003): x(sigma) = x0 + sigma v, so two points tell x0.
        """
        last, self._last = self._last, latents[:1].clone()
        sigmas = self._pipeline.scheduler.sigmas
        if last is None or time.monotonic() - self._shown < _SECONDS_BETWEEN_PREVIEWS:
            return None
        before, now = (float(sigmas[step - self._steps + offset]) for offset in (-1, 0))
        if before == now:
            return None
        self._shown = time.monotonic()
        guess = self._last - now * (self._last - last) / (now - before)
        pipeline, vae = self._pipeline, self._pipeline.vae
        width, height = self._canvas
        unpacked = pipeline._unpack_latents(guess, height, width, pipeline.vae_scale_factor)
        shrink = min(1.0, _PREVIEW_LATENTS / max(unpacked.shape[-2:]))
        small = torch.nn.functional.interpolate(unpacked, scale_factor=shrink, mode="area")
        decoded = vae.decode(small / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        picture: Image.Image = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        return picture


def _pictures(values: torch.Tensor) -> list[Image.Image]:
    """RGB pictures of [pictures, 3, height, width] from 0 to 1: the bytes of diffusers' own, rounded on the device."""
    planes = values.float().mul(255).round().to(torch.uint8).cpu().numpy()
    return [Image.merge("RGB", [Image.fromarray(plane) for plane in picture]) for picture in planes]


def _finished(picture: Image.Image, plan: Plan) -> Image.Image:
    """The canvas' middle; outside a mask the very pixels that were sent."""
    if plan.preserve_unmasked:
        mask = plan.pictures["mask_image"][0].point(lambda level: 255 if level >= 128 else 0)  # as diffusers rounds it
        picture = Image.composite(picture, plan.pictures["init_image"][0], mask)
    return _middle(picture, plan.width, plan.height)


def _middle(picture: Image.Image, width: int, height: int) -> Image.Image:
    """`width` x `height` pixels of the middle of `picture`."""
    if picture.size == (width, height):
        return picture
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


@contextmanager
def _as_worker_errors(plan: Plan) -> Iterator[None]:
    """What torch and diffusers raise, as what a client can act on."""
    try:
        yield
    except (MemoryError, RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            free_memory(error)
            raise OutOfMemory(
                f"{plan.width}x{plan.height} with {len(plan.seeds)} image(s) needs more memory than there is; ask for "
                "a smaller width, height or num_images, or choose a larger card"
            ) from error
        if isinstance(error, torch.AcceleratorError) or "CUDA error" in str(error):
            raise DeviceFailed(f"the device failed and this worker must be replaced: {_first_line(error)}") from error
        raise GenerationFailed(f"the model refused these tensors: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
