"""Request + model row -> frozen Plan, or an error with every fault. Every decision about a request is taken here.

Nothing here knows of torch, of memory or of how pictures travel.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from PIL import Image

from src.catalog import FAMILIES, MODELS, SCHEDULERS, Model, Pipeline
from src.errors import Fault, InvalidRequest
from src.images import FORMATS
from src.lora import Adapter
from src.pictures import fit
from src.request import MAX_SEED, PICTURES, Request, show

_EVERY = tuple(pipeline for model in MODELS for pipeline in model.pipelines.values())
_PICKED_SEEDS = 2**32  # JavaScript reads integers up to 2^53 exactly: a picked seed survives every client


@dataclass(frozen=True)
class Plan:
    """Everything that the engine and the delivery need to know; nothing is left to decide."""

    mode: str
    pipeline: Pipeline
    prompt: str
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
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)  # by request field, of the canvas' size
    references: Mapping[str, str] = field(default_factory=dict)  # what a file says of them: a URL or a digest
    adapters: tuple[Adapter, ...] = ()
    strength: float | None = None
    preserve_unmasked: bool = False
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
        for name in ("prompt_2", "scheduler", "sigmas", "shift", "strength"):
            if (value := getattr(self, name)) is not None:
                request[name] = value
        if self.adapters:
            request["loras"] = [adapter.asked.model_dump(exclude_none=True) for adapter in self.adapters]
        if "mask_image" in self.pictures:
            request["preserve_unmasked"] = self.preserve_unmasked
        return request | dict(self.references)


def make_plan(
    request: Request,
    faults: Sequence[Fault],
    model: Model,
    pictures: Mapping[str, Image.Image] = MappingProxyType({}),
    adapters: Sequence[Adapter] = (),
    *,
    max_pixels: int,
    batch_size: int = 1,
) -> Plan:
    """Decide everything that `request` left open; `pictures` are those that its fields hold.

    Raises InvalidRequest with the `faults` that reading it found and those that only the model's row shows.
    """
    decision = _Decision(request, faults, model)
    mode, pipeline = decision.mode()
    width, height = decision.size(pictures.get("init_image"), max_pixels)
    num_inference_steps = decision.num_inference_steps()
    strength = None
    if "strength" in pipeline.takes:
        strength = pipeline.strength if request.strength is None else request.strength
    scheduler = decision.scheduler(mode, strength is not None)
    steps = decision.steps(num_inference_steps, strength, scheduler)
    decision.text(pipeline)
    decision.guidance()
    decision.loras()
    decision.without_effect()
    if decision.faults:
        raise InvalidRequest(decision.faults)

    first = secrets.randbelow(_PICKED_SEEDS) if request.seed is None else request.seed
    canvas = (_round_up(width, model.side_multiple), _round_up(height, model.side_multiple))
    return Plan(
        mode=mode,
        pipeline=pipeline,
        prompt=request.prompt,
        prompt_2=request.prompt_2,
        negative_prompt=(request.negative_prompt or "") if request.true_cfg_scale > 1 else None,
        true_cfg_scale=request.true_cfg_scale,
        width=width,
        height=height,
        canvas=canvas,
        num_inference_steps=num_inference_steps,
        steps=steps,
        guidance_scale=model.guidance_scale if request.guidance_scale is None else request.guidance_scale,
        max_sequence_length=request.max_sequence_length or model.max_sequence_length,
        scheduler=scheduler,
        sigmas=request.sigmas,
        shift=request.shift,
        seeds=tuple((first + i) % (MAX_SEED + 1) for i in range(request.num_images)),
        batch_size=batch_size,
        output_format=request.output_format,
        output_quality=request.output_quality,
        preview=request.preview,
        pictures={name: fit(picture, (width, height), canvas) for name, picture in pictures.items()},
        references={name: _reference(getattr(request, name)) for name in pictures},
        adapters=tuple(adapters),
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
        self._wrong = {fault.field for fault in faults}

    def mode(self) -> tuple[str, Pipeline]:
        """The mode that the request's pictures ask for, where the model has it and can use the other fields."""
        request, model = self._request, self._model
        given = {name for name in PICTURES if getattr(request, name) is not None or name in self._wrong}
        mode = next((name for name, row in model.pipelines.items() if row.needs == given), None)
        if mode is None:
            kinds = "; ".join(f"{name}: {_listed(row.needs) or 'no picture'}" for name, row in model.pipelines.items())
            field = min(given, default="init_image")
            pictures = _listed(given) or "no picture"
            self._fault(field, f"{model.name} has no mode for {pictures}; allowed: {kinds}")
        pipeline = model.pipelines.get(mode or "") or model.base
        every = {name for row in _EVERY for name in row.takes}
        for name in sorted((every & request.model_fields_set) - pipeline.takes):
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

    def size(self, picture: Image.Image | None, max_pixels: int) -> tuple[int, int]:
        """Width and height; a picture gives those that the request leaves open."""
        request, model = self._request, self._model
        if request.aspect_ratio or request.megapixels:
            for name in ("width", "height"):
                if getattr(request, name) is not None:
                    self._fault(name, "cannot be given beside aspect_ratio or megapixels, which say it too")
            shape = picture.size if picture else (model.width, model.height)
            across, down = map(int, request.aspect_ratio.split(":")) if request.aspect_ratio else shape
            pixels = (request.megapixels or model.width * model.height / 1e6) * 1e6
            width, height = _sides(math.sqrt(pixels * across / down), math.sqrt(pixels * down / across))
        elif picture is None:
            width, height = request.width or model.width, request.height or model.height
        else:
            width, height = _size_from(picture.size, request.width, request.height, model.width * model.height)
        if width * height > max_pixels and not self._wrong & {"width", "height"}:
            self._fault(
                "width",
                f"times height must be at most {max_pixels:,} pixels, got {width}x{height} = {width * height:,}",
            )
        return width, height

    def scheduler(self, mode: str, midway: bool) -> str | None:
        """The row that the request names; `midway` is whether it has to start from a picture with noise."""
        name = self._request.scheduler
        if name is None:
            return None
        allowed = [key for key, row in SCHEDULERS.items() if row.starts_midway or not midway]
        if name not in SCHEDULERS:
            close = difflib.get_close_matches(name.lower(), allowed, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
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

    def text(self, pipeline: Pipeline) -> None:
        """The prompts' lengths, and a negative prompt that would do nothing."""
        request, limit = self._request, self._model.max_sequence_length
        if (request.max_sequence_length or 1) > limit:
            self._fault(
                "max_sequence_length",
                f"must be an integer from 1 to {limit} for {self._model.name}, got {show(request.max_sequence_length)}",
            )
        unheard = request.true_cfg_scale == 1 and "true_cfg_scale" not in self._wrong
        if unheard and "negative_prompt" in pipeline.takes and (request.negative_prompt or "").strip():
            self._fault(
                "negative_prompt",
                "has no effect while true_cfg_scale is 1; set true_cfg_scale above 1 (4, say) or leave it out",
            )

    def guidance(self) -> None:
        """What the model was trained with bounds its guidance."""
        most, asked = self._model.max_guidance_scale, self._request.guidance_scale
        if asked is not None and asked > most:
            allowed = f"a number from 0 to {most:g} for {self._model.name}"
            self._fault("guidance_scale", f"must be less than or equal to {most:g}, got {asked:g}; allowed: {allowed}")

    def loras(self) -> None:
        """A scale needs its adapter, and an adapter is asked for once."""
        request = self._request
        if "lora_scale" in request.model_fields_set and request.lora_path is None:
            self._fault("lora_scale", "has no effect without lora_path; each of loras has a scale of its own")
        paths = [lora.path for lora in request.loras] + ([request.lora_path] if request.lora_path else [])
        for path in {path for path in paths if paths.count(path) > 1}:
            self._fault("loras", f"names {show(path)} more than once")

    def without_effect(self) -> None:
        """Warn of what changes nothing and hurts nobody."""
        request, model = self._request, self._model
        if request.guidance_scale is not None and not FAMILIES[model.family].guidance_embeds:
            self.warnings.append(f"guidance_scale has no effect on {model.name}: it was trained without guidance")
        if "output_quality" in request.model_fields_set and not FORMATS[request.output_format].quality:
            self.warnings.append(f"output_quality has no effect on {request.output_format}")

    def _fault(self, field: str, message: str) -> None:
        self.faults.append(Fault(field, message))


def _size_from(picture: tuple[int, int], width: int | None, height: int | None, most: int) -> tuple[int, int]:
    """The picture's own size, or one of its shape with at most so many pixels; what is given stays."""
    shape = picture[0] / picture[1]
    if width and height:
        return width, height
    if width or height:
        wanted = (width or (height or 0) * shape, height or (width or 0) / shape)
    else:
        scale = min(1.0, math.sqrt(most / (picture[0] * picture[1])))
        wanted = (picture[0] * scale, picture[1] * scale)
    w, h = _sides(*wanted)
    return width or w, height or h


def _sides(width: float, height: float) -> tuple[int, int]:
    """The nearest that a request may ask for."""
    w, h = (min(max(round(side / 8) * 8, 64), 2048) for side in (width, height))
    return w, h


def _reference(source: str) -> str:
    """A plain URL as it is; anything else, also a URL that may hold a signature, as the digest of what was sent."""
    if source.lower().startswith("https://") and not {"?", "@", "#"} & set(source):
        return source
    return f"sha256:{hashlib.sha256(source.encode()).hexdigest()}"


def _listed(names: Iterable[str]) -> str:
    return " and ".join(sorted(names))


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
