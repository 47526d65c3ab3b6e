"""`python -m benchmarks.gpu`: plain diffusers, each step of the ladder, and our plan on smaller and smaller cards.

Models of full size with random weights are built on the spot (no download); all ways run in one process, one after
another, and each way's picture is compared with the plain one's. Without a card the same script runs flux-shapes, on
pretended cards of its size: that shows exactness, not speed. Writes results/gpu.json and results/gpu.png.

    python -m benchmarks.gpu                      # all models, all ways: about 20 minutes on an H100
    python -m benchmarks.gpu FLUX.1-schnell       # one model
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import diffusers
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.full_size import build, weigh_parts
from benchmarks.machine import machine
from src.catalog import Model, get_model
from src.engine import Engine
from src.engine.acceleration import accelerate
from src.engine.machine import measure
from src.engine.placed_pipeline import PlacedPipeline
from src.engine.quantization import Quantizer
from src.errors import InvalidSettings
from src.plan.plan import Plan, make_plan
from src.request.reading import read_request
from src.settings import ROOT, Settings
from src.weights.placement import GB, DoesNotFit, Machine, Placement, Work, choose_placement, flops, smallest

RESULTS = ROOT / "benchmarks" / "results"
MODELS = ("FLUX.1-dev", "FLUX.1-schnell", "FLUX.2-klein-4B")
STEPS = {"FLUX.1-dev": 28}  # as the published figures; others take their own
CAPS_GB = (24, 20, 18, 16)
DEV_GB = (7.8, 37.7)  # what FLUX.1-dev needs at least, and with everything resident (tests/test_placement.py)
PROMPT = "a red circle on a blue background"
TIMES = 3


@dataclass(frozen=True)
class Way:
    """One way to draw the same picture."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    cap: int | None = None  # gigabytes of the card
    steps: int | None = None  # fewer, where a whole picture would take minutes
    plain: bool = False  # diffusers alone, as the specification has it
    speed: str = "exact"


LADDER = (
    Way("plain diffusers", plain=True),
    Way("this worker, everything resident", {"compile": False, "attention_backend": "native", "memory_mode": "full"}),
    Way("+ attention by the card", {"compile": False, "memory_mode": "full"}),
    Way("+ compiled blocks", {"compile": True, "memory_mode": "full"}),
    Way("+ fp8", {"quantization": "fp8"}),
    Way("balanced", {"memory_mode": "full"}, speed="balanced"),
    Way("fast", {"memory_mode": "full"}, speed="fast"),
)
SMALLER = (
    *(Way(f"within {cap} GB", cap=cap) for cap in CAPS_GB),
    Way("adaptive norms ahead", {"memory_mode": "modulation_cache"}),
    Way("nf4", {"quantization": "nf4"}),
    Way("diffusers' model offload", {"memory_mode": "model_offload", "compile": False}),
    Way("diffusers' sequential offload", {"memory_mode": "sequential_offload", "compile": False}, steps=2),
)


def main(names: tuple[str, ...] = ()) -> None:
    on_card = torch.cuda.is_available()
    results: dict[str, Any] = {"machine": machine(), "full_size": on_card, "times": TIMES, "models": {}}
    for name in names or (MODELS if on_card else ("flux-shapes",)):
        results["models"][name] = run(name)
        (RESULTS / "gpu.json").write_text(json.dumps(results, indent=2) + "\n")  # what there is, should the rest fail
    plot(results["models"]).savefig(RESULTS / "gpu.png", dpi=80)
    print(json.dumps(results, indent=2))


def run(name: str) -> dict[str, Any]:
    """All ways of one model."""
    bench = Bench(name)
    ways = []
    for way in (*LADDER, *SMALLER):
        with as_new():
            ways.append({"way": way.name, **bench.draw(way)})
        print(name, ways[-1], file=sys.stderr, flush=True)
    return {"steps": bench.work.num_inference_steps, "floor_seconds": bench.floor, "ways": ways}


