"""The loss curve of a run, as a picture."""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

STAGES = {"vae": "VAE: L1 + MSE + KL", "text": "text: cross-entropy of the scene", "flow": "flow: MSE of the velocity"}


def loss_curve(run: Path, file: Path) -> None:
    """Draw the losses that `run` logged, one panel a stage, into the PNG `file`."""
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for number, (stage, label) in enumerate(STAGES.items()):
        rows = [json.loads(line) for line in (run / f"{stage}.jsonl").read_text().splitlines()]
        axes = figure.add_subplot(1, len(STAGES), number + 1)
        axes.plot([row["step"] for row in rows], [row["loss"] for row in rows], linewidth=1)
        axes.set(title=label, xlabel="step", yscale="log")
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
