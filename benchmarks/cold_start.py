"""`python -m benchmarks.cold_start`: the ways to read a model's weights from a network volume, side by side in one run.

The volume is a file that sleeps (benchmarks/cold_start_worker.py): what is shown is which way is how many times faster,
not how long a model takes. Each start is a process that imports torch and diffusers, as a worker does. Writes
results/cold_start.json and results/cold_start.png.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from benchmarks.cold_start_worker import AHEAD, STREAMED, WAYS
from benchmarks.machine import machine

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ROUNDS = 3
MEGABYTES = 256
# Of such volumes it is said that FLUX.1-dev's 34 GB took 15 to 20 minutes by page faults, and half a minute by read().
LATENCY = 0.0035  # seconds of a request
RATE = 250e6  # bytes a second of one connection
_FILES, _TENSORS = 8, 16


def main() -> None:
    results = measure(MEGABYTES, ROUNDS, LATENCY, RATE)
    (RESULTS / "cold_start.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results).savefig(RESULTS / "cold_start.png", dpi=80)
    print(json.dumps(results, indent=2))


def measure(megabytes: float, rounds: int, latency: float, rate: float) -> dict[str, Any]:
    """Each way `rounds` times by turns; medians."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with TemporaryDirectory() as folder:
        size = make_model(Path(folder), int(megabytes * 1e6))
        for _ in range(rounds):
            for way, starts in found.items():
                starts.append(start(way, folder, latency, rate))
    return {
        "machine": machine(),
        "bytes": size,
        "volume": {"latency_seconds": latency, "bytes_per_second_of_a_connection": rate},
        "rounds": rounds,
        "ways": {
            way: {key: median(each[key] for each in starts) for key in starts[0]} for way, starts in found.items()
        },
    }


def make_model(folder: Path, size: int) -> int:
    """Files as a model's, of `size` bytes together and of unequal sizes; what they have in all."""
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    for number in range(_FILES):
        (folder / f"network_{number}").mkdir()
        values = size * (number + 1) * 2 // (_FILES * (_FILES + 1)) // 2 // _TENSORS
        tensors = {f"weight_{each}": torch.randn(values).bfloat16() for each in range(_TENSORS)}
        save_file(tensors, folder / f"network_{number}" / "model.safetensors")
    return sum(file.stat().st_size for file in folder.glob("*/*.safetensors"))


def start(way: str, folder: str, latency: float, rate: float) -> dict[str, float]:
    """One start in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.cold_start_worker", way, folder, str(latency), str(rate)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return found


def plot(results: dict[str, Any]) -> Figure:
    """How long a start waits for its weights, by way, and how much of them is in memory twice."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots()
    ways = dict(reversed(results["ways"].items()))
    waits = [found["wait_seconds"] for found in ways.values()]
    colours = ["tab:green" if way in (AHEAD, STREAMED) else "tab:gray" for way in ways]
    bars = axes.barh(list(ways), waits, color=colours)
    cached = [f"{found['most_in_cache'] / 1e6:.0f} MB" for found in ways.values()]
    axes.bar_label(bars, [f"{wait:.2f} s, {most}" for wait, most in zip(waits, cached, strict=True)], padding=3)
    title = f"{results['bytes'] / 1e6:.0f} MB of weights on a slow volume"
    axes.set(
        xlabel="seconds without weights once torch is imported; the most in the system's cache",
        xlim=(0, 1.3 * max(waits)),
        title=title,
    )
    return figure


if __name__ == "__main__":
    main()
