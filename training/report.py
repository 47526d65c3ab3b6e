"""What a training leaves to look at: the loss curve and a grid of samples."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.figure import Figure
from PIL import Image, ImageDraw

STAGES = {
    "vae": "VAE: L1 + MSE + KL",
    "text": "text: cross-entropy of the scene",
    "flow": "flow: MSE of the velocity",
    "finish": "... at less noise",
    "bind": "text: whose is what",
    "pairs": "flow, second round at 64x64",
    "full": "... at 128x128",
    "longer": "... and longer",
    "guided": "... guidance by heart",
    "language": "text: everybody's words",
    "fluent": "... and once more",
    "whose": "... pairs in plain words again",
    "whose_large": "... at the native size",
}
SAMPLES = (
    "a red circle on a blue background",
    "a large white star on a black background",
    "a purple diamond on a yellow background",
    "a green triangle on an orange background",
    "a yellow square on a red background",
    "blue triangle, black background",
    "a tiny yellow star in the top right corner on a purple background",
    "emerald pyramid, snowy backdrop",
    "A VIOLET BALL ON WHITE",
    "a small red circle above a large blue square on a yellow background",
    "a green star left of a white triangle on a purple background",
    "on an orange background, a big white box",
)
_CAPTION = 44
_PANELS = 5  # of the loss curve, in a row


class Generate(Protocol):
    def __call__(self, prompt: str, *, seed: int) -> Image.Image: ...


def loss_curve(run: Path, file: Path, stages: Iterable[str] = STAGES) -> None:
    """Draw the losses that `run` logged, one panel a stage, into the PNG `file`."""
    stages = list(stages)
    columns = min(len(stages), _PANELS)
    rows = -(-len(stages) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    for number, stage in enumerate(stages, start=1):
        logged = [json.loads(line) for line in (run / f"{stage}.jsonl").read_text().splitlines()]
        axes = figure.add_subplot(rows, columns, number)
        axes.plot([row["step"] for row in logged], [row["loss"] for row in logged], linewidth=1)
        axes.set(title=STAGES[stage], xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=80)


def sample_grid(generate: Generate) -> Image.Image:
    """SAMPLES of seed 1, with their prompts beneath."""
    return captioned([(generate(prompt, seed=1), prompt) for prompt in SAMPLES], columns=4)


def captioned(pictures: Sequence[tuple[Image.Image, str]], columns: int) -> Image.Image:
    """Pictures of one size in rows, each with its words beneath."""
    side = pictures[0][0].width
    width, height = side + 60, side + _CAPTION + 12
    sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, words) in enumerate(pictures):
        x, y = i % columns * width, i // columns * height
        sheet.paste(picture, (x + 30, y + 6))
        caption = "\n".join(textwrap.wrap(words, 32))
        pen.multiline_text((x + width // 2, y + side + 9), caption, fill="black", anchor="ma", align="center")
    return sheet
