"""One model of full size with random weights, made on the spot, and every way to draw with it.

The weights stay in the host's memory; each way gets a pipeline of its own that shares them until it moves them.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile

from benchmarks.full_size import build, weigh_parts
from benchmarks.gpu_results import Row
from benchmarks.gpu_ways import LeftOut, Way
from deploy.cards import CARDS
from src.catalog import PROFILES, get_model
from src.engine import Engine
from src.engine.acceleration import Compiled, accelerate, attention_of
from src.engine.machine import context_memory, measure
from src.engine.placed_pipeline import PlacedPipeline
from src.engine.quantization import Quantizer
from src.job import OnProgress
from src.plan.plan import Plan, make_plan
from src.request.adapters import Adapter
from src.request.reading import read_request
from src.request.schema import Lora
from src.settings import ROOT, Settings
from src.weights.ledger import PlacementChoice
from src.weights.placement import (
    GB,
    Machine,
    Placement,
    Weights,
    Work,
    block_of,
    choose_placement,
    flops,
    is_modulation,
    smallest,
)

MODELS = ("FLUX.1-dev", "FLUX.1-schnell", "FLUX.2-klein-4B")
SHIPPED = "flux-shapes"
STEPS = {"FLUX.1-dev": 28}  # as the published figures; others take their own
PROMPT = "a red circle on a blue background"
MOST_PICTURES, ENOUGH_SECONDS = 3, 8.0  # of each way: so many, or as many as take so long
# What FLUX.1-dev needs at least, and with everything resident, in gigabytes (tests/test_placement.py).
_DEV_GB = (7.8, 37.7)
_SIDE = {"cpu": 512, "cuda": 8192}  # of the matrices whose product is the floor's measure
_WARM_UP, _PRODUCTS = 20, 10
_FP8 = 2  # products in 8 bits are twice as fast: https://resources.nvidia.com/en-us-tensor-core, from Ada on

Draw = Callable[..., Image.Image]  # of a prompt and a number of steps


@dataclass(frozen=True)
class Drawing:
    """A way that is ready to draw."""

    draw: Draw
    pipeline: Any
    placement: Placement | None = None
    compiled: Compiled | None = None


class Bench:
    """`name` is a row of the catalog: of full size on a card; flux-shapes is read as it is shipped."""

    def __init__(self, name: str) -> None:
        for library in (diffusers, transformers):  # or their bars and warnings hide the rows
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = get_model(name)
        found = self.model
        steps = STEPS.get(name, found.num_inference_steps)
        self.work = Work(found.width, found.height, steps, found.max_sequence_length, found.width * found.height)
        self._pipeline = self._build()
        networks = {name: part for name, part in self._pipeline.components.items() if isinstance(part, torch.nn.Module)}
        self.weights = weigh_parts(networks, self.dtype)
        self._folder = tempfile.TemporaryDirectory()
        self._first: dict[str, np.ndarray[Any, Any]] = {}  # each way's picture of the first prompt

    # ---- what holds for all ways

    def facts(self) -> dict[str, Any]:
        """Steps of a picture, and the seconds that its products and attention take at least."""
        product, steps = _product_rate(self.device, self.dtype), self.work.num_inference_steps
        work, attention = flops(self.weights, self.work), flops(_without_blocks(self.weights), self.work)
        peak = published_rate(torch.cuda.get_device_name()) if self.device.type == "cuda" else None
        return {
            "steps": steps,
            "floor_seconds": {  # by a warm product of this machine, and by its maker's figures
                "product": _rounded(steps * work / product),
                "published": _rounded(steps * work / peak) if peak else None,
                "published_fp8": _rounded(steps * ((work - attention) / _FP8 + attention) / peak) if peak else None,
            },
            "product_tflops": round(product / 1e12, 3),
            "published_tflops": round(peak / 1e12) if peak else None,
        }

    def works(self) -> bool:
        """Whether the device still computes; after some faults it does not until the process is replaced."""
        try:
            return bool((torch.ones(1, device=self.device) + 1 == 2).all())
        except RuntimeError:
            return False

    # ---- one way

    def measure(self, way: Way) -> Row:
        """Seconds, memory, what ran compiled, and how far from the plain picture.

        Raises LeftOut, and whatever a way that fails raises.
        """
        self._check(way)
        with as_new(self.device):
            drawing = self.prepare(way)
            drawing.draw("warm-up", 2)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            steps = way.steps or self.work.num_inference_steps
            seconds: list[float] = []
            while len(seconds) < MOST_PICTURES and sum(seconds) < ENOUGH_SECONDS and not (way.steps and seconds):
                begun = time.perf_counter()
                picture = drawing.draw(f"{PROMPT} {len(seconds)}", steps)  # a new prompt each time
                seconds.append(time.perf_counter() - begun)
                if not way.steps:
                    self._first.setdefault(way.name, np.asarray(picture, float))
            return {
                "way": way.name,
                "seconds": _rounded(median(seconds)),
                "seconds_per_step": _rounded(median(seconds) / steps),
                "pictures": len(seconds),
                "steps": steps,
                **self._memory(drawing.placement),
                **self._ran(way, drawing),
                **self._exactness(way),
                "placement": drawing.placement.summary() if drawing.placement else None,
            }

    def prepare(self, way: Way) -> Drawing:
        """A pipeline of its own that draws this way, compiled and warm."""
        return self._of_diffusers(way) if way.diffusers else self._ours(way)

    def _check(self, way: Way) -> None:
        Settings(quantization=way.settings.get("quantization", "none")).add_packages()
        if missing := [package for package in way.wants if find_spec(package) is None]:
            raise LeftOut(f"it wants {' and '.join(missing)}, which this machine does not have")
        if unknown := [name for name in way.settings if name not in Settings.model_fields]:
            raise LeftOut(f"this version of the worker has no setting {' or '.join(name.upper() for name in unknown)}")
        if way.diffusers not in (None, "plain") and self.device.type != "cuda":
            raise LeftOut("its streams want a card")

    def _of_diffusers(self, way: Way) -> Drawing:
        pipeline = self._copy()
        pipeline.set_progress_bar_config(disable=True)
        pipeline.transformer.set_attention_backend("native")  # another way's stays on in diffusers
        if way.diffusers == "plain":
            pipeline.to(self.device)
            pipeline.enable_attention_slicing()  # as the specification has it
        else:
            blocks = {"num_blocks_per_group": 1} if way.diffusers == "block_level" else {}
            pipeline.enable_group_offload(
                self.device, offload_type=way.diffusers, use_stream=True, record_stream=True, **blocks
            )

        def draw(prompt: str, steps: int) -> Image.Image:
            with torch.inference_mode():
                result = pipeline(
                    prompt=prompt,
                    width=self.work.width,
                    height=self.work.height,
                    num_inference_steps=steps,
                    guidance_scale=self.model.guidance_scale,
                    max_sequence_length=self.work.max_sequence_length,
                    generator=torch.Generator("cpu").manual_seed(1),
                )
            picture: Image.Image = result.images[0]
            return picture

        return Drawing(draw, pipeline)

    def _ours(self, way: Way) -> Drawing:
        folder = Path(self._folder.name)
        limit = {"memory_limit_gb": self._limit(way.cap)} if way.cap else {}
        settings = Settings(
            model_name=self.model.name, compile_cache_dir=folder / "compiled", **{**way.settings, **limit}
        )
        machine = replace(measure(self.device, self.dtype, settings.memory_limit_gb), shared=False)
        choice = PlacementChoice(self.weights, machine, self.work, settings.placement_mode)
        placement = choose_placement(self.weights, machine, self.work, settings.placement_mode)
        pipeline = self._copy()
        if placement.quantization:
            Quantizer(placement.quantization, self.device).quantize(pipeline.transformer)
        placed_pipeline = PlacedPipeline(pipeline, placement, self.device)
        compiled = accelerate(pipeline, settings, self.device, modulation_cache=placement.modulation_cache)
        engine = Engine(
            pipeline,
            self.model,
            None,
            settings=settings,
            placed_pipeline=placed_pipeline,
            compiled=compiled,
            choice=choice,
        )
        adapters = self._adapters(way)

        def plan(prompt: str, steps: int, adapters: tuple[Adapter, ...] = ()) -> Plan:
            fields = {"prompt": prompt, "seed": 1, "num_inference_steps": steps}
            fields |= {"speed": way.speed} if way.speed else {}
            request, faults, _ = read_request({"input": fields})
            return make_plan(
                request,
                faults,
                self.model,
                adapters=adapters,
                max_pixels=self.work.max_pixels,
                speed=PROFILES[settings.profile].speed,
            )

        def draw(prompt: str, steps: int, on_progress: OnProgress | None = None) -> Image.Image:
            return engine.run(plan(prompt, steps, adapters), on_progress).pictures[0]

        engine.warm_up(plan("warm-up", 2), 2)  # as a worker does, which knows no adapters then
        return Drawing(draw, pipeline, placement, compiled)

    def _adapters(self, way: Way) -> tuple[Adapter, ...]:
        """LoRAs of random numbers for every linear of the blocks but the adaptive norms', in diffusers' names."""
        found = []
        for place, rank in enumerate(way.adapters):
            file = Path(self._folder.name) / f"{place}-{rank}.safetensors"
            if not file.is_file():
                torch.manual_seed(place)
                save_file(dict(self._random_lora(rank)), file)
            found.append(Adapter(file.stem, file, Lora(path=str(file), scale=0.5), "loras"))
        return tuple(found)

    def _random_lora(self, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
        for name, layer in self._pipeline.transformer.named_modules():
            if isinstance(layer, torch.nn.Linear) and block_of(name) is not None and not is_modulation(name):
                shapes = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}
                for kind, shape in shapes.items():
                    drawn = 0.02 * torch.randn(shape, device=self.device)
                    yield f"transformer.{name}.{kind}.weight", drawn.to("cpu", self.dtype)

    def _memory(self, placement: Placement | None) -> Row:
        """Gigabytes at the peak, the context among them, beside what the placement expects."""
        on_card = self.device.type == "cuda"
        context = context_memory(self.device) if on_card else 0
        return {
            "peak_gb": _gb(torch.cuda.max_memory_allocated() + context) if on_card else None,
            "context_gb": _gb(context) if on_card else None,
            "predicted_peak_gb": _gb(placement.peak + context) if placement else None,
            "predicted_seconds_per_step": _rounded(placement.step_seconds) if placement else None,
        }

    def _ran(self, way: Way, drawing: Drawing) -> Row:
        """The attention kernel in use; how many calls of blocks ran compiled, and why not all where that was asked."""
        row: Row = {"attention": attention_of(drawing.pipeline.transformer)}
        if drawing.compiled is not None or way.compiled:
            calls, compiled = block_calls(drawing.pipeline.transformer, lambda: drawing.draw("counted", 2))
            row |= {"block_calls": calls, "compiled_calls": compiled}
            if compiled < calls:
                state = getattr(drawing.compiled, "state", None)
                row["fell_back"] = f"{calls - compiled} of {calls} calls of blocks ran eager" + (
                    f" ({state})" if state else ""
                )
        return row

    def _exactness(self, way: Way) -> Row:
        """How far the first picture is from that of the way that it is held against."""
        picture, expected = self._first.get(way.name), self._first.get(way.against or "")
        if picture is None or expected is None:
            return {}
        difference = picture - expected
        mean_square = float((difference**2).mean())
        return {
            "max_difference": float(np.abs(difference).max()),
            "psnr": round(float(10 * np.log10(255**2 / mean_square)), 1) if mean_square else None,
        }

    def _limit(self, cap: int) -> float:
        """`cap` in gigabytes; without a card one that is as narrow for this model as `cap` is for FLUX.1-dev."""
        if self.device.type == "cuda":
            return cap
        machine = Machine("any", 1 << 50, 1 << 50, 1.0, 1.0)
        least, full = (smallest(self.weights, machine, self.work, mode) / GB for mode in ("auto", "full"))
        return least + (cap - _DEV_GB[0]) / (_DEV_GB[1] - _DEV_GB[0]) * (full - least)

    def _build(self) -> Any:
        if self.model.name == SHIPPED:
            return diffusers.FluxPipeline.from_pretrained(ROOT / self.model.repo, dtype=self.dtype)
        return build(self.model.name, self.dtype)

    def _copy(self) -> Any:
        """A pipeline with networks of its own, whose weights are these until they are moved or replaced."""
        shared: dict[int, Any] = {}
        for part in self._pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                for weight in part.parameters():
                    shared[id(weight)] = torch.nn.Parameter(weight.data, requires_grad=False)
            elif part is not self._pipeline.scheduler:
                shared[id(part)] = part
        return copy.deepcopy(self._pipeline, shared)


def published_rate(card: str) -> float | None:
    """Operations a second of bfloat16 products on the card of this name, by its maker; None where none is known."""
    return next((row.tflops * 1e12 for row in CARDS if row.types[0] == card), None)


def block_calls(transformer: Any, draw: Callable[[], object]) -> tuple[int, int]:
    """How often blocks are called while `draw` is at work, and how often one of torch's compiled graphs is run."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    hooks = [block.register_forward_pre_hook(count) for block in blocks]
    try:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            draw()
    finally:
        for hook in hooks:
            hook.remove()
    # https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/convert_frame.py: each graph's events have this name
    return calls, sum(event.name.startswith("Torch-Compiled Region") for event in seen.events() or ())


