"""The tables: models, modes, ControlNets, schedulers, speeds, formats, ways to save memory. A new row is a new feature.

Pure data and look-ups by name. Nothing here knows of torch: pipelines and schedulers stand as the names that diffusers
gives them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class ModeSpec:
    """One mode of a model: its pipeline in diffusers, and the fields of a request that are for it."""

    class_name: str  # of the pipeline
    needs: frozenset[str]  # pictures: a request that has exactly these asks for this mode
    takes: frozenset[str]  # what else it can use, beside EVERY_MODE_TAKES
    strength: float = 0.8  # where the request says none
    own_sizes: bool = False  # draws one of its trained sizes unless it is told the area
    controlnet: bool = False  # reads control pictures with ControlNets
    references: int = 0  # how many init_images it reads as they are; others start from one, fitted to the size
    max_pixels: int | None = None  # what it draws at most
    whole_reference: int = 0  # pixels of a reference alone that its pipeline reads whole; of more, a megapixel each
    cache_context: bool = False  # tells step caches apart what it steers towards and away from
    guidance: bool = True  # its call takes guidance_scale
    reads_once: bool = False  # its references, in the first step alone: more than a share of the tokens can hold


# What a request may say whatever its mode is. A field that is neither here nor in a mode's row is refused.
EVERY_MODE_TAKES = frozenset(
    {
        "prompt", "width", "height", "aspect_ratio", "megapixels", "num_inference_steps", "guidance_scale",
        "max_sequence_length", "num_images", "seed", "output_format", "output_quality", "scheduler", "sigmas", "shift",
        "speed", "lora_path", "lora_scale", "loras", "describe", "dry_run",
    }
)  # fmt: skip


def _row(class_name: str, needs: str, takes: str, **columns: Any) -> ModeSpec:
    return ModeSpec(class_name, frozenset(needs.split()), frozenset(takes.split()), **columns)


_TEXT = "prompt_2 image_prompt image_prompt_scale preview"  # what all of FLUX.1 can
_CFG = f"negative_prompt true_cfg_scale {_TEXT}"
_MASK = "strength preserve_unmasked outpaint"
_CONTROL = "control_type preprocess"
_NET = f"{_CONTROL} controlnet_conditioning_scale control_guidance_start control_guidance_end"

# The first is the base, which loads the model.
FLUX_1_MODES: Mapping[str, ModeSpec] = MappingProxyType(
    {
        "text-to-image": _row("FluxPipeline", "", _CFG, cache_context=True),
        "image-to-image": _row("FluxImg2ImgPipeline", "init_image", f"{_CFG} strength"),
        "inpainting": _row("FluxInpaintPipeline", "init_image mask_image", f"{_CFG} {_MASK}"),
        "controlnet": _row("FluxControlNetPipeline", "control_image", f"{_CFG} {_NET}", controlnet=True),
        "controlnet-image-to-image": _row(
            "FluxControlNetImg2ImgPipeline", "init_image control_image", f"{_TEXT} strength {_NET}", controlnet=True
        ),
        "controlnet-inpainting": _row(
            "FluxControlNetInpaintPipeline",
            "init_image mask_image control_image",
            f"{_TEXT} {_MASK} {_NET}",
            controlnet=True,
        ),
    }
)
CONTROL_MODES: Mapping[str, ModeSpec] = MappingProxyType(
    {
        "control": _row("FluxControlPipeline", "control_image", f"{_TEXT} {_CONTROL}"),
        "control-image-to-image": _row(
            "FluxControlImg2ImgPipeline", "init_image control_image", f"{_TEXT} strength {_CONTROL}"
        ),
        "control-inpainting": _row(
            "FluxControlInpaintPipeline", "init_image mask_image control_image", f"{_TEXT} {_MASK} {_CONTROL}"
        ),
    }
)
KONTEXT_MODES: Mapping[str, ModeSpec] = MappingProxyType(
    {
        "text-to-image": _row("FluxKontextPipeline", "", _CFG, own_sizes=True),
        "editing": _row("FluxKontextPipeline", "init_image", _CFG, own_sizes=True, references=1),
        "inpainting": _row(
            "FluxKontextInpaintPipeline", "init_image mask_image", f"{_CFG} {_MASK}", strength=1.0, own_sizes=True
        ),
    }
)
FILL_MODES: Mapping[str, ModeSpec] = MappingProxyType(
    {"inpainting": _row("FluxFillPipeline", "init_image mask_image", f"{_TEXT} {_MASK}", strength=1.0)}
)

# Without another prompt to be steered away from, a de-distilled model draws a blur.
DE_DISTILLED_MODES: Mapping[str, ModeSpec] = MappingProxyType(
    {mode: row for mode, row in FLUX_1_MODES.items() if "true_cfg_scale" in row.takes}
)
# Classifier-free guidance by guidance_scale; T5 alone reads the prompt.
CHROMA_MODES: Mapping[str, ModeSpec] = MappingProxyType(
    {
        "text-to-image": _row("ChromaPipeline", "", "negative_prompt preview"),
        "image-to-image": _row("ChromaImg2ImgPipeline", "init_image", "negative_prompt preview strength"),
        "inpainting": _row("ChromaInpaintPipeline", "init_image mask_image", f"negative_prompt preview {_MASK}"),
    }
)

_KLEIN_PIXELS = 1024 * 1024  # its inpainting shrinks what is larger
FLUX_2_MODES: Mapping[str, ModeSpec] = MappingProxyType(
    {
        "text-to-image": _row("Flux2Pipeline", "", ""),
        "editing": _row("Flux2Pipeline", "init_image", "", references=10),
    }
)
KLEIN_MODES: Mapping[str, ModeSpec] = MappingProxyType(
    {
        "text-to-image": _row("Flux2KleinPipeline", "", "", cache_context=True),
        "editing": _row("Flux2KleinPipeline", "init_image", "", references=10, cache_context=True),
        "inpainting": _row(
            "Flux2KleinInpaintPipeline",
            "init_image mask_image",
            _MASK,
            max_pixels=_KLEIN_PIXELS,
            cache_context=True,
        ),
    }
)
KLEIN_KV_MODES: Mapping[str, ModeSpec] = MappingProxyType(
    {
        "text-to-image": _row("Flux2KleinKVPipeline", "", "", guidance=False),
        "editing": _row("Flux2KleinKVPipeline", "init_image", "", references=10, guidance=False, reads_once=True),
    }
)
# Not distilled: guidance_scale is classifier-free guidance, away from the negative prompt.
KLEIN_BASE_MODES: Mapping[str, ModeSpec] = MappingProxyType(
    {mode: replace(row, takes=row.takes | {"negative_prompt"}) for mode, row in KLEIN_MODES.items()}
)
FLUX_3_MODES: Mapping[str, ModeSpec] = MappingProxyType(
    {
        "text-to-image": _row("Flux3DistilledModularPipeline", "", "preview prompt_upsampling"),
        "editing": _row(
            "Flux3DistilledModularPipeline",
            "init_image",
            "preview prompt_upsampling",
            references=10,
            whole_reference=4 * 1024 * 1024,
        ),
    }
)
FLUX_3_BASE_MODES: Mapping[str, ModeSpec] = MappingProxyType(
    {
        mode: replace(row, class_name="Flux3ModularPipeline", takes=row.takes | {"negative_prompt"}, cache_context=True)
        for mode, row in FLUX_3_MODES.items()
    }
)


@dataclass(frozen=True)
class Quality:
    """What OpenAI's `quality` asks of a model; None is what it does by itself."""

    speed: str | None = None  # a row of SPEEDS
    num_inference_steps: int | None = None


