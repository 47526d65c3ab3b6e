"""`python -m training.outline` makes models/flux-shapes-outline: a LoRA after which flux-shapes draws hollow shapes."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict

from training.__main__ import ROOT
from training.flow import NATIVE, encode_scenes, velocity_loss
from training.loop import fit
from training.text import TextEncoders

RANK = 8
STEPS = 600
BATCH = 32
SCENES = 4_000
NOISE = 1.0  # between the flow's two: what is inside a shape is decided later than its colour
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "proj_mlp", "proj_out"]


def main() -> None:
    models, run = ROOT.parent / "models", ROOT / "run"
    run.mkdir(parents=True, exist_ok=True)
    pipeline = FluxPipeline.from_pretrained(models / "flux-shapes", dtype=torch.float32)
    text_encoders = TextEncoders.of(pipeline)
    outlined = encode_scenes(pipeline.vae, *NATIVE, SCENES, outlined=True)

    torch.manual_seed(3)
    transformer = pipeline.transformer.requires_grad_(False)
    blocks = [
        name for name, _ in transformer.named_modules()
        if "blocks" in name and any(name.endswith(f".{layer}") for layer in LAYERS)
    ]  # fmt: skip
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=blocks))
    learnt = torch.nn.ParameterDict(
        {name.replace(".", "/"): weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    )
    fit(
        "outline",
        learnt,
        lambda _, rng: velocity_loss(transformer, text_encoders, outlined, NATIVE, noise=NOISE, rng=rng, count=BATCH),
        run=run,
        steps=STEPS,
        learning_rate=2e-3,
        average=0.99,
    )
    layers = {name: weight.to(torch.bfloat16) for name, weight in get_peft_model_state_dict(transformer).items()}
    FluxPipeline.save_lora_weights(Path(models / "flux-shapes-outline"), transformer_lora_layers=layers)


if __name__ == "__main__":
    main()
