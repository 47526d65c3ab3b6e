"""What a request leaves open, decided one by one: each function returns a value and the faults that it found.

`wrong` names the fields that are faulty already: what depends on them is not reported again.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence

from PIL import Image

from src.catalog import EVERY_MODE_TAKES, EXACT, FAMILIES, FORMATS, SCHEDULERS, SPEEDS, Model, ModeSpec, schedulers_for
from src.errors import Fault
from src.plan.geometry import Size, covers, padding, widen
from src.plan.sizes import asking_field, canvas, decide_size, reference_pixels, shrunk
from src.request.adapters import Adapter
from src.request.decoder import WHITE, is_black
from src.request.images import MAX_INPUT_PIXELS, Pictures
from src.request.schema import CONTROL_OPTIONS, PICTURES, SINGLES, Request
from src.wording import did_you_mean, show

Faults = list[Fault]

# Options that other services' clients send in every mode: where those have no effect nobody is misled.
_OPTIONS = frozenset(
    {
        "strength", "negative_prompt", "true_cfg_scale", "image_prompt_scale", "prompt_upsampling",
        *CONTROL_OPTIONS.values(),
    }
)  # fmt: skip
NO_UPSAMPLER = "this worker has no prompt upsampler (PROMPT_UPSAMPLER)"
_REFERENCE_SIDE, _REFERENCE_ASPECT = 64, 8  # as diffusers' Flux2ImageProcessor.check_image_input wants them


def decide_mode(request: Request, model: Model, wrong: Collection[str]) -> tuple[tuple[str, ModeSpec], Faults]:
    """The mode that the request's pictures ask for, where the model has it and can use the other fields."""
    faults: Faults = []
    given = {kind for kind, *_ in request.sources()}
    given |= {kind for kind in PICTURES if kind in wrong}
    given |= {single for name, single in SINGLES.items() if name in wrong and single in PICTURES}
    given.discard("image_prompt")  # it is read, as the prompt is, in every mode that can
    if (request.outpaint or "outpaint" in wrong) and "init_image" in given:
        given.add("mask_image")  # which lies around it
    mode = next((name for name, spec in model.modes.items() if spec.needs == given), None)
    if mode is None:
        kinds = "; ".join(f"{name}: {_listed(spec.needs)}" for name, spec in model.modes.items())
        message = f"{model.name} has no mode for {_listed(given)}; allowed: {kinds}"
        faults.append(Fault(min(given, default="init_image"), message))
    specs = model.modes.values() if mode is None else [model.modes[mode]]
    taken = EVERY_MODE_TAKES.union(PICTURES.keys() - {"image_prompt"}, SINGLES, *(spec.takes for spec in specs))
    harmless = _OPTIONS if request.foreign else frozenset()
    faults += [
        Fault(name, f"cannot be used by {mode or 'any mode'} on {model.name}")
        for name in sorted(request.said - taken - harmless - (set(wrong) - PICTURES.keys()))
    ]
    return (mode or "", model.modes.get(mode or "") or model.base), faults


def decide_pictures(request: Request, pictures: Pictures) -> tuple[Pictures, Faults]:
    """`pictures` with the mask as large as its picture, and both with the borders that are to be drawn around them."""
    if "init_image" not in pictures:
        return pictures, []
    picture = pictures["init_image"][0]
    masks = pictures.get("mask_image", ())
    for mask in masks:
        if not covers(mask.size, picture.size):
            message = f"must have the shape of init_image, which is {_by(picture.size)}, got {_by(mask.size)}"
            return pictures, [Fault("mask_image", message)]
    masks = tuple(mask.resize(picture.size, Image.Resampling.NEAREST) for mask in masks)
    if request.outpaint:
        (left, right), (top, bottom) = around = padding(request.outpaint, picture.size)
        width, height = picture.width + left + right, picture.height + top + bottom
        if width * height > MAX_INPUT_PIXELS:
            message = f"would make a picture of {_by((width, height))}; allowed: {MAX_INPUT_PIXELS:,} pixels at most"
            return pictures, [Fault("outpaint", message)]
        picture, mask = widen(picture, masks[0] if masks else Image.new("L", picture.size), around)
        return {**pictures, "init_image": (picture,), "mask_image": (mask,)}, []
    return {**pictures, **({"mask_image": masks} if masks else {})}, []


