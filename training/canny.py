"""`python -m training.canny` makes models/flux-shapes-canny: a ControlNet that puts shapes where the edges are."""

from __future__ import annotations

import random
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxControlNetModel, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn

from src.plan.preprocessors import canny_edges
from training.__main__ import ROOT
from training.flow import NATIVE, Encoded, encode, velocity_loss
from training.loop import fit
from training.scenes import anywhere, draw, sample
from training.text import TextEncoders

LAYERS = 2
STEPS = 900
BATCH = 32
SCENES = 6_000
NOISE = 1.6  # where things are is decided at much noise


class Controlled(nn.Module):
    """The transformer with a ControlNet beside it, called as the transformer alone but for the control's latents."""

    def __init__(self, transformer: FluxTransformer2DModel, controlnet: FluxControlNetModel) -> None:
        super().__init__()
        self.transformer, self.controlnet = transformer, controlnet

    def forward(self, controlnet_cond: Tensor, **arguments: Any) -> tuple[Tensor]:
        double, single = self.controlnet(controlnet_cond=controlnet_cond, **arguments)
        velocity: tuple[Tensor] = self.transformer(
            controlnet_block_samples=double, controlnet_single_block_samples=single, **arguments
        )
        return velocity


def main() -> None:
    models, run = ROOT.parent / "models", ROOT / "run"
    run.mkdir(parents=True, exist_ok=True)
    pipeline = FluxPipeline.from_pretrained(models / "flux-shapes", dtype=torch.float32)
    text_encoders = TextEncoders.of(pipeline)
    transformer = pipeline.transformer.requires_grad_(False)
    edged = encode_with_edges(pipeline.vae, SCENES)

    torch.manual_seed(5)
    controlnet = FluxControlNetModel.from_transformer(
        transformer,
        num_layers=LAYERS,
        num_single_layers=0,
        attention_head_dim=transformer.config.attention_head_dim,
        num_attention_heads=transformer.config.num_attention_heads,
    )
    controlled = Controlled(transformer, controlnet)
    fit(
        "canny",
        controlnet,
        lambda _, rng: velocity_loss(controlled, text_encoders, edged, NATIVE, noise=NOISE, rng=rng, count=BATCH),
        run=run,
        steps=STEPS,
        learning_rate=1.5e-3,
        average=0.99,
    )
    controlnet.register_to_config(_name_or_path="")  # the saved network tells nobody's folders
    controlnet.to(torch.bfloat16).save_pretrained(models / "flux-shapes-canny")


def encode_with_edges(vae: AutoencoderKL, count: int) -> Encoded:
    """`count` scenes of the native size, drawn and encoded, and their canny edges; two in three lie anywhere."""
    rng = random.Random("edges")
    scenes = [anywhere(rng) if rng.random() < 2 / 3 else sample(rng) for _ in range(count)]
    edges = encode(vae, (canny_edges(draw(scene, *NATIVE)) for scene in scenes))
    return Encoded(scenes, encode(vae, (draw(scene, *NATIVE) for scene in scenes)), edges)


if __name__ == "__main__":
    main()