@contextmanager
def as_new(device: torch.device) -> Iterator[None]:
    """Nothing of the last way is left: no weights, no cap, nothing compiled.

    Without a card blocks are traced and then run as they are: a compiler takes minutes, and shows nothing of a card.
    """
    torch.compiler.set_stance("default")
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # diffusers' group offload pins a model whole, rounded up to powers of two
        yield
        return
    own = torch.compile
    torch.compile = lambda *what, **options: own(*what, **{**options, "backend": "eager"})
    try:
        yield
    finally:
        torch.compile = own


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large product of matrices on a device that is warm."""
    side = _SIDE[device.type]
    matrix = torch.randn(side, side, dtype=dtype, device=device)  # zeros are multiplied faster
    settle: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(_WARM_UP):
        matrix @ matrix
    settle()
    begun = time.perf_counter()
    for _ in range(_PRODUCTS):
        matrix @ matrix
    settle()
    return _PRODUCTS * 2 * side**3 / (time.perf_counter() - begun)


def _without_blocks(weights: Weights) -> Weights:
    """Of the same shape, and nothing to multiply with: attention alone is left."""
    transformer = weights.transformer
    blocks = dict.fromkeys(transformer.blocks, 0)
    return replace(weights, networks={**weights.networks, "transformer": replace(transformer, blocks=blocks)})


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.4g}")


def _gb(size: float) -> float:
    return round(size / GB, 3 if size < GB / 10 else 2)
