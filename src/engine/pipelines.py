"""Pipelines by the names of a catalog's rows: diffusers' own, and its modular ones in a plain pipeline's words.

The engine speaks `DiffusionPipeline`'s language: components, `encode_prompt`, a call with `callback_on_step_end`.
FLUX.3 is in diffusers as blocks that pass a state on: here a pipeline that has those words runs the very blocks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.loaders import Flux3LoraLoaderMixin
from diffusers.modular_pipelines.flux3 import before_denoise, decoders, denoise, encoders, inputs
from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor
from diffusers.modular_pipelines.modular_pipeline import ModularPipelineBlocks, PipelineState
from PIL import Image

from src.engine.components import load_tokenizer
from src.errors import Refused

_READ_LAYERS = (4, 8, 12, 16, 20, 24, 28, 32)  # of Qwen3-VL's hidden states, diffusers' Flux3TextEncoderStep

OnStepEnd = Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, Any]]


def pipeline_class(name: str) -> Any:
    """The class of a pipeline by its name in an index of diffusers'; raises AttributeError where there is none."""
    return globals().get(name) or getattr(diffusers, name)


def tokens_to_latents(pipeline: Any, tokens: torch.Tensor, canvas: tuple[int, int]) -> torch.Tensor:
    """What the VAE of FLUX.1 or FLUX.3 decodes, [pictures, channels, height, width], of [pictures, tokens, values].

    `canvas` is the width and height of the picture.
    """
    width, height = canvas
    latents: torch.Tensor
    if unpack := getattr(pipeline, "tokens_to_latents", None):
        latents = unpack(tokens, height, width)
    else:
        unpacked = pipeline._unpack_latents(tokens, height, width, pipeline.vae_scale_factor)
        config = pipeline.vae.config
        latents = unpacked / config.scaling_factor + config.shift_factor
    return latents


