"""Stage three: the transformer and both text encoders learn the flow from noise to the latents of a captioned scene."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image
from torch import Tensor, nn

from training import networks
from training.loop import fit, save
from training.scenes import Scene, describe, draw, sample
from training.text import SEQUENCE_LENGTH, TextEncoders

BATCH = 64
PROMPT_DROPOUT = 0.1  # an empty prompt means any scene: what true_cfg_scale steers away from
SMALL, NATIVE, WIDE, TALL = (64, 64), (128, 128), (160, 96), (96, 160)
SCENES = {SMALL: 16_000, NATIVE: 10_000, WIDE: 1_000, TALL: 1_000}


def _rates(transformer: float, encoders: float) -> Mapping[str, float]:
    return MappingProxyType({"transformer": transformer, "text_encoder": encoders, "text_encoder_2": encoders})


@dataclass(frozen=True)
class Stage:
    """`small` of the `steps` are at 64x64, the others of SHARES; `noise` is the mean of `times`, first and last.

    With `guidance` the stage learns from the one before, not from the scenes: see Guided.
    """

    name: str
    steps: int
    small: int
    noise: tuple[float, float]
    rates: Mapping[str, float]
    average: float
    guidance: float | None = None


# The first round's encoders told what there is, not whose it is: pairs came out mixed. The second goes on with
# its transformer and with encoders that were taught that. Outlines are drawn at less noise than colours, and two of
# them are learnt slowly.
FIRST_ROUND = (
    Stage("flow", 3_500, 2_000, (1.6, 1.6), _rates(1.5e-3, 3e-4), 0.996),
    Stage("finish", 700, 0, (0.5, 0.5), _rates(7e-4, 1e-4), 0.99),
)
SECOND_ROUND = (
    Stage("pairs", 1_000, 1_000, (1.6, 1.6), _rates(1.5e-3, 3e-4), 0.99),
    Stage("full", 2_400, 0, (1.6, 0.5), _rates(1.2e-3, 2e-4), 0.996),
    Stage("longer", 6_000, 0, (1.6, 0.5), _rates(1.2e-3, 2e-4), 0.996),
    Stage("guided", 250, 0, (1.0, 1.0), _rates(5e-4, 1e-4), 0.99, guidance=2.25),
)
SHARES = {NATIVE: 7, WIDE: 1, TALL: 1, SMALL: 1}


@dataclass(frozen=True)
class Encoded:
    """Scenes of one size, their packed, normalised latents, and those of their control pictures where there are any:
    float16 [count, tokens, channels]."""

    scenes: list[Scene]
    latents: Tensor
    controls: Tensor | None = None


@torch.inference_mode()
def encode(vae: AutoencoderKL, pictures: Iterable[Image.Image]) -> Tensor:
    """RGB pictures of one size as packed, normalised latents."""
    packed, left = [], iter(pictures)
    while some := list(itertools.islice(left, 50)):
        pixels = torch.stack([torch.from_numpy(np.array(picture)) for picture in some]).permute(0, 3, 1, 2) / 127.5 - 1
        latents = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        packed.append(FluxPipeline._pack_latents(latents, *latents.shape).half())
    return torch.cat(packed)


def encode_scenes(vae: AutoencoderKL, width: int, height: int, count: int, *, outlined: bool = False) -> Encoded:
    """`count` random scenes, drawn and encoded."""
    rng = random.Random(f"{width}x{height}")
    scenes = [sample(rng) for _ in range(count)]
    return Encoded(scenes, encode(vae, (draw(scene, width, height, outlined=outlined) for scene in scenes)))


def times(count: int, tokens: int, noise: float) -> Tensor:
    """Stratified draws from a logit-normal distribution, a fifth uniform: float [count] in 0..1, where 1 is noise.

    `noise` is the distribution's mean for a picture of 16 tokens.

    Flat colours show through much noise, and the more so the more tokens a picture has: what only the prompt can
    tell is learnt close to t = 1. So the mean lies there and moves with the square root of the tokens, as in
    Stable Diffusion 3 (arXiv 2403.03206, section 5.3.2).
    """
    even = ((torch.arange(count) + torch.rand(count)) / count).clamp(1e-4, 1 - 1e-4)
    normal = 1.2 * torch.special.ndtri(even) + noise + 0.5 * math.log(tokens / 16)
    chosen = torch.where(torch.rand(count) < 0.2, even, normal.sigmoid())
    return chosen[torch.randperm(count)]


def velocity(
    transformer: nn.Module, text_encoders: TextEncoders, captions: list[str], inputs: Mapping[str, Tensor]
) -> Tensor:
    """What the transformer says of its other `inputs` where it is told `captions`: float [count, tokens, channels]."""
    return velocity_of(transformer, *text_encoders.read(captions), inputs)


def velocity_of(transformer: nn.Module, pooled: Tensor, states: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """The same for captions that were read, as `TextEncoders.read` gives them."""
    nowhere = torch.zeros(SEQUENCE_LENGTH, 3)
    prompt = {"pooled_projections": pooled, "encoder_hidden_states": states, "txt_ids": nowhere}
    found: Tensor = transformer(**inputs, **prompt, return_dict=False)[0]
    return found


def noised(batch: Encoded, picks: list[int], size: tuple[int, int], noise: float) -> tuple[dict[str, Tensor], Tensor]:
    """A transformer's inputs on the way from scenes of `batch` to noise, and the velocity that leads there."""
    latents = batch.latents[picks].float()
    start, t = torch.randn_like(latents), times(len(picks), latents.shape[1], noise)
    inputs = {
        "hidden_states": torch.lerp(latents, start, t[:, None, None]),
        "timestep": t,
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, size[1] // 16, size[0] // 16, "cpu", torch.float32),
    }
    return inputs, start - latents


