"""Request + model row -> frozen Plan, or an error with every fault. Every decision about a request is taken here.

Nothing here knows of torch, of memory or of how pictures travel.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from PIL import Image

from src.catalog import FAMILIES, MODELS, SCHEDULERS, SPEEDS, Model, Pipeline
from src.controls import OWN_OPTIONS, PlannedControl, decide_controls
from src.errors import Fault, InvalidRequest
from src.images import FORMATS
from src.lora import Adapter
from src.pictures import PREPROCESSORS, Pictures, at_most, fit
from src.request import MAX_SEED, PICTURES, Request, reference
from src.sizes import asking_field, canvas, decide_size, shrunk
from src.wording import did_you_mean, show

_EVERY = tuple(pipeline for model in MODELS for pipeline in model.pipelines.values())
_PICKED_SEEDS = 2**32  # JavaScript reads integers up to 2^53 exactly: a picked seed survives every client
_LISTS = (("init_image", "init_images"), ("control_image", "controls"))  # what a field of several holds
_REFERENCE_PIXELS = 1024 * 1024  # what is larger Flux2Pipeline shrinks anyway
_MIN_REFERENCE, _MAX_ASPECT = 64, 8  # as diffusers' Flux2ImageProcessor.check_image_input wants them


@dataclass(frozen=True)
class Plan:
    """Everything that the engine and the delivery need to know; nothing is left to decide."""

    mode: str
    pipeline: Pipeline
    prompts: tuple[str, ...]  # one a picture
    prompt_2: str | None
    negative_prompt: str | None
    true_cfg_scale: float
    width: int
    height: int
    canvas: tuple[int, int]  # width and height that the model draws; the middle of it is delivered
    num_inference_steps: int
    steps: int  # calls of the model: fewer where the picture starts from another, more with some schedulers
    guidance_scale: float
    max_sequence_length: int
    scheduler: str | None  # a row of the catalog; None is the model's own
    sigmas: tuple[float, ...] | None
    shift: float | None
    seeds: tuple[int, ...]  # one a picture
    batch_size: int
    output_format: str
    output_quality: int
    preview: bool = False
    speed: str = "exact"  # a row of SPEEDS
    pictures: Pictures = field(default_factory=dict)  # of the canvas' size, but for references and image_prompt
    references: Mapping[str, Any] = field(default_factory=dict)  # the fields that a file says of them
    adapters: tuple[Adapter, ...] = ()
    controls: tuple[PlannedControl, ...] = ()  # one a control picture
    image_prompt_scale: float = 1.0
    strength: float | None = None
    preserve_unmasked: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def heard(self) -> tuple[tuple[str, float], ...]:
        """The adapters that count, and how much: what is remembered under other ones is of no use."""
        return tuple((adapter.name, adapter.asked.scale) for adapter in self.adapters)

    def batches(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The seeds of the pictures that are denoised together, with their prompt."""
        for prompt, numbers in itertools.groupby(range(len(self.seeds)), key=lambda i: self.prompts[i]):
            seeds = [self.seeds[i] for i in numbers]
            for first in range(0, len(seeds), self.batch_size):
                yield prompt, tuple(seeds[first : first + self.batch_size])

    def parameters(self, i: int) -> dict[str, Any]:
        """The request that makes picture `i` again."""
        request: dict[str, Any] = {
            "prompt": self.prompts[i],
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "max_sequence_length": self.max_sequence_length,
            "seed": self.seeds[i],
            "output_format": self.output_format,
            "output_quality": self.output_quality,
        }
        if self.negative_prompt is not None:
            request["negative_prompt"] = self.negative_prompt
            if "true_cfg_scale" in self.pipeline.takes:
                request["true_cfg_scale"] = self.true_cfg_scale
        for name in ("prompt_2", "scheduler", "sigmas", "shift", "strength"):
            if (value := getattr(self, name)) is not None:
                request[name] = value
        if self.speed != "exact":
            request["speed"] = self.speed
        if self.adapters:
            request["loras"] = [adapter.told() for adapter in self.adapters]
        if "mask_image" in self.pictures:
            request["preserve_unmasked"] = self.preserve_unmasked
        if "image_prompt" in self.pictures:
            request["image_prompt_scale"] = self.image_prompt_scale
        return request | dict(self.references)