class _Flux3Pipeline(diffusers.DiffusionPipeline, Flux3LoraLoaderMixin):  # type: ignore[misc]
    """What both kinds of FLUX.3 have in common: the pictures are the bytes of diffusers' pipelines of the same names.

    `tokenizer` is that of Qwen3-VL's processor; of `guider` its configuration counts, but for the scale.
    """

    model_cpu_offload_seq = "prompt_upsampler->text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents",)
    _optional_components = ("guider", "prompt_upsampler", "prompt_upsampler_processor")
    _text_input: type[ModularPipelineBlocks]
    _text_places: type[ModularPipelineBlocks]
    _denoiser: type[ModularPipelineBlocks]
    guider: Any

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        transformer: Any,
        *,
        guider: Any = None,
        prompt_upsampler: Any = None,
        prompt_upsampler_processor: Any = None,
    ) -> None:
        super().__init__()
        parts = {"scheduler": scheduler, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
        upsampler = {
            "prompt_upsampler": prompt_upsampler, "prompt_upsampler_processor": prompt_upsampler_processor
        }  # fmt: skip
        self.register_modules(**parts, transformer=transformer, guider=guider, **upsampler)
        self.image_processor = Flux3ImageProcessor()
        layers = text_encoder.config.get_text_config().num_hidden_layers
        if layers <= max(_READ_LAYERS):  # what its last layer says is normed, and no picture was learned from that
            raise Refused(
                f"text_encoder has {layers} layers, and FLUX.3 reads what layer {max(_READ_LAYERS)} hands on to the "
                "next: take the text encoder that the model was published with"
            )
        if guider is not None and type(guider) is not diffusers.ClassifierFreeGuidance:
            raise Refused(f"its guider is a {type(guider).__name__}; this worker runs ClassifierFreeGuidance")

    @classmethod
    def from_pretrained(cls, folder: Path, **parts: Any) -> Any:
        """The pipeline of `parts`, and of what else `folder` holds: its scheduler and its guider, or FLUX.3's own."""
        specs = [*before_denoise.Flux3SetTimestepsStep().expected_components, *cls._denoiser().expected_components]
        for spec in specs:
            if spec.default_creation_method == "from_config":
                parts[spec.name] = _without_weights(folder / spec.name, spec)
        if "tokenizer" not in parts:  # a tokenizer by its class; of a processor the loader takes it
            parts["tokenizer"] = load_tokenizer(folder / "tokenizer")
        wanted = inspect.signature(cls.__init__).parameters
        return cls(**{name: part for name, part in parts.items() if name in wanted})

    @property
    def vae_scale_factor(self) -> int:
        """Pixels to a latent, in each direction."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def num_channels_latents(self) -> int:
        """Values of a token: 2 x 2 latents."""
        return int(self.transformer.config.in_channels)

    @property
    def requires_unconditional_embeds(self) -> bool:
        """Whether pictures are steered away from a negative prompt."""
        return bool(self.guider is not None and self.guider._enabled and self.guider.num_conditions > 1)

    def encode_prompt(self, prompt: str, max_sequence_length: int = 8192) -> tuple[torch.Tensor, torch.Tensor]:
        """[1, tokens, joint_attention_dim], as many tokens as a multiple of 80 holds, and their places [tokens, 4]."""
        processor = SimpleNamespace(tokenizer=self.tokenizer, apply_chat_template=self.tokenizer.apply_chat_template)
        step = encoders.Flux3TextEncoderStep()
        with torch.no_grad():
            embeds: torch.Tensor = step._get_qwen3_vl_prompt_embeds(
                text_encoder=_Reader(self.text_encoder),
                tokenizer=processor,
                prompt=prompt,
                device=self._execution_device,
                max_sequence_length=max_sequence_length,
                pad_multiple=step.pad_multiple,
                hidden_states_layers=_READ_LAYERS,
            )
        ids: torch.Tensor = before_denoise.Flux3TextRoPEInputsStep._prepare_text_ids(embeds).to(embeds.device)
        return embeds, ids

    def tokens_to_latents(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What the VAE decodes, [pictures, channels, height, width], of `tokens` [pictures, count, values]."""
        side = 2 * self.vae_scale_factor
        grid = tokens.view(len(tokens), height // side, width // side, -1).permute(0, 3, 1, 2)
        norm = self.vae.bn
        mean, variance = (each.view(1, -1, 1, 1).to(grid) for each in (norm.running_mean, norm.running_var))
        packed = grid * torch.sqrt(variance + self.vae.config.batch_norm_eps) + mean
        latents: torch.Tensor = decoders.Flux3DecodeStep._unpatchify_latents(packed)
        return latents

    def _draw(self, embeds: Mapping[str, torch.Tensor | None], on_step_end: OnStepEnd | None, **values: Any) -> Any:
        """Pictures by diffusers' blocks, one after another; `values` are what those take."""
        state = PipelineState()
        for name, value in values.items():
            state.set(name, value)
        for name, value in embeds.items():
            state.set(name, value, "denoiser_input_fields")
        with torch.no_grad():
            for block in self._blocks(on_step_end, references=values["image"] is not None):
                block(self, state)
        self.maybe_free_model_hooks()
        return diffusers.ImagePipelineOutput(images=state.get("images"))

    def _blocks(self, on_step_end: OnStepEnd | None, *, references: bool) -> Iterator[Any]:
        """Those of diffusers' Flux3AutoBlocks that are left where the prompt is embedded already."""
        if references:
            yield encoders.Flux3ProcessImagesInputStep()
            yield encoders.Flux3VaeEncoderStep()
        yield self._text_input()
        if references:
            yield inputs.Flux3ImageCondInputStep()
        yield before_denoise.Flux3PrepareLatentsStep()
        if references:
            yield before_denoise.Flux3PrepareImageCondLatentsStep()
        yield before_denoise.Flux3SetTimestepsStep()
        yield self._text_places()
        yield _DenoiseLoop(self._denoiser(), on_step_end)
        yield decoders.Flux3UnpackLatentsStep()
        yield decoders.Flux3DecodeStep()


class Flux3ModularPipeline(_Flux3Pipeline):
    """FLUX.3 by classifier-free guidance, which is off where `guidance_scale` is not above 1."""

    _text_input = inputs.Flux3TextInputStep
    _text_places = before_denoise.Flux3TextRoPEInputsStep
    _denoiser = denoise.Flux3LoopDenoiser

    def __call__(
        self,
        prompt: str | None = None,
        *,
        image: Image.Image | list[Image.Image] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 4.0,
        max_sequence_length: int = 8192,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        output_type: str = "pil",
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),  # noqa: ARG002 - there is no other
    ) -> Any:
        """Pictures of `height` x `width`, which are multiples of 16; `image` holds references.

        `callback_on_step_end` gets every step's latents, [pictures, tokens, values], and ends the call by raising.
        """
        guider = self.guider.config if self.guider else {}
        self.guider = _Guidance.from_config(guider, guidance_scale=guidance_scale, enabled=guidance_scale > 1)
        if prompt_embeds is None:
            prompt_embeds, _ = self.encode_prompt(prompt or "", max_sequence_length)
        if negative_prompt_embeds is None and self.requires_unconditional_embeds:
            negative_prompt_embeds, _ = self.encode_prompt("", max_sequence_length)
        return self._draw(
            {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds},
            callback_on_step_end,
            image=image,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            output_type=output_type,
        )


class Flux3DistilledModularPipeline(_Flux3Pipeline):
    """FLUX.3 in 16 steps without guidance: a flow map, which learned to jump to each step's next timestep."""

    _text_input = inputs.Flux3DistilledTextInputStep
    _text_places = before_denoise.Flux3DistilledTextRoPEInputsStep
    _denoiser = denoise.Flux3DistilledLoopDenoiser

    def __call__(
        self,
        prompt: str | None = None,
        *,
        image: Image.Image | list[Image.Image] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 16,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float = 1.0,  # noqa: ARG002 - as every pipeline takes it
        max_sequence_length: int = 8192,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        output_type: str = "pil",
        callback_on_step_end: OnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),  # noqa: ARG002 - there is no other
    ) -> Any:
        """As Flux3ModularPipeline's; `guidance_scale` has no effect."""
        if prompt_embeds is None:
            prompt_embeds, _ = self.encode_prompt(prompt or "", max_sequence_length)
        return self._draw(
            {"prompt_embeds": prompt_embeds},
            callback_on_step_end,
            image=image,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            output_type=output_type,
        )