# By OpenAI's names, the least work first.
MANY_STEPS: Mapping[str, Quality] = MappingProxyType(
    {"low": Quality("fast", 20), "medium": Quality("balanced", 28), "high": Quality()}
)
FEW_STEPS: Mapping[str, Quality] = MappingProxyType(
    {"low": Quality(num_inference_steps=2), "medium": Quality(), "high": Quality()}
)
GUIDED_STEPS: Mapping[str, Quality] = MappingProxyType(  # no step is guessed while two directions are mixed
    {"low": Quality(num_inference_steps=20), "medium": Quality(num_inference_steps=28), "high": Quality()}
)
OWN_STEPS: Mapping[str, Quality] = MappingProxyType(
    {"low": Quality("fast"), "medium": Quality("balanced"), "high": Quality()}
)


@dataclass(frozen=True)
class Model:
    """One model. `repo` is its hub id, or the folder it ships in below the project's root.

    An empty `licence` is one that no row knows.
    """

    name: str
    repo: str
    family: str
    licence: str
    gated: bool = False
    download_gb: float = 0  # gigabytes (10^9) of its files: what benchmarks/full_size.py weighs, in bfloat16
    modes: Mapping[str, ModeSpec] = field(default_factory=lambda: FLUX_1_MODES)
    width: int = 1024
    height: int = 1024
    num_inference_steps: int = 50
    guidance_scale: float = 7.5
    max_guidance_scale: float = 20
    true_cfg_scale: float = 1.0  # above 1 where it was trained to be steered away from another prompt
    max_sequence_length: int = 512  # default and limit
    usual_tokens: int | None = None  # of a prompt where the window is as long as that; assumed, to model speed
    max_side: int = 2048  # pixels; at most as many as MAX_PIXELS allows
    side_multiple: int = 16  # the VAE's 8 pixels to a latent, and two latents to a token
    architecture: str = "FLUX.1"  # what ControlNets and Redux are made for
    joint_attention_dim: int = 4096  # numbers that its transformer takes for each token of a prompt
    control_type: str | None = None  # what its control_image is, where it takes one without a ControlNet
    qualities: Mapping[str, Quality] = field(default_factory=lambda: MANY_STEPS)
    flow_map: bool = False  # learned where each step ends: its answers lead there, and are no direction at a point
    # Of a model in one file: what it is, and the model that the rest is from.
    single_file: Mapping[str, Any] | None = None
    base_model: str | None = None

    @property
    def base(self) -> ModeSpec:
        """The mode whose pipeline loads it; the others' pipelines share its weights."""
        return next(iter(self.modes.values()))

    @property
    def upsamples(self) -> bool:
        """Whether it has a prompt upsampler: it was trained on long captions, which another model writes."""
        return "prompt_upsampling" in self.base.takes


