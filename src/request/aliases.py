"""What clients of other services send, in this worker's own names: fields, values, sizes in words, adapters.

A name that is missing here is a row away.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from src.errors import Fault
from src.request.schema import MAX_SIDE, MIN_SIDE
from src.wording import show

# Replicate, fal, Black Forest Labs, RunPod's public endpoints, Together, Hugging Face, OpenAI, diffusers.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        # How many, how long, how closely
        "inputs": "prompt",
        "num_outputs": "num_images",
        "num_images_per_prompt": "num_images",
        "num_samples": "num_images",
        "batch_size": "num_images",
        "n": "num_images",
        "steps": "num_inference_steps",
        "num_steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "distilled_cfg_scale": "guidance_scale",
        "real_cfg_scale": "true_cfg_scale",
        "true_cfg": "true_cfg_scale",
        "sampler": "scheduler",
        "sampler_name": "scheduler",
        # Whether prompts are written out first
        **dict.fromkeys(
            (
                "prompt_upsample",
                "enhance_prompt",
                "prompt_enhance",
                "enable_prompt_expansion",
                "enhancePrompt",
                "expand_prompt",
                "prompt_expansion",
                "prompt_extend",
            ),
            "prompt_upsampling",
        ),
        # How large
        "resolution": "megapixels",
        "output_megapixels": "megapixels",
        "resolution_mode": "aspect_ratio",
        # Pictures
        "image": "init_image",
        "image_url": "init_image",
        "input_image": "init_image",
        "input_image_1": "init_image",
        "input_image_url": "init_image",
        "init_image_url": "init_image",
        "images": "init_images",
        "image_urls": "init_images",
        "input_images": "init_images",
        "reference_images": "init_images",
        "mask": "mask_image",
        "mask_url": "mask_image",
        "mask_image_url": "mask_image",
        "prompt_strength": "strength",
        "image_strength": "strength",
        "denoising_strength": "strength",
        "control_image_url": "control_image",
        "preprocessed_image": "control_image",
        "control_strength": "controlnet_conditioning_scale",
        "redux_image": "image_prompt",
        "image_prompt_strength": "image_prompt_scale",
        # Adapters
        "lora": "lora_path",
        "lora_url": "lora_path",
        "lora_weights": "lora_path",
        "hf_lora": "lora_path",
        "lora_strength": "lora_scale",
        "image_loras": "loras",
        "hf_loras": "loras",
        "lora_urls": "loras",
        # Files
        "image_format": "output_format",
        "quality": "output_quality",
        "output_compression": "output_quality",
        "image_quality": "output_quality",
        "response_image_type": "output_format",
        "image_num": "num_images",
        "samples": "num_images",
        # Runware's, in its own case
        "positivePrompt": "prompt",
        "negativePrompt": "negative_prompt",
        "CFGScale": "guidance_scale",
        "numberResults": "num_images",
        "seedImage": "init_image",
        "maskImage": "mask_image",
        "referenceImages": "init_images",
        "outputFormat": "output_format",
        "outputQuality": "output_quality",
    }
)
_SIZES = ("image_size", "size", "target_size")
_MORE_IMAGES = tuple(f"input_image_{i}" for i in range(2, 11))  # Black Forest Labs' further pictures
_MORE_LORAS = (("extra_lora", "extra_lora_scale"), ("extra_lora_weights", "extra_lora_scale"))  # Replicate's second
_BORDERS = ("left", "right", "top", "bottom")  # Black Forest Labs' expand
_LORA_SCALES = "lora_scales"  # Replicate's, one for each of hf_loras


# Characters of an adapter's address and of a size; in longer ones nothing is looked for
_LONGEST_PATH, _LONGEST_SIZE = 2_000, 100
_MOST_KEYS = 100  # of an entry of loras, and entries: more than that is refused as it is


def _each(value: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, value)


# What they send that changes no picture here: taken with a warning that says why.
WITHOUT_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        **_each(
            "this worker has no safety checker",
            "enable_safety_checker", "disable_safety_checker", "enable_safety_checks", "safety_checker",
            "safety_check", "safety_tolerance", "safety_filter_level", "moderation", "nsfw_filter", "checkNSFW",
            "apply_watermark",
        ),
        **_each(
            "prompts are read as they are, unless prompt_upsampling is true",
            "disable_pup", "style_preset", "magic_prompt_option", "magic_prompt", "raw", "style", "interval",
            "grounding_search",
        ),
        **_each(
            "use the field speed (balanced or fast) instead",
            "go_fast", "acceleration", "speed_mode", "fast_mode", "juiced", "lora_fuse",
        ),
        **_each(
            "call /run or /runsync instead",
            "sync_mode", "enable_sync_mode", "sync", "stream", "async", "options", "wait_for_model", "use_cache",
        ),
        **_each(
            "send a webhook next to input, where RunPod reads it",
            "webhook", "webhook_url", "webhook_secret", "webhook_events_filter", "callback_url",
        ),
        **_each(
            "the worker's settings say whether pictures come in base64 or by URL",
            "response_format", "outputType", "deliveryMethod", "base64", "enable_base64_output", "return_base64",
            "output_type", "return_dict",
        ),
        **_each("the worker draws with the model that it was started with", "model", "model_id", "model_name"),
        **_each(
            "requests are not told apart by who sent them",
            "user", "user_id", "safety_identifier", "metadata", "request_id", "taskType", "taskUUID", "includeCost",
        ),
        **_each(
            "the worker uses the tokens of its own settings, and none that a request holds",
            "hf_api_token", "hf_token", "huggingface_token", "huggingface_api_token", "civitai_api_token",
            "civitai_token", "replicate_api_token", "api_token", "api_key", "token", "lora_token",
        ),
        **_each("pictures are opaque and come whole", "background", "partial_images", "transparent_bg"),
        **_each("FLUX has no refiner", "refine"),
        **_each("how much of a picture may change is said by strength", "input_fidelity"),
        **_each("FLUX plans nothing ahead of drawing", "complexity"),
        **_each("send shift or scheduler instead", "base_shift", "max_shift", "sigma_schedule", "use_beta_schedule"),
        **_each("true_cfg_scale above 1 alone turns guidance on", "use_real_cfg", "use_cfg_zero"),
        **_each("send negative_prompt with true_cfg_scale instead", "nag_scale", "nag_end", "nag_tau", "nag_alpha"),
        **_each(
            "a picture that others follow is sent as image_prompt",
            "reference_strength", "reference_start", "reference_end",
        ),
        **_each("canny edges are made in one way", "canny_low_threshold", "canny_high_threshold"),
    }
)  # fmt: skip

# What was meant for another program or another kind of model: such a request gets this one sentence.
_REFINER = "belongs to Stable Diffusion XL's refiner, which FLUX does not have; leave it out and ask for "
_REFINER += "num_inference_steps and guidance_scale as FLUX takes them"
_OPENAI = "belongs to a call of OpenAI's API, whose openai_route is missing; send openai_route with it, "
_OPENAI += "/v1/images/generations say"
_WEB_UI = "is a call of the Stable Diffusion web UI, which this worker does not run; send prompt, width, height, "
_WEB_UI += "num_inference_steps and other fields directly in input instead"
OTHER_PROGRAMS: Mapping[str, str] = MappingProxyType(
    {
        "workflow": "is a workflow of ComfyUI, which this worker does not run; send prompt, width, height, "
        "num_inference_steps and other fields directly in input instead",
        **_each(_WEB_UI, "api", "payload"),
        "openai_input": _OPENAI,
        **_each(
            _REFINER, "refiner_inference_steps", "high_noise_frac", "refine_steps", "refiner_strength", "refiner_prompt"
        ),
    }
)
# What has another shape here.
_CONTROLS = "is not read by this worker; send control_image with control_type, or controls as a list of objects "
_CONTROLS += "{image, type, scale, start, end}"
INSTEAD: Mapping[str, str] = MappingProxyType(
    {
        **_each(_CONTROLS, "controlnets", "controlnet_unions", "easycontrols", "control_loras"),
        **_each(
            "is not read by this worker; send the picture as image_prompt",
            "ip_adapters", "ip_adapter", "ip_adapter_image", "reference_image_url",
        ),
        **_each(
            "names a fine-tune that this worker does not have; send its adapter as lora_path",
            "finetune_id", "finetune_strength", "replicate_weights",
        ),
        **_each("is not read by this worker; send an adapter as lora_path", "embeddings", "textual_inversions"),
        "cfg_scale": "can mean two things for FLUX; send guidance_scale, or true_cfg_scale with negative_prompt",
        "s3Config": "is read next to input, not within it",
    }
)  # fmt: skip

# fal's image_size; width and height in pixels.
NAMED_SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "square": (512, 512),
        "square_hd": (1024, 1024),
        "portrait_4_3": (768, 1024),
        "portrait_16_9": (576, 1024),
        "landscape_4_3": (1024, 768),
        "landscape_16_9": (1024, 576),
    }
)
_AS_THE_PICTURE: Mapping[str, None] = dict.fromkeys(("auto", "custom", "default", "match_input", "match_input_image"))
# Values of a field that others have other words for; None is what says nothing.
VALUES: Mapping[str, Mapping[str, str | None]] = MappingProxyType(
    {
        "aspect_ratio": _AS_THE_PICTURE,
        "megapixels": _AS_THE_PICTURE,
        "output_quality": dict.fromkeys(("auto", "high", "hd", "standard", "medium", "low")),  # OpenAI's
        "output_format": {"image/png": "PNG", "image/jpeg": "JPEG", "image/webp": "WEBP"},
        "scheduler": {
            **_each("euler", "euler", "k_euler", "flowmatcheulerdiscretescheduler", "flow_match_euler"),
            **_each("dpmpp_2m", "dpm++ 2m", "k_dpmpp_2m", "dpmsolvermultistep", "dpmsolvermultistepscheduler"),
            **_each("unipc", "uni_pc", "unipcmultistep", "unipcmultistepscheduler"),
            **_each("deis", "deismultistep", "deismultistepscheduler"),
            **_each("heun", "k_heun", "heundiscrete", "flowmatchheundiscretescheduler"),
            **_each("lcm", "lcmscheduler", "flowmatchlcmscheduler"),
        },
    }
)
# Keys of an entry of loras.
LORA_KEYS: Mapping[str, str] = MappingProxyType(
    {
        **_each("path", "url", "lora", "lora_url", "lora_path", "lora_weights", "model", "model_id", "name", "repo"),
        **_each("scale", "weight", "strength", "lora_scale", "lora_strength", "lora_weight"),
        **_each("weight_name", "file", "filename"),
    }
)

# Every name that means something here.
NAMES = frozenset(
    {
        "parameters", *ALIASES, *_SIZES, *_MORE_IMAGES, *itertools.chain(*_MORE_LORAS), *_BORDERS, _LORA_SCALES,
        *WITHOUT_EFFECT, *INSTEAD, *OTHER_PROGRAMS,
    }
)  # fmt: skip

_PIXELS = re.compile(r"(\d{1,5})\s*[xX*]\s*(\d{1,5})")
_ON_THE_HUB = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/?")


class Translation(NamedTuple):
    """A request under the fields' own names."""

    fields: dict[str, Any]
    faults: list[Fault]
    warnings: list[str]
    came_as: Mapping[str, str]  # a field that came under another name, and that
    foreign: bool  # whether anything shows that it was written for another service