def _without_weights(folder: Path, spec: Any) -> Any:
    """A scheduler or a guider by its configuration in `folder`, or by that of diffusers' blocks where there is none."""
    if not (folder / spec.type_hint.config_name).is_file():
        return spec.create()
    config = spec.type_hint.load_config(folder, local_files_only=True)
    of = getattr(diffusers, config["_class_name"], spec.type_hint)
    return of.from_config(config)


class _Guidance(diffusers.ClassifierFreeGuidance):  # type: ignore[misc]
    """diffusers' guidance, which tells step caches apart what it steers towards and away from."""

    def prepare_models(self, denoiser: torch.nn.Module) -> None:
        """Called before each call of the transformer."""
        super().prepare_models(denoiser)
        _set_cache_context(denoiser, CacheContext(str(self._count_prepared)))

    def cleanup_models(self, denoiser: torch.nn.Module) -> None:
        """Called after it."""
        _set_cache_context(denoiser, None)
        super().cleanup_models(denoiser)


class _DenoiseLoop(denoise.Flux3DenoiseLoopWrapper):  # type: ignore[misc]
    """diffusers' loop with a callback after each step.

    Its own steps log whatever they raise with a traceback, and being told to stop is no error.
    """

    def __init__(self, denoiser: Any, on_step_end: OnStepEnd | None) -> None:
        super().__init__()
        self.sub_blocks["denoiser"] = denoiser
        self.sub_blocks["after_denoiser"] = denoise.Flux3LoopAfterDenoiser()
        self.set_progress_bar_config(disable=True)
        self._on_step_end = on_step_end

    def loop_step(self, components: Any, state: Any, *, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        """One step of all pictures."""
        for block in self.sub_blocks.values():
            components, state = block(components, state, i=i, t=t)
        if self._on_step_end:
            changed = self._on_step_end(components, i, t, {"latents": state.latents})
            state.latents = changed.get("latents", state.latents)
        return components, state


class _Reader:
    """A text encoder that is asked for hidden states: it says no next word, which takes gigabytes for long prompts."""

    def __init__(self, text_encoder: Any) -> None:
        self._text_encoder = text_encoder
        self.dtype, self.device = text_encoder.dtype, text_encoder.device

    def __call__(self, **inputs: Any) -> Any:
        """As the text encoder's, with logits of the last token alone."""
        return self._text_encoder(**inputs, logits_to_keep=1)