def _flux(name: str, family: str, licence: str, **columns: Any) -> Model:
    return Model(name, f"black-forest-labs/{name}", family, licence, **columns)


_DEV = "FLUX.1 [dev] Non-Commercial License"
_NON_COMMERCIAL = "FLUX Non-Commercial License"
_KOMMUNITY = "FLUX Kommunity License"
_FLUX_3: Mapping[str, Any] = {
    "gated": True, "download_gb": 20.1, "max_sequence_length": 8192, "usual_tokens": 1024, "architecture": "FLUX.3",
    "max_side": 4096, "joint_attention_dim": 20480,
}  # fmt: skip
_LITE_GB = 26.3  # of FLUX.1-dev with 8 of its 19 double blocks
_CHROMA: Mapping[str, Any] = {
    "download_gb": 27.5, "modes": CHROMA_MODES, "num_inference_steps": 40, "guidance_scale": 3.0,
    "architecture": "Chroma", "qualities": GUIDED_STEPS,
}  # fmt: skip
_KLEIN: Mapping[str, Any] = {
    "modes": KLEIN_MODES, "num_inference_steps": 4, "guidance_scale": 1.0, "architecture": "FLUX.2-klein",
    "qualities": FEW_STEPS,
}  # fmt: skip
_KLEIN_BASE: Mapping[str, Any] = {
    "modes": KLEIN_BASE_MODES, "guidance_scale": 4.0, "architecture": "FLUX.2-klein",
}  # fmt: skip