def decide_steps(request: Request, model: Model) -> tuple[int, Faults]:
    """num_inference_steps: the request's, or as many as it gives sigmas."""
    faults: Faults = []
    if request.sigmas is None:
        return request.num_inference_steps or model.num_inference_steps, faults
    if any(after >= before for before, after in itertools.pairwise(request.sigmas)):
        faults.append(Fault("sigmas", f"must fall from each to the next, got {show(list(request.sigmas))}"))
    count = len(request.sigmas)
    if request.num_inference_steps not in (None, count):
        faults.append(Fault("sigmas", f"must be one per step, got {count} for {request.num_inference_steps} steps"))
    row = SCHEDULERS.get(request.scheduler or "")
    if row is not None and (not row.flow_match or row.config):
        allowed = [name for name, row in schedulers_for(model).items() if row.flow_match and not row.config]
        faults.append(Fault("sigmas", f"cannot be used by {request.scheduler}; allowed: {', '.join(allowed)}"))
    return count, faults


def decide_calls(steps: int, strength: float | None, scheduler: str | None) -> tuple[int, Faults]:
    """How often the model is called: for the last share of the `steps` where a picture is the start."""
    row = SCHEDULERS.get(scheduler or "")
    order = row.order if row else 1
    if strength is not None:
        asked = steps
        steps -= int(max(steps - steps * strength, 0))  # as diffusers counts them, FluxImg2ImgPipeline.get_timesteps
        if steps < 1:
            message = f"is too low: strength times num_inference_steps must be 1 at least, got {strength} x {asked}"
            return 0, [Fault("strength", message)]
    return order * steps - (order - 1), []


def decide_pixels(
    request: Request, model: Model, spec: ModeSpec, pictures: Pictures, *, max_pixels: int, wrong: Collection[str]
) -> tuple[Size, Faults]:
    """Width and height; a picture gives those that the request leaves open."""
    given = [*pictures.get("init_image", ()), *pictures.get("control_image", ())]
    references = reference_pixels(spec, len(given)) if spec.references else 0
    picture = given[0].size if given else None
    (width, height), faults = decide_size(request, model, picture, max_pixels, whole=references)
    most_drawn = spec.max_pixels
    if most_drawn is None and spec.references and given and asking_field(request) is None:
        most_drawn = references
    if most_drawn and not {"width", "height", "megapixels"} & request.said:
        width, height = shrunk((width, height), most_drawn, model.side_multiple)
    drawn = canvas((width, height), model.side_multiple)
    for most, (across, down) in ((max_pixels, (width, height)), (spec.max_pixels or drawn[0] * drawn[1], drawn)):
        if across * down > most and not faults and not {"width", "height"} & set(wrong):
            drawn_as = "" if (across, down) == (width, height) else f" (drawn as {_by(drawn)})"
            got = f"{_by((width, height))}{drawn_as} = {across * down:,}"
            limit = f"at most {most:,} pixels"
            if most == max_pixels < model.max_side**2:
                limit += f" on this worker, which MAX_PIXELS sets ({model.name} draws sides of up to {model.max_side})"
            message = f"makes too many pixels: {limit}, got {got}"
            return (width, height), [Fault(asking_field(request) or "width", message)]
    return (width, height), faults


def decide_strength(request: Request, spec: ModeSpec) -> float | None:
    """How much of a picture is drawn anew; None where none is started from."""
    if "strength" not in spec.takes:
        return None
    return spec.strength if request.strength is None else request.strength


