"""Request + model row -> frozen Plan, or an error with every fault. Every decision about a request is taken here.

Nothing here knows of torch, of memory or of how pictures travel.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

from PIL import Image

from src.catalog import EVERY_MODE_TAKES, EXACT, Model, ModeSpec
from src.errors import Fault, refusal
from src.plan.controls import PlannedControl, decide_controls
from src.plan.decisions import (
    NO_UPSAMPLER,
    check_adapters,
    check_references,
    check_speed,
    decide_calls,
    decide_guidance,
    decide_mode,
    decide_negative_prompt,
    decide_pictures,
    decide_pixels,
    decide_prompts,
    decide_scheduler,
    decide_speed,
    decide_steering,
    decide_steps,
    decide_strength,
    decide_upsampling,
    without_effect,
)
from src.plan.geometry import Size, at_most, fit
from src.plan.preprocessors import PREPROCESSORS
from src.plan.sizes import canvas, is_about, reference_pixels
from src.request.adapters import Adapter
from src.request.images import Pictures
from src.request.schema import CONTROL_OPTIONS, MAX_SEED, PICTURES, Borders, Control, Lora, Request, reference

T = TypeVar("T")

_PICKED_SEEDS = 2**32  # JavaScript reads integers up to 2^53 exactly: a picked seed survives every client
# Fields that others of Sampling answer, and those that change no picture.
_ANSWERED = frozenset(
    {"aspect_ratio", "megapixels", "num_images", "lora_path", "lora_scale", "describe", "dry_run", "preview"}
)
# Fields that hold pictures, and what is decided of them.
_OF_PICTURES = frozenset({*PICTURES, "init_images", "controls", "outpaint", *CONTROL_OPTIONS.values()})


class Sampling(Request):
    """A request with nothing left open, under its own names: set is exactly what makes the pictures again.

    Pictures are named by their references, adapters as others may read them. What is not set has no effect.
    """

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    seed: int
    preserve_unmasked: bool = False  # where there is no mask

    def values(self) -> dict[str, Any]:
        """All that can change a picture, also what is not set, but for prompts, pictures and adapters."""
        return self.model_dump(exclude={"prompt", "loras", *_ANSWERED, *_OF_PICTURES})

    def pictures(self) -> dict[str, Any]:
        """The fields that hold pictures, by their references, and what is decided of them."""
        return self.model_dump(include=set(_OF_PICTURES), exclude_unset=True)


@dataclass(frozen=True)
class Plan:
    """Everything that the engine and the delivery need to know; nothing is left to decide."""

    mode: str
    spec: ModeSpec
    sampling: Sampling
    prompts: tuple[str, ...]  # one a picture
    seeds: tuple[int, ...]  # one a picture
    canvas: Size  # width and height that the model draws; the middle of it is delivered
    steps: int  # calls of the model: fewer where the picture starts from another, more with some schedulers
    batch_size: int = 1
    pictures: Pictures = field(default_factory=dict)  # of the canvas' size, but for references and image_prompt
    reference_on_canvas: bool = False  # the first is of its size, and read on its grid, or an edit would shift all
    controls: tuple[PlannedControl, ...] = ()  # one a control picture
    adapters: tuple[Adapter, ...] = ()
    preview: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def work(self) -> float:
        """Steps times pixels of all its pictures, which their time goes by."""
        width, height = self.canvas
        return float(self.steps * width * height * len(self.seeds))

    @property
    def adapter_weights(self) -> tuple[tuple[str, float], ...]:
        """The adapters by their names, and how much each counts: what is remembered under others is of no use."""
        return tuple((adapter.name, adapter.asked.scale) for adapter in self.adapters)

    def batches(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The seeds of the pictures that are denoised together, with their prompt."""
        for prompt, numbers in itertools.groupby(range(len(self.seeds)), key=lambda i: self.prompts[i]):
            seeds = [self.seeds[i] for i in numbers]
            for first in range(0, len(seeds), self.batch_size):
                yield prompt, tuple(seeds[first : first + self.batch_size])

    def upsampled(self, captions: Sequence[str]) -> Plan:
        """The plan that has `captions`, one a picture, where its prompts were: its pictures are the same anywhere."""
        said = {name: getattr(self.sampling, name) for name in self.sampling.model_fields_set - {"prompt_upsampling"}}
        sampling = Sampling.model_construct(**said | {"prompt": tuple(captions)})
        return replace(self, prompts=tuple(captions), sampling=sampling)

    def parameters(self, i: int) -> dict[str, Any]:
        """The request that makes picture `i` again."""
        return self.sampling.model_dump(exclude_unset=True) | {"prompt": self.prompts[i], "seed": self.seeds[i]}