def _says(value: object) -> bool:
    """Null and the empty text say nothing: forms send what was not filled in."""
    return value is not None and value != ""


def other_program(received: Mapping[str, Any]) -> Fault | None:
    """The one thing to say of a request that was meant for another program."""
    found = (Fault(name, why) for name, why in OTHER_PROGRAMS.items() if received.get(name) is not None)
    return next(found, None)


def own_names(received: Mapping[str, Any]) -> Translation:
    """`received` under the fields' own names, with a fault where two names of one field disagree."""
    nested = received.get("parameters")  # Hugging Face's {"inputs": ..., "parameters": {...}}
    outer = {name: value for name, value in received.items() if name != "parameters"}
    if not _says(nested):
        return _translated(outer)
    if not isinstance(nested, Mapping):
        translation = _translated(outer)
        translation.faults.append(Fault("parameters", f"must be an object of fields, got {show(nested)}"))
        return translation
    inner = {name: value for name, value in nested.items() if _says(value)}
    if "prompt" in inner and "inputs" in outer and not _same(outer["inputs"], inner["prompt"]):
        outer["image"] = outer.pop("inputs")  # its image-to-image
    translation = _translated({**outer, **inner})
    if twice := [name for name in inner if _says(outer.get(name)) and not _same(outer[name], inner[name])]:
        message = f"repeats fields of the request with other values: {show(twice)}; send each once"
        translation.faults.append(Fault("parameters", message))
    return translation._replace(foreign=True)