def make_plan(
    request: Request,
    faults: Sequence[Fault],
    model: Model,
    pictures: Pictures = MappingProxyType({}),
    adapters: Sequence[Adapter] = (),
    *,
    max_pixels: int,
    batch_size: int = 1,
    controlnets: Sequence[str] = (),
) -> Plan:
    """Decide everything that `request` left open; `pictures` are those that its fields hold.

    Of several ControlNets that hear the same, those named in `controlnets` are preferred.

    Raises InvalidRequest with the `faults` that reading it found and those that only the model's row shows.
    """
    decision = _Decision(request, faults, model)
    mode, pipeline = decision.mode()
    size = decision.size(pipeline, pictures, max_pixels)
    num_inference_steps = decision.num_inference_steps()
    strength = None
    if "strength" in pipeline.takes:
        strength = pipeline.strength if request.strength is None else request.strength
    scheduler = decision.scheduler(mode, strength is not None)
    steps = decision.steps(num_inference_steps, strength, scheduler)
    prompts = decision.prompts()
    guidance_scale = decision.guidance()
    negative_prompt = decision.negative_prompt(pipeline, guidance_scale)
    controls = decision.controls(pipeline, steps, controlnets)
    speed = decision.speed(mode, pipeline, steps, negative_prompt)
    decision.references(pipeline, pictures)
    decision.loras(adapters)
    decision.without_effect()
    if decision.faults:
        raise InvalidRequest(decision.faults)

    first = secrets.randbelow(_PICKED_SEEDS) if request.seed is None else request.seed
    drawn = canvas(size, model.side_multiple)
    return Plan(
        mode=mode,
        pipeline=pipeline,
        prompts=prompts,
        prompt_2=request.prompt_2,
        negative_prompt=negative_prompt,
        true_cfg_scale=request.true_cfg_scale,
        width=size[0],
        height=size[1],
        canvas=drawn,
        num_inference_steps=num_inference_steps,
        steps=steps,
        guidance_scale=guidance_scale,
        max_sequence_length=request.max_sequence_length or model.max_sequence_length,
        scheduler=scheduler,
        sigmas=request.sigmas,
        shift=request.shift,
        seeds=tuple((first + i) % (MAX_SEED + 1) for i in range(len(prompts))),
        batch_size=1 if pipeline.needs else batch_size,  # diffusers draws a picture's latents for the first seed alone
        output_format=request.output_format,
        output_quality=request.output_quality,
        preview=request.preview,
        speed=speed,
        pictures=_prepared(pictures, pipeline, controls, size, drawn),
        references=_references(request, controls),
        adapters=tuple(adapters),
        controls=controls,
        image_prompt_scale=1.0 if request.image_prompt_scale is None else request.image_prompt_scale,
        strength=strength,
        preserve_unmasked="preserve_unmasked" in pipeline.takes and request.preserve_unmasked,
        warnings=tuple(decision.warnings),
    )


