"""Other names for a request's fields, as clients of other services know them, and sizes said in words.

Rows only: a name that is missing here is a row away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from src.errors import Fault

# Replicate, fal, Black Forest Labs, RunPod's public endpoints, Hugging Face, OpenAI.
ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "num_outputs": "num_images",
        "num_images_per_prompt": "num_images",
        "n": "num_images",
        "steps": "num_inference_steps",
        "num_steps": "num_inference_steps",
        "guidance": "guidance_scale",
        "image": "init_image",
        "image_url": "init_image",
        "input_image": "init_image",
        "mask": "mask_image",
        "mask_url": "mask_image",
        "prompt_strength": "strength",
        "image_format": "output_format",
        "quality": "output_quality",
        "sampler": "scheduler",
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
_SIZES = ("image_size", "size")
_PIXELS = re.compile(r"(\d{1,5})\s*[xX*]\s*(\d{1,5})")


def own_names(received: Mapping[str, Any]) -> tuple[dict[str, Any], list[Fault]]:
    """`received` under the fields' own names; a fault where two names of one field disagree."""
    fields = {name: value for name, value in received.items() if name not in ALIASES and name not in _SIZES}
    faults: list[Fault] = []

    def put(name: str, alias: str, value: object) -> None:
        if name in fields and fields[name] != value:
            faults.append(Fault(alias, f"is another name of {name}, which says something else"))
        fields.setdefault(name, value)

    for alias, name in ALIASES.items():
        if alias in received:
            put(name, alias, received[alias])
    for alias in _SIZES:
        if alias in received:
            size = _size(received[alias])
            if size is None:
                allowed = f'"1024x768", {{"width": 1024, "height": 768}} or one of {", ".join(NAMED_SIZES)}'
                faults.append(Fault(alias, f"is no size; allowed: {allowed}"))
            else:
                for name, value in zip(("width", "height"), size, strict=True):
                    put(name, alias, value)
    return fields, faults


def _size(value: object) -> tuple[Any, Any] | None:
    if isinstance(value, Mapping) and set(value) == {"width", "height"}:
        return value["width"], value["height"]
    if isinstance(value, str):
        if named := NAMED_SIZES.get(value.lower()):
            return named
        if pixels := _PIXELS.fullmatch(value.strip()):
            return int(pixels[1]), int(pixels[2])
    return None