def decide_scheduler(request: Request, model: Model, *, midway: bool) -> tuple[str | None, Faults]:
    """The row that the request names; `midway` is whether it has to start from a picture with noise."""
    name = request.scheduler
    fitting = schedulers_for(model)
    allowed = [key for key, row in fitting.items() if row.starts_midway or not midway]
    if name is None or name in allowed:
        return name, []
    if name in SCHEDULERS and name not in fitting:
        message = (
            f"cannot be {name} on {model.name}, whose answers each lead to the next timestep; allowed: "
            f"{', '.join(allowed)}"
        )
        return name, [Fault("scheduler", message)]
    if name in SCHEDULERS:
        message = f"cannot be {name}, which cannot start from a picture; allowed: {', '.join(allowed)}"
        return name, [Fault("scheduler", message)]
    hint = did_you_mean(name, allowed)
    return name, [Fault("scheduler", f"is not a scheduler, got {show(name)}{hint}; allowed: {', '.join(allowed)}")]


def decide_prompts(request: Request, model: Model) -> tuple[tuple[str, ...], Faults]:
    """The prompt of each picture, in order."""
    faults, limit = [], model.max_sequence_length
    if (request.max_sequence_length or 1) > limit:
        message = f"must be an integer from 1 to {limit} for {model.name}, got {show(request.max_sequence_length)}"
        faults.append(Fault("max_sequence_length", message))
    if len(request.prompt) == 1:
        return request.prompt * request.num_images, faults
    if "num_images" in request.model_fields_set and request.num_images != len(request.prompt):
        message = f"must be {len(request.prompt)}, one per prompt, got {request.num_images}"
        faults.append(Fault("num_images", message))
    return request.prompt, faults


def decide_upsampling(request: Request, spec: ModeSpec, *, upsampler: bool) -> tuple[frozenset[str], Faults]:
    """What only a worker with an `upsampler` can use, where this one has none and another's client asks for it."""
    asked = frozenset({"prompt_upsampling"}) & request.said & spec.takes
    if upsampler or not asked:
        return frozenset(), []
    if request.foreign:
        return asked, []
    message = f"cannot be true, as {NO_UPSAMPLER}; allowed: false, or true on a worker that has one"
    return frozenset(), [Fault("prompt_upsampling", message)]


def decide_guidance(request: Request, model: Model) -> tuple[float, Faults]:
    """What the model was trained with bounds its guidance."""
    most, asked = model.max_guidance_scale, request.guidance_scale
    if asked is None:
        return model.guidance_scale, []
    if asked <= most:
        return asked, []
    allowed = f"a number from 0 to {most:g} for {model.name}"
    message = f"must be less than or equal to {most:g}, got {asked:g}; allowed: {allowed}"
    return asked, [Fault("guidance_scale", message)]


def decide_steering(request: Request, model: Model, spec: ModeSpec, guidance_scale: float) -> float:
    """How strongly it is steered away from negative_prompt; not at all up to 1."""
    if "negative_prompt" not in spec.takes:
        return 1.0
    if "true_cfg_scale" not in spec.takes:
        return guidance_scale
    return request.true_cfg_scale if "true_cfg_scale" in request.model_fields_set else model.true_cfg_scale


def decide_negative_prompt(
    request: Request, spec: ModeSpec, scale: float, wrong: Collection[str]
) -> tuple[str | None, Faults]:
    """What is steered away from, where that has a `scale` above 1: the empty prompt unless the request says more."""
    if "negative_prompt" not in spec.takes:
        return None, []
    if scale > 1:
        return request.negative_prompt or "", []
    name = _steering_scale(spec)
    if name in wrong or request.foreign or not (request.negative_prompt or "").strip():
        return None, []  # RunPod's own example sends one, among its words for other fields
    message = f"has no effect while {name} is {scale:g}; set {name} above 1 (4, say) or leave it out"
    return None, [Fault("negative_prompt", message)]


def _steering_scale(spec: ModeSpec) -> str:
    """The field that says how strongly pictures are steered away from negative_prompt."""
    return "true_cfg_scale" if "true_cfg_scale" in spec.takes else "guidance_scale"