class _Decision:
    """What is decided of one request, and the faults and warnings on the way."""

    def __init__(self, request: Request, faults: Sequence[Fault], model: Model) -> None:
        self.faults = list(faults)
        self.warnings: list[str] = []
        self._request = request
        self._model = model
        self._wrong = {fault.field.partition(".")[0] for fault in faults}

    def mode(self) -> tuple[str, Pipeline]:
        """The mode that the request's pictures ask for, where the model has it and can use the other fields."""
        request, model = self._request, self._model
        given = {kind for kind, *_ in request.sources()}
        given |= {kind for kind, field in (*zip(PICTURES, PICTURES, strict=True), *_LISTS) if field in self._wrong}
        given.discard("image_prompt")  # it is read, as the prompt is, in every mode that can
        if (request.outpaint or "outpaint" in self._wrong) and "init_image" in given:
            given.add("mask_image")  # which lies around it
        mode = next((name for name, row in model.pipelines.items() if row.needs == given), None)
        if mode is None:
            kinds = "; ".join(f"{name}: {_listed(row.needs) or 'no picture'}" for name, row in model.pipelines.items())
            field = min(given, default="init_image")
            pictures = _listed(given) or "no picture"
            self._fault(field, f"{model.name} has no mode for {pictures}; allowed: {kinds}")
        pipeline = model.pipelines.get(mode or "") or model.base
        every = {name for row in _EVERY for name in row.takes}
        for name in sorted((every & request.said) - pipeline.takes):
            self._fault(name, f"cannot be used by {mode or 'this request'} on {model.name}")
        return mode or "", pipeline

    def num_inference_steps(self) -> int:
        """The request's steps, or as many as it gives sigmas."""
        request = self._request
        if request.sigmas is None:
            return request.num_inference_steps or self._model.num_inference_steps
        if any(after >= before for before, after in itertools.pairwise(request.sigmas)):
            self._fault("sigmas", f"must fall from each to the next, got {show(list(request.sigmas))}")
        count = len(request.sigmas)
        if request.num_inference_steps not in (None, count):
            self._fault("sigmas", f"must be one a step, got {count} for {request.num_inference_steps} steps")
        row = SCHEDULERS.get(request.scheduler or "")
        if row is not None and (not row.flow_match or row.config):
            allowed = [name for name, row in SCHEDULERS.items() if row.flow_match and not row.config]
            self._fault("sigmas", f"cannot be used by {request.scheduler}; allowed: {', '.join(allowed)}")
        return count

    def size(self, pipeline: Pipeline, pictures: Pictures, max_pixels: int) -> tuple[int, int]:
        """Width and height; a picture gives those that the request leaves open."""
        given = [*pictures.get("init_image", ()), *pictures.get("control_image", ())]
        own = (self._model.width, self._model.height)
        (width, height), faults = decide_size(self._request, own, given[0].size if given else None, max_pixels)
        self.faults += faults
        if pipeline.max_pixels and not {"width", "height", "megapixels"} & self._request.said:
            width, height = shrunk((width, height), pipeline.max_pixels, self._model.side_multiple)
        across, down = canvas((width, height), self._model.side_multiple)
        for most, pixels in ((max_pixels, width * height), (pipeline.max_pixels or across * down, across * down)):
            if pixels > most and not faults and not self._wrong & {"width", "height"}:
                told = f"makes too many pixels: at most {most:,} pixels, got {width}x{height} = {pixels:,}"
                self._fault(asking_field(self._request) or "width", told)
                break
        return width, height

    def scheduler(self, mode: str, midway: bool) -> str | None:
        """The row that the request names; `midway` is whether it has to start from a picture with noise."""
        name = self._request.scheduler
        if name is None:
            return None
        allowed = [key for key, row in SCHEDULERS.items() if row.starts_midway or not midway]
        if name not in SCHEDULERS:
            hint = did_you_mean(name, allowed)
            self._fault("scheduler", f"is no scheduler, got {show(name)}{hint}; allowed: {', '.join(allowed)}")
        elif name not in allowed:
            self._fault("scheduler", f"{name} cannot start from a picture; {mode} allows: {', '.join(allowed)}")
        return name

    def steps(self, num_inference_steps: int, strength: float | None, scheduler: str | None) -> int:
        """The calls of the model: of the last share of the steps where a picture is the start."""
        row = SCHEDULERS.get(scheduler or "")
        order = row.order if row else 1
        if strength is None:
            return order * num_inference_steps - (order - 1)
        # As diffusers counts them, FluxImg2ImgPipeline.get_timesteps.
        steps = num_inference_steps - int(max(num_inference_steps - num_inference_steps * strength, 0))
        if steps < 1:
            self._fault(
                "strength", f"times num_inference_steps must be 1 at least, got {strength} x {num_inference_steps}"
            )
        return order * steps - (order - 1)

    def prompts(self) -> tuple[str, ...]:
        """One a picture."""
        request, limit = self._request, self._model.max_sequence_length
        if (request.max_sequence_length or 1) > limit:
            self._fault(
                "max_sequence_length",
                f"must be an integer from 1 to {limit} for {self._model.name}, got {show(request.max_sequence_length)}",
            )
        if len(request.prompt) == 1:
            return request.prompt * request.num_images
        if "num_images" in request.model_fields_set and request.num_images != len(request.prompt):
            self._fault("num_images", f"must be {len(request.prompt)}, one a prompt, got {request.num_images}")
        return request.prompt

    def guidance(self) -> float:
        """What the model was trained with bounds its guidance."""
        most, asked = self._model.max_guidance_scale, self._request.guidance_scale
        if asked is None:
            return self._model.guidance_scale
        if asked > most:
            allowed = f"a number from 0 to {most:g} for {self._model.name}"
            self._fault("guidance_scale", f"must be less than or equal to {most:g}, got {asked:g}; allowed: {allowed}")
        return asked

    def negative_prompt(self, pipeline: Pipeline, guidance_scale: float) -> str | None:
        """What is steered away from, where anything is: the empty prompt unless the request says more."""
        request = self._request
        if "negative_prompt" not in pipeline.takes:
            return None
        name = "true_cfg_scale" if "true_cfg_scale" in pipeline.takes else "guidance_scale"
        scale = request.true_cfg_scale if name == "true_cfg_scale" else guidance_scale
        if scale > 1:
            return request.negative_prompt or ""
        if name not in self._wrong and (request.negative_prompt or "").strip():
            self._fault(
                "negative_prompt",
                f"has no effect while {name} is {scale:g}; set {name} above 1 (4, say) or leave it out",
            )
        return None

    def speed(self, mode: str, pipeline: Pipeline, steps: int, negative_prompt: str | None) -> str:
        """Whether steps may be guessed from others: never with what is steered away from, unless told apart from it."""
        asked = self._request.speed
        if cache := SPEEDS[asked]:
            if negative_prompt is not None and not pipeline.cache_context:
                allowed = "exact, or no true_cfg_scale above 1"
                self._fault("speed", f"{asked} cannot be used by {mode} with a negative prompt; allowed: {allowed}")
            elif steps <= cache.computed_first:
                self.warnings.append(
                    f"speed {asked} has no effect on {steps} steps: the first {cache.computed_first} are computed"
                )
        return asked

    def controls(self, pipeline: Pipeline, steps: int, preferred: Sequence[str]) -> tuple[PlannedControl, ...]:
        """Who hears each control picture."""
        if "control_image" not in pipeline.needs:
            return ()
        controls, faults = decide_controls(self._request, self._model, pipeline, steps, preferred)
        if "control_image" not in self._wrong:  # its own options wait for it
            self.faults += faults
        return controls

    def references(self, pipeline: Pipeline, pictures: Pictures) -> None:
        """How many pictures the mode starts from, and of what shape those are that it reads as they are."""
        fields = [field for kind, field, _ in self._request.sources() if kind == "init_image"]
        most = max(pipeline.references, 1)
        if len(fields) > most:
            self._fault("init_images", f"{self._model.name} takes {most} at most here, got {len(fields)}")
        if pipeline.references > 1:
            for field, picture in zip(fields, pictures.get("init_image", ()), strict=False):
                if min(picture.size) < _MIN_REFERENCE or max(picture.size) > _MAX_ASPECT * min(picture.size):
                    self._fault(
                        field,
                        f"must have {_MIN_REFERENCE} pixels a side at least and be at most {_MAX_ASPECT} times as long "
                        f"as wide for {self._model.name}, got {picture.width}x{picture.height}",
                    )

    def loras(self, adapters: Sequence[Adapter]) -> None:
        """A scale needs its adapter, and an adapter is asked for once."""
        request = self._request
        if "lora_scale" in request.said and request.lora_path is None:
            self._fault("lora_scale", "has no effect without lora_path; each of loras has a scale of its own")
        names = [adapter.name for adapter in adapters]
        for adapter in {adapter.name: adapter for adapter in adapters if names.count(adapter.name) > 1}.values():
            self._fault("loras", f"names {show(adapter.told()['path'])} more than once")

    def without_effect(self) -> None:
        """Warn of what changes nothing and hurts nobody, and refuse what belongs to a picture that is missing."""
        request, model = self._request, self._model
        self.warnings += request.ignored
        if request.guidance_scale is not None and not FAMILIES[model.family].guided:
            self.warnings.append(f"guidance_scale has no effect on {model.name}: it was trained without guidance")
        if "image_prompt_scale" in request.said and request.image_prompt is None:
            self._fault("image_prompt_scale", "has no effect without image_prompt")
        if "output_quality" in request.said and not FORMATS[request.output_format].quality:
            self.warnings.append(f"output_quality has no effect on {request.output_format}")

    def _fault(self, field: str, message: str) -> None:
        self.faults.append(Fault(field, message))


