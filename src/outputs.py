"""What the engine gives back: the pictures of a plan, and what it holds in memory. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Generation:
    """What a Plan became: RGB pictures of the plan's width and height, in the order of its seeds."""

    pictures: tuple[Image.Image, ...]
    scheduler: str  # the row of the catalog that was used, or the class of the model's own where it has none
    timings: Mapping[str, float]  # seconds of each phase
    warnings: tuple[str, ...]
    peak_memory: int | None  # bytes on the card; None on the CPU
    quantization: str | None = None  # of the weights; None is exact
    profile: str = "exact"  # the worker's row of PROFILES
    device: str = "cpu"  # where it was drawn, as torch names it
    prompts: tuple[str, ...] = ()  # each picture's as it was drawn, where the plan's were upsampled
    prompt_tokens: int = 0  # read for all pictures, with padding and what stands for an image_prompt


@dataclass(frozen=True)
class Loaded:
    """What is in memory now: adapters as they were asked for, ControlNets by name, where weights live, how it runs."""

    adapters: tuple[str, ...]
    controlnets: tuple[str, ...]
    placement: Mapping[str, Any]
    acceleration: Mapping[str, Any] = field(default_factory=dict)