def make_plan(
    request: Request,
    faults: Sequence[Fault],
    model: Model,
    pictures: Pictures = MappingProxyType({}),
    adapters: Sequence[Adapter] = (),
    *,
    warnings: Sequence[str] = (),
    max_pixels: int,
    batch_size: int = 1,
    controlnets: Sequence[str] = (),
    speed: str = EXACT,
    upsampler: bool = False,
) -> Plan:
    """Decide everything that `request` left open; `pictures` are those that its fields hold.

    Of several ControlNets that read the same, those named in `controlnets` are preferred. `speed` is the worker's, for
    requests that say none; `upsampler` is whether it can write prompts out. `faults` and `warnings` are those of
    reading the request.

    Raises InvalidRequest with the `faults` and those that only the model's row shows, or AdapterUnavailable where
    nothing else hinders.
    """
    found = list(faults)
    wrong = {fault.field.partition(".")[0] for fault in faults}

    def settle(decision: tuple[T, Sequence[Fault]]) -> T:
        value, more = decision
        found.extend(more)
        return value

    # 1. What is to be drawn: the mode, the pictures that it starts from, the size
    mode, spec = settle(decide_mode(request, model, wrong))
    pictures = settle(decide_pictures(request, pictures))
    size = settle(decide_pixels(request, model, spec, pictures, max_pixels=max_pixels, wrong=wrong))
    drawn = canvas(size, model.side_multiple)
    read_at = reference_pixels(spec, len(pictures.get("init_image", ())))
    on_canvas = (
        bool(spec.references and pictures.get("init_image"))
        and is_about(pictures["init_image"][0].size, size, model, read_at)
        and drawn[0] * drawn[1] <= read_at
    )

    # 2. How: steps, scheduler, prompts, guidance
    strength = decide_strength(request, spec)
    num_inference_steps = settle(decide_steps(request, model))
    scheduler = settle(decide_scheduler(request, model, midway=strength is not None))
    steps = settle(decide_calls(num_inference_steps, strength, scheduler))
    prompts = settle(decide_prompts(request, model))
    without_upsampler = settle(decide_upsampling(request, spec, upsampler=upsampler))
    guidance_scale = settle(decide_guidance(request, model))
    steering = decide_steering(request, model, spec, guidance_scale)
    negative_prompt = settle(decide_negative_prompt(request, spec, steering, wrong))

    # 3. With what: controls, references, adapters
    controls: tuple[PlannedControl, ...] = ()
    if "control_image" in spec.needs:
        controls, more = decide_controls(request, model, spec, steps, controlnets)
        found += more if "control_image" not in wrong else ()  # its own options wait for it
    found += check_speed(request, mode, spec, negative_prompt)
    found += check_references(request, model, spec, pictures)
    found += check_adapters(adapters)
    if found:
        raise refusal(found)

    # 4. All of it, as one request with nothing left open
    first = secrets.randbelow(_PICKED_SEEDS) if request.seed is None else request.seed
    asked = request.said & (EVERY_MODE_TAKES | spec.takes) - _ANSWERED - _OF_PICTURES - without_upsampler
    decided: dict[str, Any] = {
        **{name: getattr(request, name) for name in asked},
        "prompt": prompts,
        "width": size[0],
        "height": size[1],
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "max_sequence_length": request.max_sequence_length or model.max_sequence_length,
        "seed": first,
        "output_format": request.output_format,
        "output_quality": request.output_quality,
        **_references(request, controls, adapters),
    }
    if preferred := decide_speed(request, spec, negative_prompt, steps, speed):
        decided["speed"] = preferred
    if strength is not None:
        decided["strength"] = strength
    if negative_prompt is None:
        decided.pop("negative_prompt", None)
    else:
        decided["negative_prompt"] = negative_prompt
    decided.pop("true_cfg_scale", None)
    if "true_cfg_scale" in spec.takes and (steering > 1 or model.true_cfg_scale > 1):
        decided["true_cfg_scale"] = steering
    if "mask_image" in pictures:
        decided["preserve_unmasked"] = request.preserve_unmasked
    if "image_prompt" in pictures:
        decided["image_prompt_scale"] = 1.0 if request.image_prompt_scale is None else request.image_prompt_scale
    prepared = _prepared(pictures, spec, controls, size, drawn)
    return Plan(
        mode=mode,
        spec=spec,
        sampling=Sampling.model_construct(**decided),
        prompts=prompts,
        seeds=tuple((first + i) % (MAX_SEED + 1) for i in range(len(prompts))),
        canvas=drawn,
        reference_on_canvas=on_canvas,
        steps=steps,
        batch_size=1 if spec.needs else batch_size,  # diffusers draws a picture's latents for the first seed alone
        pictures=prepared,
        controls=controls,
        adapters=tuple(adapters),
        preview=request.preview,
        warnings=(
            *warnings,
            *without_effect(
                request, model, steps, mode=mode, spec=spec, negative_prompt=negative_prompt, pictures=prepared
            ),
            *(f"{request.client_name(name)} has no effect: {NO_UPSAMPLER}" for name in without_upsampler),
        ),
    )