def _prepared(
    pictures: Pictures,
    pipeline: Pipeline,
    controls: Sequence[PlannedControl],
    size: tuple[int, int],
    drawn: tuple[int, int],
) -> Pictures:
    """The pictures as the model reads them: cut to `size` and padded to what is `drawn`, and edges where asked for."""
    prepared = {}
    if masks := pictures.get("mask_image"):
        lain = tuple(mask.resize(pictures["init_image"][0].size, Image.Resampling.NEAREST) for mask in masks)
        pictures = {**pictures, "mask_image": lain}
    for kind, several in pictures.items():
        as_they_are = kind == "image_prompt" or (kind == "init_image" and pipeline.references)
        prepared[kind] = tuple(
            at_most(picture, _REFERENCE_PIXELS) if as_they_are else fit(picture, size, drawn) for picture in several
        )
    if controls:
        prepared["control_image"] = tuple(
            PREPROCESSORS[control.type](picture) if control.asked.preprocess else picture
            for control, picture in zip(controls, prepared["control_image"], strict=True)
        )
    return prepared


def _references(request: Request, controls: Sequence[PlannedControl]) -> dict[str, Any]:
    """The fields that held pictures, as a file may say them."""
    told: dict[str, Any] = {}
    for kind, name, source in request.sources():
        if name.startswith("init_images"):
            told.setdefault("init_images", []).append(reference(source))
        elif kind != "control_image":
            told[name] = reference(source)
    for (name, control), planned in zip(request.all_controls(), controls, strict=True):
        heard = {"scale": planned.scale, "start": planned.start, "end": planned.end} if planned.net else {}
        entry = {"type": planned.type, **heard, "preprocess": control.preprocess}
        if name == "control_image":
            told[name] = reference(control.image)
            told |= {OWN_OPTIONS[option]: value for option, value in entry.items()}
        else:
            told.setdefault("controls", []).append({"image": reference(control.image), **entry})
    if request.outpaint:
        told["outpaint"] = request.outpaint.model_dump()
    return told


def _listed(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))