MODELS: tuple[Model, ...] = (
    _flux("FLUX.1-dev", "dev", _DEV, gated=True, download_gb=33.7),
    _flux(
        "FLUX.1-schnell",
        "schnell",
        "Apache-2.0",
        gated=True,  # since April 2025, its licence being as free as ever
        download_gb=33.7,
        num_inference_steps=4,
        guidance_scale=3.5,
        max_sequence_length=256,
        qualities=FEW_STEPS,
    ),
    _flux(
        "FLUX.1-Krea-dev",
        "dev",
        _DEV,
        gated=True,
        download_gb=33.7,
        num_inference_steps=28,
        guidance_scale=4.5,
    ),
    _flux(
        "FLUX.1-Kontext-dev",
        "kontext",
        _DEV,
        gated=True,
        download_gb=33.7,
        modes=KONTEXT_MODES,
        num_inference_steps=28,
        guidance_scale=2.5,
    ),
    _flux(
        "FLUX.1-Fill-dev",
        "fill",
        _DEV,
        gated=True,
        download_gb=33.7,
        modes=FILL_MODES,
        guidance_scale=30.0,
        max_guidance_scale=100,
    ),
    _flux(
        "FLUX.1-Canny-dev",
        "control",
        _DEV,
        gated=True,
        download_gb=33.7,
        modes=CONTROL_MODES,
        guidance_scale=30.0,
        max_guidance_scale=100,
        control_type="canny",
    ),
    _flux(
        "FLUX.1-Depth-dev",
        "control",
        _DEV,
        gated=True,
        download_gb=33.7,
        modes=CONTROL_MODES,
        guidance_scale=10.0,
        max_guidance_scale=100,
        control_type="depth",
    ),
    _flux(
        "FLUX.2-dev",
        "flux.2-dev",
        _NON_COMMERCIAL,
        gated=True,
        download_gb=111.3,
        modes=FLUX_2_MODES,
        guidance_scale=4.0,
        architecture="FLUX.2-dev",
        joint_attention_dim=15360,
    ),
    _flux("FLUX.2-klein-4B", "klein", "Apache-2.0", download_gb=16.0, joint_attention_dim=7680, **_KLEIN),
    _flux(
        "FLUX.2-klein-9B", "klein", _NON_COMMERCIAL, gated=True, download_gb=34.7, joint_attention_dim=12288, **_KLEIN
    ),
    _flux(
        "FLUX.2-klein-base-4B", "klein-base", "Apache-2.0", download_gb=16.0, joint_attention_dim=7680, **_KLEIN_BASE
    ),
    _flux(
        "FLUX.2-klein-base-9B",
        "klein-base",
        _NON_COMMERCIAL,
        gated=True,
        download_gb=34.7,
        joint_attention_dim=12288,
        **_KLEIN_BASE,
    ),
    Model(
        "FLUX.2-klein-9B-KV",
        "black-forest-labs/FLUX.2-klein-9b-kv",
        "klein-kv",
        _NON_COMMERCIAL,
        gated=True,
        download_gb=34.7,
        joint_attention_dim=12288,
        **{**_KLEIN, "modes": KLEIN_KV_MODES},
    ),
    Model(
        "FLUX.1-lite-8B",
        "Freepik/flux.1-lite-8B",
        "dev",
        _DEV,
        download_gb=_LITE_GB,
        num_inference_steps=28,
        guidance_scale=3.5,
    ),
    Model(
        "Flex.1-alpha",
        "ostris/Flex.1-alpha",
        "dev",
        "Apache-2.0",
        download_gb=_LITE_GB,
        num_inference_steps=28,
        guidance_scale=4.0,
    ),
    Model(
        "shuttle-3-diffusion",
        "shuttleai/shuttle-3-diffusion",
        "schnell",
        "Apache-2.0",
        download_gb=33.7,
        num_inference_steps=4,
        guidance_scale=3.5,
        max_sequence_length=256,
        qualities=FEW_STEPS,
    ),
    Model(
        "OpenFLUX.1",
        "ostris/OpenFLUX.1",
        "de-distilled",
        "Apache-2.0",
        download_gb=33.7,
        modes=DE_DISTILLED_MODES,
        num_inference_steps=28,
        guidance_scale=3.5,
        true_cfg_scale=3.5,
        qualities=GUIDED_STEPS,
    ),
    Model("Chroma1-HD", "lodestones/Chroma1-HD", "chroma", "Apache-2.0", **_CHROMA),
    Model("Chroma1-Base", "lodestones/Chroma1-Base", "chroma", "Apache-2.0", **_CHROMA),
    Model(
        "Chroma1-Flash",
        "lodestones/Chroma1-Flash",
        "chroma",
        "Apache-2.0",
        **{**_CHROMA, "num_inference_steps": 16, "guidance_scale": 1.0, "qualities": OWN_STEPS},
    ),
    Model(
        "FLUX.3-klein",
        "black-forest-labs/flux-3-image-klein",
        "flux.3",
        _KOMMUNITY,
        modes=FLUX_3_MODES,
        num_inference_steps=16,
        guidance_scale=1.0,
        flow_map=True,
        qualities=OWN_STEPS,
        **_FLUX_3,
    ),
    Model(
        "FLUX.3-klein-base",
        "black-forest-labs/flux-3-image-klein-base",
        "flux.3-base",
        _KOMMUNITY,
        modes=FLUX_3_BASE_MODES,
        guidance_scale=4.0,
        **_FLUX_3,
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
        architecture="flux-shapes",
        joint_attention_dim=128,
        qualities=OWN_STEPS,
    ),
)


