"""`python -m training` makes models/flux-shapes from nothing, on two cores; it goes on where it was cut off."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline

from training import autoencoder, flow, networks, report, text

ROOT = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=ROOT / "run", help="checkpoints and logs")
    parser.add_argument("--output", type=Path, default=ROOT.parent / "models" / "flux-shapes")
    arguments = parser.parse_args()
    run: Path = arguments.run
    run.mkdir(parents=True, exist_ok=True)

    if not (run / "vae").exists():
        autoencoder.train(run).save_pretrained(run / "vae")
    vae = AutoencoderKL.from_pretrained(run / "vae").to(memory_format=torch.channels_last)
    readers = text.train(run)
    parts = flow.train(vae, readers, run)

    pipeline = FluxPipeline(
        scheduler=networks.scheduler(),
        vae=vae,
        tokenizer=readers.tokenizer,
        tokenizer_2=readers.tokenizer_2,
        **parts,
    )
    # bfloat16, as FLUX.1 is stored: the same weights then serve a CPU in float32 and a card in bfloat16.
    pipeline.to(torch.bfloat16).save_pretrained(arguments.output)
    report.loss_curve(run, arguments.output / "loss.png")


if __name__ == "__main__":
    main()
