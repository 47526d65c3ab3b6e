"""`python -m benchmarks.cpu`: what can be shown without a card, on the shipped model in float32.

For 20 prompts each way of saving memory or steps is drawn beside the plain way: how far the pictures are apart, and the
seconds of both. And where the seconds of a start go. Wants an idle machine. Writes results/cpu.json and the pictures of
the ways that are not exact, results/speeds.png.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from statistics import mean, median
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.machine import machine
from src.engine import Engine, load_engine
from src.errors import InvalidSettings
from src.plan.plan import make_plan
from src.request.reading import read_request
from src.settings import ROOT, Settings
from training.report import captioned
from training.scenes import every_prompt

RESULTS = ROOT / "benchmarks" / "results"
PROMPTS = [prompt for prompt, _ in every_prompt()][::13][:20]
SHOWN = PROMPTS[1::5]
SMALL = {"max_pixels": 128 * 128}
# Way: settings of the worker, fields of the request.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "adaptive norms ahead": ({"memory_mode": "modulation_cache"}, {}),
    "blocks stream": ({"memory_mode": "stream", "memory_limit_gb": 0.025, **SMALL}, {}),
    "both, the smallest card": ({"memory_limit_gb": 0.022, **SMALL}, {}),
    "balanced": ({}, {"speed": "balanced"}),
    "fast": ({}, {"speed": "fast"}),
    "balanced, 28 steps": ({}, {"speed": "balanced", "num_inference_steps": 28}),
    "fast, 28 steps": ({}, {"speed": "fast", "num_inference_steps": 28}),
    "fp8": ({"quantization": "fp8"}, {}),
    "nf4": ({"quantization": "nf4"}, {}),
}
STARTS = 3
_START = """
import time
begun = time.perf_counter()
seconds = {}
def lap(name):
    global begun
    now = time.perf_counter()
    seconds[name], begun = now - begun, now
import handler
lap("import handler")
import src.engine
lap("import torch and diffusers")
handler.get_engine()
lap("load the model")
assert handler.handler({"input": {"prompt": "a red circle", "seed": 1}})["status"] == "success"
lap("first picture")
assert handler.handler({"input": {"prompt": "a red star", "seed": 1}})["status"] == "success"
lap("second picture")
import json
print(json.dumps(seconds))
"""


def main() -> None:
    plain = load_engine(Settings(model_name="flux-shapes"))
    ways = {name: try_to_compare(plain, *way) for name, way in WAYS.items()}
    pictures = {name: found.pop("pictures") for name, found in ways.items() if "missing" not in found}
    results = {"machine": machine(), "prompts": len(PROMPTS), "ways": ways, "start": start()}
    (RESULTS / "cpu.json").write_text(json.dumps(results, indent=2) + "\n")
    shown = {"exact": [draw(plain, prompt)[0] for prompt in SHOWN]}
    shown |= {name: pictures[name] for name in ("balanced", "fast", "fp8", "nf4") if name in pictures}
    cells = [(picture, name) for name, row in shown.items() for picture in row]
    captioned(cells, columns=len(SHOWN)).save(RESULTS / "speeds.png", optimize=True)
    print(json.dumps(results, indent=2))


def try_to_compare(plain: Engine, settings: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """`compare`, or why this machine cannot: a library may be wrong for its processor."""
    try:
        return compare(plain, settings, fields)
    except InvalidSettings as error:
        return {"missing": str(error)}


def compare(plain: Engine, settings: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """One way beside the plain one, picture by picture."""
    engine = load_engine(Settings(model_name="flux-shapes", **settings)) if settings else plain
    exact = {name: value for name, value in fields.items() if name != "speed"}
    seconds: list[tuple[float, float]] = []
    apart: list[float] = []
    decibels: list[float] = []
    shown = []
    for prompt in PROMPTS:
        (expected, before), (found, after) = draw(plain, prompt, **exact), draw(engine, prompt, **fields)
        difference = np.asarray(found, float) - np.asarray(expected, float)
        apart.append(float(np.abs(difference).max()))
        if apart[-1]:
            decibels.append(float(10 * np.log10(255**2 / (difference**2).mean())))
        seconds.append((before, after))
        if prompt in SHOWN:
            shown.append(found)
    return {
        "largest_difference": max(apart),
        "psnr_mean": round(mean(decibels), 1) if decibels else None,
        "psnr_least": round(min(decibels), 1) if decibels else None,
        "seconds": {"plain": round(median(a for a, _ in seconds), 4), "way": round(median(b for _, b in seconds), 4)},
        "placement": engine.loaded().placement,
        "pictures": shown,
    }


def draw(engine: Engine, prompt: str, **fields: Any) -> tuple[Image.Image, float]:
    """The picture, and the seconds that it took."""
    request, faults, _ = read_request({"input": {"prompt": prompt, "seed": 1, **fields}})
    plan = make_plan(request, faults, engine.model, max_pixels=128 * 128)
    begun = time.perf_counter()
    generation = engine.run(plan)
    return generation.pictures[0], time.perf_counter() - begun


def start() -> dict[str, float]:
    """Seconds of each part of a start, from the process's beginning; medians."""
    starts = list(_starts())
    return {name: round(median(each[name] for each in starts), 3) for name in starts[0]}


def _starts() -> Iterator[dict[str, float]]:
    environment = {"PATH": "/usr/bin:/bin", "MODEL_NAME": "flux-shapes"}
    for _ in range(STARTS):
        run = subprocess.run(
            [sys.executable, "-c", _START], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        yield json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