@dataclass(frozen=True)
class Family:
    """Models of one architecture and recipe: a fine-tune without a row takes the defaults of `model`."""

    model: str
    guided: bool  # whether guidance_scale has an effect, as the loaded model's configuration says
    # Channels that the transformer reads: of so many pictures' latents, and of a mask's pixels.
    latents: int = 1
    mask: int = 0
    dynamic_shift: bool | None = None  # its scheduler's, where that tells it from a family of the same pipeline
    # What the tensors of its transformer show beside, in the words of diffusers' configuration.
    transformer: Mapping[str, Any] = field(kw_only=True)

    def in_channels(self, latent_channels: int) -> int:
        """What its transformer reads where the VAE has so many `latent_channels`: a token is 2 x 2 of them."""
        return 4 * latent_channels * self.latents + self.mask


_GUIDED = {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}
_UNGUIDED = _GUIDED | {"guidance_embeds": False}
_FLUX_2 = {"_class_name": "Flux2Transformer2DModel"}
_FLOWS = {"_class_name": "Flux3Transformer2DModel"}
# Of those whose transformers look the same, the first is the plain one.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "dev": Family("FLUX.1-dev", guided=True, transformer=_GUIDED),
        "schnell": Family("FLUX.1-schnell", guided=False, dynamic_shift=False, transformer=_UNGUIDED),
        # FLUX.1-dev's shift says that many steps are due, and nothing of guidance that it is steered from outside.
        "de-distilled": Family("OpenFLUX.1", guided=False, dynamic_shift=True, transformer=_UNGUIDED),
        "kontext": Family("FLUX.1-Kontext-dev", guided=True, transformer=_GUIDED),
        "fill": Family("FLUX.1-Fill-dev", guided=True, latents=2, mask=4 * 8 * 8, transformer=_GUIDED),
        "control": Family("FLUX.1-Canny-dev", guided=True, latents=2, transformer=_GUIDED),
        "chroma": Family("Chroma1-HD", guided=True, transformer={"_class_name": "ChromaTransformer2DModel"}),
        "flux.2-dev": Family("FLUX.2-dev", guided=True, transformer=_FLUX_2 | {"guidance_embeds": True}),
        "klein": Family("FLUX.2-klein-4B", guided=False, transformer=_FLUX_2 | {"guidance_embeds": False}),
        "klein-kv": Family("FLUX.2-klein-9B-KV", guided=False, transformer=_FLUX_2 | {"guidance_embeds": False}),
        "klein-base": Family("FLUX.2-klein-base-4B", guided=True, transformer=_FLUX_2 | {"guidance_embeds": False}),
        "flux.3": Family("FLUX.3-klein", guided=False, transformer=_FLOWS | {"flow_map": True}),
        "flux.3-base": Family("FLUX.3-klein-base", guided=True, transformer=_FLOWS | {"flow_map": False}),
    }
)


@dataclass(frozen=True)
class ControlDefaults:
    """How a ControlNet works best on one type of picture, as its card says."""

    conditioning_scale: float
    guidance_end: float = 1.0
    control_mode: int | None = None  # the type's number in a union network