def _prepared(
    pictures: Pictures, spec: ModeSpec, controls: Sequence[PlannedControl], size: Size, drawn: Size
) -> Pictures:
    """The pictures as the model reads them: cut to `size` and padded to what is `drawn`, and edges where asked for."""
    prepared = {}
    for kind, several in pictures.items():
        as_they_are = kind == "image_prompt" or (kind == "init_image" and spec.references)
        prepared[kind] = tuple(
            _as_read(picture, spec, len(several)) if as_they_are else fit(picture, size, drawn) for picture in several
        )
    if controls:
        prepared["control_image"] = tuple(
            PREPROCESSORS[control.type](picture) if control.preprocess else picture
            for control, picture in zip(controls, prepared["control_image"], strict=True)
        )
    return prepared


def _as_read(picture: Image.Image, spec: ModeSpec, count: int) -> Image.Image:
    """One of `count` references, no larger than its pipeline reads it; what that reads whole it fits by itself."""
    return picture if count == 1 and spec.whole_reference else at_most(picture, reference_pixels(spec, count))


def _references(request: Request, controls: Sequence[PlannedControl], adapters: Sequence[Adapter]) -> Mapping[str, Any]:
    """The fields that hold pictures or adapters, as a file may say them: by the fields in which they came."""
    said: dict[str, Any] = {}
    planned = iter(controls)
    for kind, field_name, source in request.sources():
        name, _, nested = field_name.partition(".")
        if kind != "control_image":
            entry: Any = reference(source)
        else:
            options = next(planned).options()
            if not nested:
                said |= {CONTROL_OPTIONS[option]: value for option, value in options.items()}
                entry = reference(source)
            else:
                entry = Control.model_construct(image=reference(source), **options)
        said[name] = (*said.get(name, ()), entry) if nested else entry
    if adapters:
        said["loras"] = tuple(Lora.model_construct(**adapter.summary()) for adapter in adapters)
    if request.outpaint:
        said["outpaint"] = Borders.model_construct(**request.outpaint.model_dump())
    return said