def _translated(received: Mapping[str, Any]) -> Translation:
    others = NAMES - {"parameters"} - OTHER_PROGRAMS.keys()
    fields = {name: value for name, value in received.items() if name not in others}
    said = {name: value for name, value in received.items() if name in others and _says(value)}
    faults = [Fault(name, INSTEAD[name]) for name, value in said.items() if name in INSTEAD and value]
    warnings = [f"{name} has no effect: {why}" for name, why in WITHOUT_EFFECT.items() if name in said]
    came_as: dict[str, str] = {}

    def put(name: str, alias: str, value: object) -> None:
        if _says(fields.get(name)) and not _same(fields[name], value):
            there, here = show(fields[name]), show(value)
            message = f"is another name of {name}, and they differ: {there} there, {here} here; send one"
            faults.append(Fault(alias, message))
        elif not _says(fields.get(name)):
            fields[name], came_as[name] = value, alias

    # 1. Fields with another name
    for alias, name in ALIASES.items():
        if alias in said:
            own, value = _one_or_several(name, _meant(name, said[alias]))
            if value is not None:
                put(own, alias, value)
    if more := [said[alias] for alias in _MORE_IMAGES if alias in said]:
        put("init_images", "input_image_2", more)
    if borders := {name: said[name] for name in _BORDERS if said.get(name)}:
        put("outpaint", next(iter(borders)), borders)

    # 2. Sizes
    for alias in _SIZES:
        if alias in said and said[alias] != "auto":
            size = _size(said[alias])
            if size is None:
                allowed = f'"1024x768", {{"width": 1024, "height": 768}}, auto or one of {", ".join(NAMED_SIZES)}'
                faults.append(Fault(alias, f"is not a size, got {show(said[alias])}; allowed: {allowed}"))
            else:
                for name, value in zip(("width", "height"), size, strict=True):
                    put(name, alias, value)

    # 3. Adapters
    _take_loras(fields, said, warnings)

    # 4. Values with another name
    changed = _take_values(fields)
    warnings += [
        f"{name} has no effect as {show(received[name])}: send a number from 1 to 100"
        for name in ("quality", "output_quality")
        if received.get(name) is not None and _meant("output_quality", received[name]) is None
    ]

    # 5. Sides that others round, and sizes that they leave out
    if {*said, *changed} - {"size"}:
        warnings += _drop_sizes(fields, came_as) + _round_sides(fields)
    return Translation(fields, faults, warnings, came_as, bool(said or changed))