@dataclass(frozen=True)
class ControlNet:
    """A network that reads control pictures; `repo` as a model's."""

    name: str
    repo: str
    types: Mapping[str, ControlDefaults]  # what its picture may be
    architecture: str = "FLUX.1"
    licence: str = _DEV


_UNION = MappingProxyType(
    {
        kind: ControlDefaults(0.5, control_mode=mode)
        for mode, kind in enumerate(("canny", "tile", "depth", "blur", "pose", "gray", "low quality"))
    }
)

# Of those that read a type, the first counts, unless CONTROLNETS names another. Their cards on the hub say the types,
# numbers and scales. XLabs' networks are missing: diffusers' image-to-image and inpainting cannot feed them.
CONTROLNETS: tuple[ControlNet, ...] = (
    ControlNet("Union-Pro", "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro", _UNION),
    ControlNet(
        "Union-Pro-2.0",
        "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0",
        {
            "canny": ControlDefaults(0.7, 0.8),
            "soft edge": ControlDefaults(0.7, 0.8),
            "depth": ControlDefaults(0.8, 0.8),
            "pose": ControlDefaults(0.9, 0.65),
            "gray": ControlDefaults(0.9, 0.8),
        },
    ),
    ControlNet("Union", "InstantX/FLUX.1-dev-Controlnet-Union", _UNION),
    ControlNet("Canny", "InstantX/FLUX.1-dev-Controlnet-Canny", {"canny": ControlDefaults(0.6)}),
    ControlNet("Depth", "Shakker-Labs/FLUX.1-dev-ControlNet-Depth", {"depth": ControlDefaults(0.6)}),
    ControlNet("Jasper-Depth", "jasperai/Flux.1-dev-Controlnet-Depth", {"depth": ControlDefaults(0.6)}),
    ControlNet("Normals", "jasperai/Flux.1-dev-Controlnet-Surface-Normals", {"normals": ControlDefaults(0.6)}),
    ControlNet("Upscaler", "jasperai/Flux.1-dev-Controlnet-Upscaler", {"low resolution": ControlDefaults(0.6)}),
    ControlNet(
        "flux-shapes-canny",
        "models/flux-shapes-canny",
        {"canny": ControlDefaults(1.0)},
        architecture="flux-shapes",
        licence="MIT",
    ),
)

CONTROL_TYPES = tuple(dict.fromkeys(kind for net in CONTROLNETS for kind in net.types))


@dataclass(frozen=True)
class Scheduler:
    """A class of diffusers, or of src/engine/schedulers.py, and what it changes in the model's own configuration."""

    class_name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    flow_match: bool = True  # made for flow models; others borrow their sigmas by `use_flow_sigmas`
    order: int = 1  # calls of the model for each step but the last
    straight: bool = False  # goes from each timestep to the next along the model's one answer, as a flow map means it

    @property
    def starts_midway(self) -> bool:
        """Whether it can start from a picture with noise: diffusers' `scale_noise`, which only flow schedulers have."""
        return self.flow_match


@dataclass(frozen=True)
class StepCache:
    """Between two steps that are computed, others are guessed by Taylor's series (TaylorSeer, arXiv 2503.06923)."""

    interval: int  # one step in so many is computed
    computed_first: int = 3  # steps


EXACT = "exact"  # of SPEEDS
# Measured on flux-shapes by benchmarks/cpu.py.
SPEEDS: Mapping[str, StepCache | None] = MappingProxyType(
    {EXACT: None, "balanced": StepCache(interval=2), "fast": StepCache(interval=3)}
)

_EULER = "FlowMatchEulerDiscreteScheduler"
_FLOW_SIGMAS = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

