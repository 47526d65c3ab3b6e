"""Seeds -> pictures: one call of a plan's pipeline after another."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image

from src.catalog import SPEEDS
from src.engine.finite import check_finite, finite_decoding
from src.engine.memory import MemoryFallback, free_memory, is_out_of_memory
from src.engine.phases import Phases
from src.engine.placed_pipeline import PlacedPipeline
from src.engine.preview import Preview
from src.engine.prompts import Embeddings, of_pictures
from src.engine.step_cache import step_cache
from src.errors import GenerationFailed
from src.plan.geometry import fit
from src.plan.plan import Plan
from src.weights.ledger import Ledger

# A request's picture -> pipeline argument; image_prompt becomes part of the prompt's embeddings.
_PICTURES = {"init_image": "image", "mask_image": "mask_image", "control_image": "control_image"}
# Of what is set in a plan's sampling, what pipelines take under the same name.
_SAMPLING = {"num_inference_steps", "guidance_scale", "max_sequence_length", "true_cfg_scale", "strength"}

Noise = Mapping[tuple[int, ...], torch.Tensor]  # by the seeds of a batch


class Denoiser:
    """Turns seeds into pictures of one plan, together as long as there is memory for that."""

    def __init__(
        self,
        view: Any,
        plan: Plan,
        arguments: Mapping[str, Any],
        phases: Phases,
        placed_pipeline: PlacedPipeline,
        *,
        noise: Noise = MappingProxyType({}),
        ledger: Ledger,
    ) -> None:
        self._view = view
        self._plan = plan
        self._phases = phases
        self._placed_pipeline = placed_pipeline
        self._noise = noise
        self._fallback = MemoryFallback(view, ledger)
        self._decoded_again: dict[str, None] = {}  # the words for it, each once
        taken = _SAMPLING if plan.spec.guidance else _SAMPLING - {"guidance_scale"}
        set_by_plan = plan.sampling.model_fields_set & taken
        self._arguments: dict[str, Any] = {
            **arguments,
            **{_PICTURES[kind]: self._pictures(kind) for kind in plan.pictures if kind in _PICTURES},
            **{name: getattr(plan.sampling, name) for name in set_by_plan},
            "width": plan.canvas[0],
            "height": plan.canvas[1],
        }
        if plan.spec.own_sizes:
            self._arguments |= {"max_area": plan.canvas[0] * plan.canvas[1], "_auto_resize": False}
        if plan.sampling.sigmas is not None:
            self._arguments["sigmas"] = list(plan.sampling.sigmas)

    @property
    def warnings(self) -> list[str]:
        """What was given up for memory, and what was not finite at first."""
        return [*self._fallback.warnings, *self._decoded_again]

    def _pictures(self, kind: str) -> Any:
        """One picture, or a list of them where the pipeline takes several."""
        plan, spec, pictures = self._plan, self._plan.spec, self._plan.pictures[kind]
        if kind == "init_image" and plan.reference_on_canvas:
            size = (plan.sampling.width, plan.sampling.height)
            pictures = (fit(pictures[0], size, plan.canvas), *pictures[1:])
        several = spec.controlnet if kind == "control_image" else kind == "init_image" and spec.references > 1
        return list(pictures) if several else pictures[0]

    def draw(self, seeds: tuple[int, ...], prompt: Embeddings) -> list[Decoded]:
        """Denoise and decode the pictures of `seeds`, all of the one `prompt`."""
        step = self._phases.steps_done
        while True:
            try:
                return [self._call(seeds, prompt)]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                free_memory(error)
                if not self._fallback.next(self._phases.current, len(seeds)):
                    raise
            self._phases.steps_done = step
            if self._fallback.one_by_one and len(seeds) > 1:
                return [decoded for seed in seeds for decoded in self.draw((seed,), prompt)]

    def _call(self, seeds: tuple[int, ...], prompt: Embeddings) -> Decoded:
        plan, phases = self._plan, self._phases
        preview = Preview(self._view, plan) if plan.preview else None

        def on_step_end(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            latents = tensors["latents"]
            phases.step(len(seeds), preview.look(step, latents) if preview else None)
            if step + 1 == plan.steps:
                if not latents.isfinite().all():
                    raise GenerationFailed(
                        f"the model's values are not finite after {step + 1} steps with guidance_scale "
                        f"{plan.sampling.guidance_scale}; try another seed, scheduler or guidance_scale"
                    )
                phases.begin("decode")
            return {}

        phases.begin("denoise")
        # On the CPU, so that a seed means the same picture on every card.
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        modulation_ahead = self._placed_pipeline.denoising(
            self._view.scheduler, plan.steps, plan.adapter_weights, exact=SPEEDS[plan.sampling.speed] is None
        )
        finite = finite_decoding(
            self._view.vae, lambda: phases.current == "decode", lambda said: self._decoded_again.update({said: None})
        )
        with modulation_ahead, step_cache(self._view, plan), finite, self._own_noise(seeds):
            result = self._view(
                **self._arguments,
                **of_pictures(prompt, len(seeds)),
                **self._start(seeds, generators, prompt["prompt_embeds"]),
                num_images_per_prompt=len(seeds),
                generator=generators,
                output_type="pt",
                callback_on_step_end=on_step_end,
                callback_on_step_end_tensor_inputs=["latents"],
            )
        check_finite({"pictures": result.images}, "try another seed, size or guidance_scale")
        return Decoded(result.images)

    @contextmanager
    def _own_noise(self, seeds: tuple[int, ...]) -> Iterator[None]:
        """Within it a scheduler that adds noise draws each picture's by its own seed.

        No pipeline hands it a generator, and torch's own is that of all threads.
        """
        scheduler = self._view.scheduler
        step = scheduler.step
        if "generator" not in inspect.signature(step).parameters:
            yield
            return
        device = self._placed_pipeline.device
        scheduler.step = partial(step, generator=[torch.Generator(device).manual_seed(seed) for seed in seeds])
        try:
            yield
        finally:
            del scheduler.step

    def _start(
        self, seeds: tuple[int, ...], generators: list[torch.Generator], like: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The noise that was drawn ahead; or what a seed means without its control pictures.

        Encoding those would draw from the generator first.
        """
        noise = self._noise.get(seeds)
        if noise is not None and noise.dtype == like.dtype:
            return {"latents": noise}
        if not self._plan.spec.controlnet or "init_image" in self._plan.pictures:
            return {}
        return {"latents": _noise(self._view, self._plan, generators, like.dtype, like.device)}