def _one_or_several(name: str, value: object) -> tuple[str, object]:
    """Where one picture or a list of them may stand under one name: the field for what is there."""
    if name == "init_image" and isinstance(value, (list, tuple)):
        return "init_images", value
    return name, [value] if name in ("init_images", "loras") and isinstance(value, str) else value


def _meant(name: str, value: object) -> object:
    return VALUES[name].get(value.lower(), value) if name in VALUES and isinstance(value, str) else value


def _take_values(fields: dict[str, Any]) -> set[str]:
    """Values as this worker writes them; gives the names of those that came otherwise."""
    meant = {name: _meant(name, fields[name]) for name in VALUES if isinstance(fields.get(name), str)}
    changed = {name for name, value in meant.items() if value != fields[name]}
    for name in changed:
        if meant[name] is None:
            del fields[name]
        else:
            fields[name] = meant[name]
    return changed


def _take_loras(fields: dict[str, Any], said: Mapping[str, Any], warnings: list[str]) -> None:
    """Adapters under lora_path and loras, as this worker writes them."""
    if isinstance(fields.get("lora_path"), str):
        fields["lora_path"] = _hub_id(fields["lora_path"])
    loras, scales, several = fields.get("loras"), said.get(_LORA_SCALES), False
    if isinstance(loras, (list, tuple)) and len(loras) <= _MOST_KEYS:
        several = isinstance(scales, (list, tuple)) and len(scales) == len(loras)
        loras = [_lora(entry) for entry in loras]
        if several:
            loras = [
                {"scale": scale, **lora} if isinstance(lora, dict) else lora
                for lora, scale in zip(loras, scales or (), strict=True)
            ]
        fields["loras"] = loras
    if _LORA_SCALES in said and not several:
        warnings.append(f"{_LORA_SCALES} has no effect: it must hold one number for each of hf_loras")
    for path, scale in _MORE_LORAS:
        if path in said and isinstance(fields.get("loras", []), list):
            entry = _lora(said[path])
            if isinstance(entry, dict) and scale in said:
                entry["scale"] = said[scale]
            fields["loras"] = [*(fields.get("loras") or []), entry]
    if "extra_lora_scale" in said and not any(path in said for path, _ in _MORE_LORAS):
        warnings.append("extra_lora_scale has no effect without extra_lora")