@dataclass(frozen=True)
class Guided:
    """A model whose velocity is to be learnt, steered away from the empty prompt by `guidance`.

    The pupil then says in one call what its teacher says in two with that true_cfg_scale (arXiv 2210.03142).
    """

    transformer: nn.Module
    text_encoders: TextEncoders
    guidance: float

    @torch.no_grad()
    def velocity(self, captions: list[str], inputs: Mapping[str, Tensor]) -> Tensor:
        away = velocity(self.transformer, self.text_encoders, [""] * len(captions), inputs)
        return torch.lerp(away, velocity(self.transformer, self.text_encoders, captions, inputs), self.guidance)


def velocity_loss(
    transformer: nn.Module,
    text_encoders: TextEncoders,
    batch: Encoded,
    size: tuple[int, int],
    *,
    noise: float,
    rng: random.Random,
    count: int = BATCH,
    teacher: Guided | None = None,
) -> Tensor:
    """How far the velocity from latents to noise, or the teacher's, is missed on `count` scenes of `batch`."""
    picks = rng.sample(range(len(batch.scenes)), count)
    captions = ["" if rng.random() < PROMPT_DROPOUT else describe(batch.scenes[i], rng) for i in picks]
    inputs, straight = noised(batch, picks, size, noise)
    if batch.controls is not None:
        inputs["controlnet_cond"] = batch.controls[picks].float()
    wanted = teacher.velocity(captions, inputs) if teacher else straight
    return nn.functional.mse_loss(velocity(transformer, text_encoders, captions, inputs), wanted)


def train(
    vae: AutoencoderKL,
    text_encoders: TextEncoders,
    run: Path,
    stages: Sequence[Stage],
    transformer: nn.Module | None = None,
) -> nn.ModuleDict:
    """Rectified flow (arXiv 2209.03003); gives back "transformer", "text_encoder" and "text_encoder_2"."""
    torch.manual_seed(1)
    parts = nn.ModuleDict({"transformer": transformer or _untrained(), **text_encoders.encoders()})
    file = run / "latents.pt"
    if not file.exists():
        save({size: encode_scenes(vae, *size, count) for size, count in SCENES.items()}, file)
    encoded: dict[tuple[int, int], Encoded] = torch.load(file, weights_only=False)
    for stage in stages:
        teacher = None
        if stage.guidance:
            teacher = Guided(*copy.deepcopy((parts["transformer"], text_encoders)), stage.guidance)

        def loss(step: int, rng: random.Random, stage: Stage = stage, teacher: Guided | None = teacher) -> Tensor:
            size = SMALL if step < stage.small else rng.choices(list(SHARES), list(SHARES.values()))[0]
            first, last = stage.noise
            noise = first + (last - first) * step / stage.steps
            return velocity_loss(
                parts["transformer"], text_encoders, encoded[size], size, noise=noise, rng=rng, teacher=teacher
            )

        rates = dict(stage.rates)
        fit(stage.name, parts, loss, run=run, steps=stage.steps, learning_rate=rates, average=stage.average)
    return parts


def _untrained() -> nn.Module:
    transformer: nn.Module = networks.transformer()
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(layer.weight)  # every block starts as the identity: DiT's adaLN-Zero (arXiv 2212.09748)
            nn.init.zeros_(layer.bias)
    return transformer
