"""Other names for a request's fields, as clients of other services know them, and sizes said in words.

A name that is missing here is a row away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from src.errors import Fault
from src.wording import show

# Replicate, fal, Black Forest Labs, RunPod's public endpoints, Hugging Face, OpenAI.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "inputs": "prompt",
        "num_outputs": "num_images",
        "num_images_per_prompt": "num_images",
        "n": "num_images",
        "steps": "num_inference_steps",
        "num_steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "real_cfg_scale": "true_cfg_scale",
        "image": "init_image",
        "image_url": "init_image",
        "input_image": "init_image",
        "images": "init_images",
        "image_urls": "init_images",
        "input_images": "init_images",
        "mask": "mask_image",
        "mask_url": "mask_image",
        "mask_image_url": "mask_image",
        "prompt_strength": "strength",
        "control_image_url": "control_image",
        "preprocessed_image": "control_image",
        "redux_image": "image_prompt",
        "image_prompt_strength": "image_prompt_scale",
        "lora_weights": "lora_path",
        "hf_lora": "lora_path",
        "image_format": "output_format",
        "quality": "output_quality",
        "sampler": "scheduler",
    }
)

_NO_CHECKER = "this worker has no safety checker"
# What they send that changes no picture here: taken with a warning that says why.
WITHOUT_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "enable_safety_checker": _NO_CHECKER,
        "disable_safety_checker": _NO_CHECKER,
        "safety_tolerance": _NO_CHECKER,
        "prompt_upsampling": "prompts are read as they are",
        "go_fast": "use the field speed (balanced or fast) instead",
        "acceleration": "use the field speed (balanced or fast) instead",
        "sync_mode": "call /run or /runsync instead",
    }
)

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
_SIZES = ("image_size", "size", "target_size")
_MORE_IMAGES = tuple(f"input_image_{i}" for i in range(2, 11))  # Black Forest Labs' further pictures
_PIXELS = re.compile(r"(\d{1,5})\s*[xX*]\s*(\d{1,5})")


def own_names(received: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault], tuple[str, ...]]:
    """`received` under the fields' own names, a fault where two names of one field disagree, and what is ignored."""
    nested = received.get("parameters")  # Hugging Face's {"inputs": ..., "parameters": {...}}
    outer = {name: value for name, value in received.items() if name != "parameters"}
    if nested is None:
        return _renamed(outer)
    if not isinstance(nested, Mapping):
        fields, faults, ignored = _renamed(outer)
        return fields, [*faults, Fault("parameters", f"must be an object of fields, got {show(nested)}")], ignored
    inner = {name: value for name, value in nested.items() if value is not None}
    fields, faults, ignored = _renamed({**outer, **inner})
    if twice := [name for name in inner if outer.get(name) is not None and not _same(outer[name], inner[name])]:
        faults.append(
            Fault("parameters", f"repeats fields of the request with other values: {show(twice)}; send each once")
        )
    return fields, faults, ignored


def _renamed(received: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault], tuple[str, ...]]:
    others = {*ALIASES, *_SIZES, *WITHOUT_EFFECT, *_MORE_IMAGES}
    fields = {name: value for name, value in received.items() if name not in others}
    faults: list[Fault] = []

    def put(name: str, alias: str, value: object) -> None:
        if fields.get(name) is not None and not _same(fields[name], value):
            message = (
                f"is another name of {name}, and they differ: {show(fields[name])} there, {show(value)} here; send one"
            )
            faults.append(Fault(alias, message))
        elif fields.get(name) is None:
            fields[name] = value

    said = {name: value for name, value in received.items() if value is not None}
    for alias, name in ALIASES.items():
        if alias in said:
            put(name, alias, said[alias])
    if more := [said[alias] for alias in _MORE_IMAGES if alias in said]:
        put("init_images", "input_image_2", more)
    for alias in _SIZES:
        if alias in said:
            size = _size(said[alias])
            if size is None:
                allowed = f'"1024x768", {{"width": 1024, "height": 768}} or one of {", ".join(NAMED_SIZES)}'
                faults.append(Fault(alias, f"is not a size, got {show(said[alias])}; allowed: {allowed}"))
            else:
                for name, value in zip(("width", "height"), size, strict=True):
                    put(name, alias, value)
    ignored = (f"{name} has no effect: {why}" for name, why in WITHOUT_EFFECT.items() if name in said)
    return fields, faults, tuple(ignored)


def _same(one: object, other: object) -> bool:
    try:
        return bool(one == other)
    except RecursionError:  # too deep to be anything that a field takes
        return False


def _size(value: object) -> tuple[Any, Any] | None:
    if isinstance(value, Mapping) and set(value) == {"width", "height"}:
        return value["width"], value["height"]
    if isinstance(value, str):
        if named := NAMED_SIZES.get(value.lower()):
            return named
        if pixels := _PIXELS.fullmatch(value.strip()):
            return int(pixels[1]), int(pixels[2])
    return None