def noise_ahead(pipeline: Any, plan: Plan) -> Noise:
    """What the seeds of a plan without pictures mean, drawn on the CPU, as the pipeline itself would draw it.

    Nothing of pipelines that take noise in another form.
    """
    takes = inspect.signature(getattr(pipeline, "prepare_latents", lambda: None)).parameters
    is_base = plan.spec.class_name == type(pipeline).__name__
    if plan.pictures or not is_base or "num_channels_latents" not in takes or "image" in takes:
        return {}
    return {
        seeds: _noise(pipeline, plan, [torch.Generator("cpu").manual_seed(seed) for seed in seeds], pipeline.dtype)
        for _, seeds in plan.batches()
    }


def _noise(
    pipeline: Any,
    plan: Plan,
    generators: list[torch.Generator],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """[pictures, tokens, in_channels]: a token is 2 x 2 latents of in_channels // 4."""
    width, height = plan.canvas
    channels = pipeline.transformer.config.in_channels // 4
    noise: torch.Tensor = pipeline.prepare_latents(len(generators), channels, height, width, dtype, device, generators)[
        0
    ]
    return noise


class Decoded:
    """Pictures of one call, on their way from the device: `values` is [pictures, 3, height, width] from 0 to 1.

    They set out at once, rounded on the device to the bytes of diffusers' own; nobody waits for them here.
    """

    def __init__(self, values: torch.Tensor) -> None:
        planes = values.float().mul(255).round().to(torch.uint8)
        self._planes, self._arrived = planes, None
        if planes.is_cuda:
            self._planes = torch.empty(planes.shape, dtype=torch.uint8, pin_memory=True)
            self._planes.copy_(planes, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def pictures(self) -> list[Image.Image]:
        """RGB, once they are here."""
        if self._arrived:
            self._arrived.synchronize()
        planes = self._planes.numpy()
        return [Image.merge("RGB", [Image.fromarray(plane) for plane in picture]) for picture in planes]


def finish(picture: Image.Image, plan: Plan) -> Image.Image:
    """The middle of the canvas; outside a mask the very pixels that were sent."""
    if "mask_image" in plan.pictures and plan.sampling.preserve_unmasked:
        mask = plan.pictures["mask_image"][0].point(lambda level: 255 if level >= 128 else 0)  # as diffusers rounds it
        picture = Image.composite(picture, plan.pictures["init_image"][0], mask)
    width, height = plan.sampling.width, plan.sampling.height
    if picture.size == (width, height):
        return picture
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))