# Held against the pinned diffusers by tests/test_catalog.py: FLUX's pipelines pass `mu` to set_timesteps.
SCHEDULERS: Mapping[str, Scheduler] = MappingProxyType(
    {
        "euler": Scheduler(_EULER, straight=True),
        "euler_beta": Scheduler(_EULER, {"use_beta_sigmas": True}, straight=True),
        "euler_exponential": Scheduler(_EULER, {"use_exponential_sigmas": True}, straight=True),
        "euler_karras": Scheduler(_EULER, {"use_karras_sigmas": True}, straight=True),
        "dpmpp_2m": Scheduler("FlowDPMSolverScheduler", _FLOW_SIGMAS, flow_match=False),
        "unipc": Scheduler("FlowUniPCScheduler", _FLOW_SIGMAS, flow_match=False),
        "deis": Scheduler("FlowDEISScheduler", _FLOW_SIGMAS, flow_match=False),
        "heun": Scheduler("FlowHeunScheduler", order=2),
        "lcm": Scheduler("FlowMatchLCMScheduler"),
    }
)


@dataclass(frozen=True)
class Format:
    """A format of picture files, and how Pillow writes it."""

    mime: str
    quality: bool = False  # whether it takes one; then it is not exact
    options: Mapping[str, Any] = field(default_factory=dict)
    max_text: int | None = None  # bytes of a request that its file can carry

    @property
    def suffix(self) -> str:
        """Of its files' names, without the dot."""
        return self.mime.partition("/")[2]


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        "PNG": Format("image/png"),
        "JPEG": Format("image/jpeg", quality=True, options={"subsampling": 0}, max_text=65_000),  # a segment
        "WEBP": Format("image/webp", quality=True),
        # On one thread, or bytes would depend on the number of cores; Pillow's own speed, 6, takes ten times as long.
        "AVIF": Format("image/avif", True, {"subsampling": "4:4:4", "speed": 9, "max_threads": 1}),
    }
)


@dataclass(frozen=True)
class MemoryMode:
    """What may be done to fit a model into a card's memory."""

    modulation_cache: tuple[bool, ...] = (False,)
    stream_text_encoders: bool = False
    stream_blocks: bool = False
    offload: str | None = None  # diffusers' own: "model" or "sequential"
    quantization: str | None = None  # a row of QUANTIZATIONS


MEMORY_MODES: Mapping[str, MemoryMode] = MappingProxyType(
    {
        "auto": MemoryMode((False, True), stream_text_encoders=True, stream_blocks=True),
        "full": MemoryMode(),
        "modulation_cache": MemoryMode((True,), stream_text_encoders=True),
        "stream": MemoryMode(stream_text_encoders=True, stream_blocks=True),
        "model_offload": MemoryMode(offload="model"),
        "sequential_offload": MemoryMode(offload="sequential"),
        "fp8": MemoryMode((False, True), stream_text_encoders=True, quantization="fp8"),
        "nf4": MemoryMode((False, True), stream_text_encoders=True, quantization="nf4"),
    }
)


@dataclass(frozen=True)
class QuantizedKind:
    """A smaller kind of weight for the transformer's blocks."""

    itemsize: float  # bytes of one value, its share of the scales included
    max_error: float  # what a layer may lose: the norm of its answers' change, in norms of the answers


QUANTIZATIONS: Mapping[str, QuantizedKind] = MappingProxyType(
    {
        # Measured on layers of normal weights: 0.026, 0.037 where the products are in 8 bits too.
        "fp8": QuantizedKind(1.0, max_error=0.06),
        # A scale of 8 bits for each 64 values, one of 32 bits for 256 of those. Measured: 0.09 for normal weights, 0.15
        # with columns eight times as large; 0.23 at least where bitsandbytes is wrong for the processor.
        "nf4": QuantizedKind(0.52, max_error=0.2),
    }
)


@dataclass(frozen=True)
class Profile:
    """What a worker gives up for speed where its other settings say nothing."""

    quantization: str = "none"  # a row of QUANTIZATIONS
    attention: tuple[str, ...] = ()  # diffusers' attention backends, the first that works here; none: the card's own
    speed: str = EXACT  # the row of SPEEDS of a request that says none
    static_shapes: bool = False  # compiled once more for each size of the warm-up


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        "exact": Profile(),
        "near": Profile(quantization="fp8"),
        "fast": Profile("fp8", attention=("_flash_3_hub", "sage_hub"), speed="balanced", static_shapes=True),
    }
)


def schedulers_for(model: Model) -> Mapping[str, Scheduler]:
    """Those that draw with `model`: a flow map's answers take straight steps alone."""
    return {name: row for name, row in SCHEDULERS.items() if row.straight or not model.flow_map}


