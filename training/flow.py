"""Stage three: the transformer and both text encoders learn the flow from noise to the latents of a captioned scene."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline
from torch import Tensor, nn

from training import networks
from training.loop import fit, save
from training.scenes import Scene, describe, draw, sample
from training.text import SEQUENCE_LENGTH, Readers

STEPS = 3500
FULL_SIZE_FROM = 1800
FINISHING_STEPS = 700
BATCH = 64
LEARNING_RATES = {"transformer": 1.5e-3, "text_encoder": 3e-4, "text_encoder_2": 3e-4}
FINISHING_RATES = {"transformer": 7e-4, "text_encoder": 1e-4, "text_encoder_2": 1e-4}
NOISE = 1.6
FINISHING_NOISE = 0.5  # by then colours are right, and outlines are drawn at less noise
PROMPT_DROPOUT = 0.1  # an empty prompt means any scene: what true_cfg_scale steers away from
SMALL, NATIVE, WIDE, TALL = (64, 64), (128, 128), (160, 96), (96, 160)
SCENES = {SMALL: 16_000, NATIVE: 10_000, WIDE: 1_000, TALL: 1_000}


@dataclass(frozen=True)
class Encoded:
    """Scenes of one size and their packed, normalised latents, float16 [count, tokens, channels]."""

    scenes: list[Scene]
    latents: Tensor


@torch.inference_mode()
def encode(vae: AutoencoderKL, width: int, height: int, count: int, *, outlined: bool = False) -> Encoded:
    """`count` random scenes, drawn and encoded."""
    rng = random.Random(f"{width}x{height}")
    scenes = [sample(rng) for _ in range(count)]
    packed = []
    for first in range(0, count, 50):
        drawn = [
            torch.from_numpy(np.array(draw(scene, width, height, outlined=outlined)))
            for scene in scenes[first : first + 50]
        ]
        pixels = torch.stack(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        packed.append(FluxPipeline._pack_latents(latents, *latents.shape).half())
    return Encoded(scenes, torch.cat(packed))


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


def velocity_loss(
    transformer: nn.Module,
    readers: Readers,
    batch: Encoded,
    size: tuple[int, int],
    *,
    noise: float,
    rng: random.Random,
    count: int = BATCH,
) -> Tensor:
    """How far the velocity from latents to noise is missed on `count` scenes of `batch`."""
    picks = rng.sample(range(len(batch.scenes)), count)
    captions = ["" if rng.random() < PROMPT_DROPOUT else describe(batch.scenes[i], rng) for i in picks]
    wanted = batch.latents[picks].float()
    start, t = torch.randn_like(wanted), times(count, wanted.shape[1], noise)
    pooled, states = readers.read(captions)
    velocity = transformer(
        hidden_states=torch.lerp(wanted, start, t[:, None, None]),
        timestep=t,
        pooled_projections=pooled,
        encoder_hidden_states=states,
        txt_ids=torch.zeros(SEQUENCE_LENGTH, 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(1, size[1] // 16, size[0] // 16, "cpu", torch.float32),
        return_dict=False,
    )[0]
    return nn.functional.mse_loss(velocity, start - wanted)


def train(vae: AutoencoderKL, readers: Readers, run: Path) -> nn.ModuleDict:
    """Rectified flow (arXiv 2209.03003); gives back "transformer", "text_encoder" and "text_encoder_2"."""
    torch.manual_seed(1)
    parts = nn.ModuleDict({"transformer": networks.transformer(), **readers.encoders()})
    for name, layer in parts["transformer"].named_modules():
        if isinstance(layer, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(layer.weight)  # every block starts as the identity: DiT's adaLN-Zero (arXiv 2212.09748)
            nn.init.zeros_(layer.bias)

    file = run / "latents.pt"
    if not file.exists():
        save({size: encode(vae, *size, count) for size, count in SCENES.items()}, file)
    encoded: dict[tuple[int, int], Encoded] = torch.load(file, weights_only=False)

    def loss(size: tuple[int, int], noise: float, rng: random.Random) -> Tensor:
        return velocity_loss(parts["transformer"], readers, encoded[size], size, noise=noise, rng=rng)

    def full_size(rng: random.Random) -> tuple[int, int]:
        return rng.choices((NATIVE, WIDE, TALL), (8, 1, 1))[0]

    fit(
        "flow",
        parts,
        lambda step, rng: loss(SMALL if step < FULL_SIZE_FROM else full_size(rng), NOISE, rng),
        run=run,
        steps=STEPS,
        learning_rate=LEARNING_RATES,
        average=0.996,
    )
    fit(
        "finish",
        parts,
        lambda _, rng: loss(full_size(rng), FINISHING_NOISE, rng),
        run=run,
        steps=FINISHING_STEPS,
        learning_rate=FINISHING_RATES,
        average=0.99,
    )
    return parts