class Bench:
    """One model, and the picture that the plain way draws of it."""

    def __init__(self, name: str) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        found = get_model(name)
        self.model: Model = found
        steps = STEPS.get(name, found.num_inference_steps)
        self.work = Work(found.width, found.height, steps, found.max_sequence_length, found.width * found.height)
        parts = {name: part for name, part in self._build().components.items() if isinstance(part, torch.nn.Module)}
        self.weights = weigh_parts(parts, self.dtype)
        self.machine: Machine = measure(self.device, self.dtype)
        self.floor = steps * flops(self.weights, self.work) / self.machine.flops
        self.plain: np.ndarray[Any, Any] | None = None

    def draw(self, way: Way) -> dict[str, Any]:
        """Seconds, memory, and how far from the plain picture; or why there is none."""
        try:
            draw, placement = self._plain() if way.plain else self._ours(way)
        except (DoesNotFit, InvalidSettings) as error:
            return {"error": str(error)}
        steps = way.steps or self.work.num_inference_steps
        draw("warm-up", 2)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, picture = [], np.zeros(0)
        for i in range(1 if way.steps else TIMES):
            begun = time.perf_counter()
            picture = np.asarray(draw(f"{PROMPT} {i}", steps), float)  # a new prompt each time
            seconds.append(time.perf_counter() - begun)
        row: dict[str, Any] = {
            "seconds": round(median(seconds), 4),
            "seconds_per_step": round(median(seconds) / steps, 4),
            "peak_gb": round(torch.cuda.max_memory_allocated() / GB, 2) if self.device.type == "cuda" else None,
            "placement": placement.summary() if placement else None,
        }
        if way.plain:
            self.plain = picture
        if self.plain is not None and not way.steps:
            difference = np.abs(picture - self.plain)
            mean_square = float((difference**2).mean())
            row["max_difference"] = float(difference.max())
            row["psnr"] = round(10 * np.log10(255**2 / mean_square), 1) if mean_square else None
        return row

    def _plain(self) -> tuple[Callable[[str, int], Image.Image], None]:
        pipeline = self._build().to(self.device)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.enable_attention_slicing()
        pipeline.transformer.set_attention_backend("native")  # another way's stays on in diffusers

        def draw(prompt: str, steps: int) -> Image.Image:
            generator = torch.Generator("cpu").manual_seed(1)
            size = {"width": self.work.width, "height": self.work.height}
            with torch.inference_mode():
                result = pipeline(
                    prompt=prompt, **size, num_inference_steps=steps, guidance_scale=self.model.guidance_scale,
                    max_sequence_length=self.work.max_sequence_length, generator=generator,
                )  # fmt: skip
            picture: Image.Image = result.images[0]
            return picture

        return draw, None

    def _ours(self, way: Way) -> tuple[Callable[[str, int], Image.Image], Placement]:
        limit = {"memory_limit_gb": self._limit(way.cap)} if way.cap else {}
        settings = Settings(model_name=self.model.name, **way.settings, **limit)
        machine = measure(self.device, self.dtype, settings.memory_limit_gb)
        placement = choose_placement(self.weights, replace(machine, shared=False), self.work, settings.placement_mode)
        pipeline = self._build()
        if placement.quantization:
            Quantizer(placement.quantization, self.device).quantize(pipeline.transformer)
        placed_pipeline = PlacedPipeline(pipeline, placement, self.device)
        compiled = accelerate(pipeline, settings, self.device)
        engine = Engine(pipeline, self.model, None, placed_pipeline=placed_pipeline, compiled=compiled)

        def plan(prompt: str, steps: int) -> Plan:
            fields = {"prompt": prompt, "seed": 1, "num_inference_steps": steps, "speed": way.speed}
            request, faults, _ = read_request({"input": fields})
            return make_plan(request, faults, self.model, max_pixels=self.work.max_pixels)

        engine.warm_up(plan("warm-up", 2), 2)
        return lambda prompt, steps: engine.run(plan(prompt, steps)).pictures[0], placement

    def _limit(self, cap: int) -> float:
        """`cap` in gigabytes; without a card one that is as narrow for this model as `cap` is for FLUX.1-dev."""
        if self.device.type == "cuda":
            return cap
        apart = replace(self.machine, host_memory=1 << 50, shared=False)
        least, full = (smallest(self.weights, apart, self.work, mode) / GB for mode in ("auto", "full"))
        return least + (cap - DEV_GB[0]) / (DEV_GB[1] - DEV_GB[0]) * (full - least)

    def _build(self) -> Any:
        if self.model.name == "flux-shapes":
            return diffusers.FluxPipeline.from_pretrained(ROOT / self.model.repo, dtype=self.dtype)
        return build(self.model.name, self.dtype)


@contextmanager
def as_new() -> Iterator[None]:
    """Nothing of the last way is left: no weights, no cap, nothing compiled."""
    torch.compiler.set_stance("default")
    torch._dynamo.reset()
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)


def plot(models: Mapping[str, Any]) -> Figure:
    """Seconds of each way, the model's arithmetic floor as a line."""
    figure = Figure(figsize=(11, 1 + 4 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), squeeze=False)[:, 0]
    for axis, (name, found) in zip(axes, models.items(), strict=True):
        ways = [way for way in found["ways"] if "seconds" in way]
        seconds = [way["seconds_per_step"] * found["steps"] for way in ways]
        axis.barh([way["way"] for way in ways], seconds, color="#4878a8")
        axis.axvline(found["floor_seconds"], color="#c04040", label="arithmetic floor")
        axis.set(title=name, xlabel=f"seconds for a picture of {found['steps']} steps")
        axis.invert_yaxis()
        axis.legend()
    return figure


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
