"""The tables: models, modes and schedulers. Pure data and look-ups by name; a new row is a new feature.

Nothing here knows of torch: pipelines and schedulers stand as the names that diffusers gives them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Pipeline:
    """A class of diffusers: the pictures that ask for it, and what else of a request it can use beside what all can."""

    class_name: str
    needs: frozenset[str]
    takes: frozenset[str]
    strength: float = 0.8  # where the request says none
    own_sizes: bool = False  # draws one of its trained sizes unless it is told the area


def _row(class_name: str, needs: str, takes: str, **columns: Any) -> Pipeline:
    return Pipeline(class_name, frozenset(needs.split()), frozenset(takes.split()), **columns)


_CFG = "negative_prompt true_cfg_scale"
_MASK = "strength preserve_unmasked"

# By mode; the first is the base, which loads the model.
FLUX_1_PIPELINES: Mapping[str, Pipeline] = MappingProxyType(
    {
        "text-to-image": _row("FluxPipeline", "", _CFG),
        "image-to-image": _row("FluxImg2ImgPipeline", "init_image", f"{_CFG} strength"),
        "inpainting": _row("FluxInpaintPipeline", "init_image mask_image", f"{_CFG} {_MASK}"),
    }
)
KONTEXT_PIPELINES: Mapping[str, Pipeline] = MappingProxyType(
    {
        "text-to-image": _row("FluxKontextPipeline", "", _CFG, own_sizes=True),
        "editing": _row("FluxKontextPipeline", "init_image", _CFG, own_sizes=True),
        "inpainting": _row(
            "FluxKontextInpaintPipeline", "init_image mask_image", f"{_CFG} {_MASK}", strength=1.0, own_sizes=True
        ),
    }
)
FILL_PIPELINES: Mapping[str, Pipeline] = MappingProxyType(
    {"inpainting": _row("FluxFillPipeline", "init_image mask_image", _MASK, strength=1.0)}
)


@dataclass(frozen=True)
class Model:
    """One model. `repo` is its hub id, or the folder it ships in below the project's root."""

    name: str
    repo: str
    family: str
    licence: str
    gated: bool = False
    pipelines: Mapping[str, Pipeline] = field(default_factory=lambda: FLUX_1_PIPELINES)
    width: int = 1024
    height: int = 1024
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    max_guidance_scale: float = 20
    max_sequence_length: int = 512  # default and limit
    side_multiple: int = 16  # the VAE's 8 pixels to a latent, and two latents to a token

    @property
    def base(self) -> Pipeline:
        """The pipeline that loads it; its others are views of that one."""
        return next(iter(self.pipelines.values()))


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
        "FLUX.1-Kontext-dev",
        "black-forest-labs/FLUX.1-Kontext-dev",
        "kontext",
        _DEV_LICENCE,
        gated=True,
        pipelines=KONTEXT_PIPELINES,
        num_inference_steps=28,
        guidance_scale=2.5,
    ),
    Model(
        "FLUX.1-Fill-dev",
        "black-forest-labs/FLUX.1-Fill-dev",
        "fill",
        _DEV_LICENCE,
        gated=True,
        pipelines=FILL_PIPELINES,
        guidance_scale=30.0,
        max_guidance_scale=100,
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
        "kontext": Family("FLUX.1-Kontext-dev", guidance_embeds=True),
        "fill": Family("FLUX.1-Fill-dev", guidance_embeds=True),
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


def settle_model(name: str, *, class_name: str, guidance_embeds: bool) -> Model:
    """The row for a model that is loaded: its class and configuration count; where none is like it, its name."""
    model = find_model(name)
    if model and _fits(model, class_name, guidance_embeds):
        return model
    heads = ((family, find_model(row.model)) for family, row in FAMILIES.items())
    family = next((family for family, head in heads if head and _fits(head, class_name, guidance_embeds)), None)
    family = family or ("schnell" if "schnell" in name.lower() else "dev")
    return _fine_tune(name, family)


def _fits(model: Model, class_name: str, guidance_embeds: bool) -> bool:
    return model.base.class_name == class_name and FAMILIES[model.family].guidance_embeds == guidance_embeds


def _fine_tune(name: str, family: str) -> Model:
    row = next(model for model in MODELS if model.name == FAMILIES[family].model)
    return replace(row, name=name, repo=name, gated=False)
