"""The tables: models, modes and schedulers. Pure data and look-ups by name; a new row is a new feature.

Nothing here knows of torch: pipelines and schedulers stand as the names that diffusers gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

# What a client sends is how it asks for a mode: the pictures of the request, and no others.
MODES: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "text-to-image": frozenset(),
        "image-to-image": frozenset({"init_image"}),
        "inpainting": frozenset({"init_image", "mask_image"}),
    }
)


@dataclass(frozen=True)
class Pipeline:
    """A class of diffusers, and what of a request it can use beside what all can."""

    class_name: str
    takes: frozenset[str]


def _pipelines(*rows: tuple[str, str, str]) -> Mapping[str, Pipeline]:
    return MappingProxyType({mode: Pipeline(name, MODES[mode] | set(takes.split())) for mode, name, takes in rows})


FLUX_1_PIPELINES = _pipelines(
    ("text-to-image", "FluxPipeline", "negative_prompt true_cfg_scale"),
    ("image-to-image", "FluxImg2ImgPipeline", "negative_prompt true_cfg_scale strength"),
    ("inpainting", "FluxInpaintPipeline", "negative_prompt true_cfg_scale strength preserve_unmasked"),
)


@dataclass(frozen=True)
class Model:
    """One model. `repo` is its hub id, or the folder it ships in below the project's root."""

    name: str
    repo: str
    family: str
    licence: str
    gated: bool = False
    pipelines: Mapping[str, Pipeline] = field(default_factory=lambda: FLUX_1_PIPELINES)  # by mode; the first loads it
    width: int = 1024
    height: int = 1024
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    max_sequence_length: int = 512  # default and limit
    side_multiple: int = 16  # the VAE's 8 pixels to a latent, and two latents to a token


_DEV_LICENCE = "FLUX.1 [dev] Non-Commercial License"

MODELS: tuple[Model, ...] = (
    Model("FLUX.1-dev", "black-forest-labs/FLUX.1-dev", "dev", _DEV_LICENCE, gated=True),
    Model(
        "FLUX.1-schnell",
        "black-forest-labs/FLUX.1-schnell",
        "schnell",
        "Apache-2.0",
        num_inference_steps=4,
        guidance_scale=3.5,
        max_sequence_length=256,
    ),
    Model(
        "FLUX.1-Krea-dev",
        "black-forest-labs/FLUX.1-Krea-dev",
        "dev",
        _DEV_LICENCE,
        gated=True,
        num_inference_steps=28,
        guidance_scale=4.5,
    ),
    Model(
        "flux-shapes",
        "models/flux-shapes",
        "schnell",
        "MIT",
        width=128,
        height=128,
        num_inference_steps=8,
        guidance_scale=3.5,
        max_sequence_length=32,
    ),
)


@dataclass(frozen=True)
class Family:
    """Models of one architecture and recipe: a fine-tune without a row takes the defaults of `model`."""

    model: str
    guidance_embeds: bool  # as the transformer's configuration says; without it guidance_scale has no effect


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "dev": Family("FLUX.1-dev", guidance_embeds=True),
        "schnell": Family("FLUX.1-schnell", guidance_embeds=False),
    }
)


@dataclass(frozen=True)
class Scheduler:
    """A class of diffusers, or of src/engine/schedulers.py, and what it changes in the model's own configuration."""

    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    flow_match: bool = True  # made for flow models; others borrow their sigmas by `use_flow_sigmas`

    order: int = 1  # calls of the model for each step but the last

    @property
    def starts_midway(self) -> bool:
        """Whether it can start from a picture with noise: diffusers' `scale_noise`, which only flow schedulers have."""
        return self.flow_match


_FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

# Held against the pinned diffusers by tests/test_catalog.py: FLUX's pipelines pass `mu` to set_timesteps.
SCHEDULERS: Mapping[str, Scheduler] = MappingProxyType(
    {
        "euler": Scheduler("FlowMatchEulerDiscreteScheduler"),
        "euler_beta": Scheduler("FlowMatchEulerDiscreteScheduler", {"use_beta_sigmas": True}),
        "euler_exponential": Scheduler("FlowMatchEulerDiscreteScheduler", {"use_exponential_sigmas": True}),
        "euler_karras": Scheduler("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
        "dpmpp_2m": Scheduler("DPMSolverMultistepScheduler", _FLOW_SIGMAS, flow_match=False),
        "unipc": Scheduler("UniPCMultistepScheduler", _FLOW_SIGMAS, flow_match=False),
        "deis": Scheduler("FlowDEISScheduler", _FLOW_SIGMAS, flow_match=False),
        "heun": Scheduler("FlowHeunScheduler", order=2),
        "lcm": Scheduler("FlowMatchLCMScheduler"),
    }
)


def find_model(name: str) -> Model | None:
    """The row whose name or repo `name` is, in any case; a folder or a copy counts by the last part of its name."""
    wanted = name.rstrip("/")
    for model in MODELS:
        if wanted.lower() in (model.name.lower(), model.repo.lower()):
            return model
        if wanted.rsplit("/", 1)[-1].lower() == model.name.lower():
            return replace(model, repo=wanted)
    return None


def guess_model(name: str) -> Model:
    """The row for `name`, or one for an unknown fine-tune by the letters of its name."""
    return find_model(name) or _fine_tune(name, "schnell" if "schnell" in name.lower() else "dev")


def settle_model(name: str, *, guidance_embeds: bool) -> Model:
    """The row for a model that is loaded: what its configuration shows counts more than its name."""
    model = find_model(name)
    if model and FAMILIES[model.family].guidance_embeds == guidance_embeds:
        return model
    return _fine_tune(name, next(key for key, row in FAMILIES.items() if row.guidance_embeds == guidance_embeds))


def _fine_tune(name: str, family: str) -> Model:
    row = next(model for model in MODELS if model.name == FAMILIES[family].model)
    return replace(row, name=name, repo=name, gated=False)