def check_speed(request: Request, mode: str, spec: ModeSpec, negative_prompt: str | None) -> Faults:
    """Steps are never guessed from others where two directions are mixed, unless the pipeline tells them apart."""
    if SPEEDS[request.speed] is None or negative_prompt is None or spec.cache_context:
        return []
    name = _steering_scale(spec)
    message = f"cannot be {request.speed} in {mode} with {name} above 1; allowed: exact, or {name} 1"
    return [Fault("speed", message)]


def decide_speed(
    request: Request, spec: ModeSpec, negative_prompt: str | None, calls: int, preferred: str
) -> str | None:
    """A row of SPEEDS: the request's, or what the worker has `preferred` where it can be; None needs no word."""
    cache = SPEEDS[preferred]
    if cache is None:
        return None
    if "speed" in request.model_fields_set:
        return request.speed
    can_be = negative_prompt is None or spec.cache_context
    return preferred if can_be and calls > cache.computed_first else EXACT


def check_references(request: Request, model: Model, spec: ModeSpec, pictures: Pictures) -> Faults:
    """How many pictures the mode starts from, and of what shape those are that it reads as they are."""
    most, count = max(spec.references, 1), len(request.init_images)
    faults: Faults = []
    if count > most:
        faults.append(
            Fault("init_images", f"must hold at most {most} picture(s) on {model.name} in this mode, got {count}")
        )
    if spec.references > 1:
        for i, picture in enumerate(pictures.get("init_image", ())[:count]):
            if min(picture.size) < _REFERENCE_SIDE or max(picture.size) > _REFERENCE_ASPECT * min(picture.size):
                message = (
                    f"must have at least {_REFERENCE_SIDE} pixels on each side for {model.name} and be at most "
                    f"{_REFERENCE_ASPECT} times as long as wide, got {_by(picture.size)}"
                )
                faults.append(Fault(request.entry_field("init_images", i), message))
    return faults


def check_adapters(adapters: Sequence[Adapter]) -> Faults:
    """An adapter is asked for once."""
    names = [adapter.name for adapter in adapters]
    twice = {adapter.name: adapter for adapter in adapters if names.count(adapter.name) > 1}
    return [Fault("loras", f"names {show(adapter.summary()['path'])} more than once") for adapter in twice.values()]


def without_effect(
    request: Request,
    model: Model,
    calls: int,
    *,
    mode: str,
    spec: ModeSpec,
    negative_prompt: str | None,
    pictures: Pictures,
) -> list[str]:
    """Warnings of what changes nothing and hurts nobody; `pictures` are as the model reads them."""
    unused = sorted((request.said & _OPTIONS) - spec.takes)
    warnings = [f"{request.client_name(name)} has no effect in {mode} on {model.name}" for name in unused]
    if "negative_prompt" in request.said & spec.takes and negative_prompt is None:
        warnings.append(f"negative_prompt has no effect unless {_steering_scale(spec)} is above 1 (4, say)")
    cache = SPEEDS[request.speed]
    if cache and calls <= cache.computed_first:
        warnings.append(
            f"speed {request.speed} has no effect on {calls} steps: the first {cache.computed_first} are computed"
        )
    if request.guidance_scale is not None and not FAMILIES[model.family].guided:
        instead = "; true_cfg_scale has one" if model.true_cfg_scale > 1 else ""
        warnings.append(f"guidance_scale has no effect on {model.name}: it was trained without guidance{instead}")
    if "output_quality" in request.said and not FORMATS[request.output_format].quality:
        warnings.append(f"output_quality has no effect on {request.output_format}")
    if any(map(is_black, pictures.get("mask_image", ()))):
        warnings.append(
            f"mask_image changes nothing: only white is drawn anew, and none of its pixels is ({WHITE} or more of 255)"
        )
    return warnings


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _listed(names: Iterable[str]) -> str:
    return " and ".join(sorted(names)) or "no picture"