def _lora(entry: object) -> object:
    """An entry of loras under its own keys; text is its path."""
    if isinstance(entry, str):
        return {"path": _hub_id(entry)}
    if not isinstance(entry, Mapping) or len(entry) > _MOST_KEYS:
        return entry
    own: dict[Any, Any] = {}
    for key, value in entry.items():
        name = LORA_KEYS.get(key, key)
        if name != key and (name in entry or name in own):
            name = key  # the same twice: a fault of this entry
        if value is not None:
            own[name] = _hub_id(value) if name == "path" else value
    return own


def _hub_id(path: Any) -> Any:
    """owner/name where `path` is a repo's page on the hub."""
    short = isinstance(path, str) and len(path) <= _LONGEST_PATH
    page = _ON_THE_HUB.fullmatch(path.strip()) if short else None
    return page[1] if page else path


def _drop_sizes(fields: dict[str, Any], came_as: Mapping[str, str]) -> list[str]:
    """Leave out what has no effect on Replicate: sides next to a ratio, megapixels next to sides."""
    sides = [name for name in ("width", "height") if fields.get(name) is not None and name not in came_as]
    if sides and fields.get("aspect_ratio") is not None:
        dropped, owner = sides, "aspect_ratio"
    elif len(sides) == len(("width", "height")) and fields.get("megapixels") is not None:
        dropped, owner = ["megapixels"], "width and height"
    else:
        return []
    for name in dropped:
        del fields[name]
    return [f"{came_as.get(name, name)} has no effect next to {owner}; send one of them" for name in dropped]


def _round_sides(fields: dict[str, Any]) -> list[str]:
    """Width and height as the nearest that this worker draws; what is out of range stays as it is."""
    warnings = []
    for name in ("width", "height"):
        side = fields.get(name)
        if isinstance(side, int) and not isinstance(side, bool) and MIN_SIDE <= side <= MAX_SIDE and side % 8:
            fields[name] = (side + 4) // 8 * 8
            warnings.append(f"{name} was rounded from {side} to {fields[name]}, the nearest multiple of 8")
    return warnings


def _same(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except RecursionError:  # too deep to be anything that a field takes
        return False


def _size(value: object) -> Sequence[Any] | None:
    if isinstance(value, Mapping) and set(value) == {"width", "height"}:
        return value["width"], value["height"]
    if isinstance(value, str):
        if named := NAMED_SIZES.get(value.lower()):
            return named
        if len(value) <= _LONGEST_SIZE and (pixels := _PIXELS.fullmatch(value.strip())):
            return int(pixels[1]), int(pixels[2])
    return None