def controlnets_for(model: Model, preferred: Sequence[str] = ()) -> tuple[ControlNet, ...]:
    """Those that fit `model`, the `preferred` ones first, by their names or repos in any case."""
    takes_any = any(row.controlnet for row in model.modes.values())
    fitting = [row for row in CONTROLNETS if takes_any and row.architecture == model.architecture]
    wanted = [name.lower() for name in preferred]

    def rank(row: ControlNet) -> int:
        return min((wanted.index(name.lower()) for name in (row.name, row.repo) if name.lower() in wanted), default=99)

    return tuple(sorted(fitting, key=rank))


UPSAMPLER_GB = 19  # of black-forest-labs/flux-3-image-klein-pup, the one that is published for FLUX.3


def no_use_for_upsampler(upsampler: str, model: Model) -> str:
    """What to say of a prompt upsampler that is set beside a model without one."""
    having = ", ".join(row.name for row in MODELS if row.upsamples)
    return f"is {upsampler}, and {model.name} reads prompts as they are; allowed: none, or MODEL_NAME one of {having}"


def find_model(name: str) -> Model | None:
    """The row whose name or repo `name` is, in any case; a folder or a copy counts by the last part of its name."""
    wanted = name.rstrip("/")
    for model in MODELS:
        if wanted.lower() in (model.name.lower(), model.repo.lower()):
            return model
        if wanted.rsplit("/", 1)[-1].lower() == model.name.lower():
            return replace(model, repo=wanted)
    return None


def repo_of(name: str) -> str:
    """Where the files of the model `name` are: the repo of its row, or what the name itself says."""
    row = find_model(name)
    return row.repo if row else name


def get_model(name: str) -> Model:
    """As `find_model`; raises KeyError where no row has that name."""
    if model := find_model(name):
        return model
    raise KeyError(f"{name} is none of {', '.join(model.name for model in MODELS)}")


def families_like(transformer: Mapping[str, Any]) -> tuple[str, ...]:
    """The families whose transformers show what this one does, the plain one first."""
    reads, draws = transformer["in_channels"], transformer["out_channels"]
    return tuple(
        family
        for family, row in FAMILIES.items()
        if row.transformer.items() <= transformer.items() and row.in_channels(draws // 4) == reads
    )


def base_of(family: str, transformer: Mapping[str, Any]) -> Model | None:
    """The first row of `family` whose text encoders speak to this transformer."""
    wide = transformer["joint_attention_dim"]
    return next((model for model in MODELS if (model.family, model.joint_attention_dim) == (family, wide)), None)


def settle_model(
    name: str,
    *,
    class_name: str,
    guided: bool,
    dynamic_shift: bool | None = None,
    base: str | None = None,
    single_file: Mapping[str, Any] | None = None,
) -> Model:
    """The row for a model that is loaded: its class and configuration count; where none is like it, its name.

    `dynamic_shift` is its scheduler's, None where that is not known. A model in one file has the row of its `base` by
    its own name, and tells what `single_file` says.
    """
    model = find_model(base or name)
    if model and _fits(model, class_name, guided):
        own = replace(model, name=name, repo=name, licence="", gated=False)
        return replace(own, single_file=single_file, base_model=base) if base else model
    alike = [family for family, row in FAMILIES.items() if _fits(get_model(row.model), class_name, guided)]
    shifts = (family for family in alike if FAMILIES[family].dynamic_shift in (None, dynamic_shift))
    family = next(shifts, alike[0] if alike else None)
    family = family or ("schnell" if "schnell" in name.lower() else "dev")
    return replace(_fine_tune(name, family), single_file=single_file, base_model=base)


def _fits(model: Model, class_name: str, guided: bool) -> bool:
    return model.base.class_name == class_name and FAMILIES[model.family].guided == guided


def _fine_tune(name: str, family: str) -> Model:
    """Its licence, and whether it reads edges or depth, only its maker knows."""
    head = get_model(FAMILIES[family].model)
    return replace(head, name=name, repo=name, licence="", gated=False, control_type=None)
