"""`python -m training` makes models/flux-shapes from nothing, on two cores; it goes on where it was cut off."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image

from training import autoencoder, flow, language, networks, report, text

ROOT = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "run", help="checkpoints and logs")
    parser.add_argument("--output", type=Path, default=ROOT.parent / "models" / "flux-shapes")
    arguments = parser.parse_args()
    run, output = arguments.run, arguments.output
    run.mkdir(parents=True, exist_ok=True)

    if not (run / "vae").exists():
        autoencoder.train(run).save_pretrained(run / "vae.partial")
        (run / "vae.partial").rename(run / "vae")
    vae = AutoencoderKL.from_pretrained(run / "vae").to(memory_format=torch.channels_last)
    vae.register_to_config(_name_or_path="")  # the saved model tells nobody's folders
    first = flow.train(vae, text.train(run), run, flow.FIRST_ROUND)
    text_encoders = text.bind(text.train(run), run)
    parts = flow.train(vae, text_encoders, run, flow.SECOND_ROUND, first["transformer"])

    pipeline = FluxPipeline(
        scheduler=networks.scheduler(),
        vae=vae,
        tokenizer=text_encoders.tokenizer,
        tokenizer_2=text_encoders.tokenizer_2,
        **parts,
    )
    pipeline.register_modules(**vars(language.train(pipeline, run)))
    # bfloat16, as FLUX.1 is stored: the same weights then serve a CPU in float32 and a card in bfloat16.
    pipeline.to(torch.bfloat16).save_pretrained(output)
    report.loss_curve(
        run, output / "loss.png", [stage for stage in report.STAGES if stage not in language.STAGES | language.LAST]
    )
    report.loss_curve(run, output / "language.png", language.STAGES | language.LAST)
    report.sample_grid(_generator(output)).save(output / "samples.png", optimize=True)


def _generator(folder: Path) -> report.Generate:
    """Draws with the model as it was saved, 8 steps at the native size."""
    pipeline = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompt: str, *, seed: int) -> Image.Image:
        picture: Image.Image = pipeline(
            prompt,
            width=128,
            height=128,
            num_inference_steps=8,
            max_sequence_length=text.SEQUENCE_LENGTH,
            generator=torch.Generator().manual_seed(seed),
        ).images[0]
        return picture

    return generate


if __name__ == "__main__":
    main()
