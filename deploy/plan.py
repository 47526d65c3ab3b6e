"""What a model takes on a card: memory, seconds, dollars, disk. Pure arithmetic on the catalog and the placement."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from deploy.cards import Card
from src.catalog import MEMORY_MODES, UPSAMPLER_GB, Model, get_model
from src.settings import ROOT, Settings
from src.weights.placement import GB, DoesNotFit, Network, Placement, Weights, Work, choose_placement

WEIGHTS = Path(__file__).parent / "weights.json"  # made by `python -m benchmarks.full_size`
MEASURED = ROOT / "benchmarks" / "results" / "gpu.json"
_AS_SERVED = "+ compiled blocks"  # the way of benchmarks/gpu.py that a worker takes by itself

_BUDGET = ROOT / "scripts" / "image-budget.json"  # megabytes that each image may have, unpacked
_ROOM_GB = 10  # ControlNets and Redux (7 GB at most at a time), compiled blocks, logs
_DISK_STEP_GB = 5

_LEAST_SECONDS = 0.1  # with less, what takes the time is not what the cost model counts
_EXECUTION_SECONDS = 600  # RunPod's own default
_PICTURES, _SLACK = 4, 2  # a request's most pictures, and how much slower than modelled they may be
_INIT_SECONDS = 420  # RunPod's own default: longer, and a worker is unhealthy
_DOWNLOAD_RATE = 25e6  # bytes a second that a start may count on; an allowance, which nobody measured


@dataclass(frozen=True)
class Estimate:
    """One picture of a model's own size and steps on one card."""

    model: Model
    card: Card
    placement: Placement
    seconds: float
    measured: bool  # by benchmarks/gpu.py on such a card, or else modelled by the placement's cost model

    @property
    def exact(self) -> bool:
        """Whether the picture has the bytes that it would have with everything resident."""
        return self.placement.quantization is None

    @property
    def is_meaningful(self) -> bool:
        """Whether `seconds` and `dollars` say something: they do not where the model is too small to be modelled."""
        return self.measured or self.seconds >= _LEAST_SECONDS

    @property
    def dollars(self) -> float:
        """Of a thousand pictures, one after another on a warm worker."""
        return 1000 * self.seconds * self.card.dollars

    @property
    def source(self) -> str:
        """Where `seconds` comes from."""
        return "measured" if self.measured else "modelled"


def estimate(model: Model, card: Card, settings: Settings) -> Estimate:
    """What `settings` make of `model` on `card`, ControlNets aside.

    Raises DoesNotFit with what is needed and what may be chosen instead.
    """
    work = Work(
        model.width, model.height, model.num_inference_steps, model.max_sequence_length, settings.max_pixels,
        settings.batch_size, usual_tokens=model.usual_tokens,
    )  # fmt: skip
    machine, limit = card.machine, settings.memory_limit_gb
    machine = replace(machine, memory=min(machine.memory, int(limit * GB))) if limit else machine
    placement = choose_placement(weights_of(model), machine, work, settings.placement_mode)
    measured = measured_seconds(model, card) if placement.mode == "full" else None
    return Estimate(model, card, placement, measured or placement.seconds(work), measured=measured is not None)


def nearest(model: Model, card: Card, settings: Settings) -> Estimate | None:
    """The same in the first memory mode that fits, exact ones first; None where none does."""
    modes = sorted(MEMORY_MODES, key=lambda mode: MEMORY_MODES[mode].quantization is not None)
    for mode in modes:
        try:
            return estimate(model, card, settings.model_copy(update={"memory_mode": mode, "quantization": "none"}))
        except DoesNotFit:
            continue
    return None


def image_gb() -> float:
    """Gigabytes of the image with CUDA's libraries, at most."""
    return float(json.loads(_BUDGET.read_text())["cuda"]["image"]) / 1000


def weights_gb(model: Model, settings: Settings) -> float:
    """Gigabytes that a start downloads: the model, and a prompt upsampler as large as the published one."""
    return model.download_gb + (UPSAMPLER_GB if settings.prompt_upsampler else 0)


def disk_gb(models: Iterable[Model], settings: Settings, *, on_a_volume: bool = False) -> int:
    """Gigabytes of container disk for the image, the largest of `models`, adapters and what else is downloaded.

    Weights and adapters are `on_a_volume` where there is one.
    """
    kept = 0 if on_a_volume else max(weights_gb(model, settings) for model in models) + settings.lora_cache_gb
    return _disk(image_gb() + kept + _ROOM_GB)


def volume_gb(found: Estimate, settings: Settings) -> int:
    """Gigabytes of network volume for the weights, a quantized copy of them, adapters and what is compiled."""
    copy = 0 if found.exact else found.model.download_gb / 2  # fp8's, the larger kind
    return _disk(weights_gb(found.model, settings) + copy + settings.lora_cache_gb + _ROOM_GB)


def _disk(gigabytes: float) -> int:
    return _DISK_STEP_GB * math.ceil(round(gigabytes, 3) / _DISK_STEP_GB)


def execution_seconds(seconds: float) -> int:
    """A job's time-out, in whole minutes, where one picture takes `seconds`."""
    return max(_EXECUTION_SECONDS, _minutes(_PICTURES * _SLACK * seconds))


def init_seconds(models: Iterable[Model], settings: Settings) -> int:
    """RUNPOD_INIT_TIMEOUT: a start's time-out, in whole minutes, the largest download included."""
    return _minutes(_INIT_SECONDS + max(weights_gb(model, settings) for model in models) * 1e9 / _DOWNLOAD_RATE)


def two_digits(number: float) -> str:
    """As exact as a modelled figure is."""
    return f"{float(f'{number:.2g}'):g}"


def _minutes(seconds: float) -> int:
    return 60 * math.ceil(seconds / 60)


def weights_of(model: Model) -> Weights:
    """The sizes of its layers; models of one architecture and as many gigabytes have the same."""
    sizes = _sizes()
    alike = [name for name in sizes if _shape(get_model(name)) == _shape(model)]
    return _weights(sizes[model.name if model.name in sizes else alike[0]])


def _shape(model: Model) -> tuple[str, float]:
    return model.architecture, model.download_gb


@cache
def _sizes() -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads(WEIGHTS.read_text())
    return found


def _weights(sizes: Mapping[str, Any]) -> Weights:
    networks = {
        name: Network(part["blocks"], part["modulation"], part["outside"], part["kinds"])
        for name, part in sizes["networks"].items()
    }
    return Weights(networks, sizes["itemsize"], sizes["width"], sizes["channels"])


def measured_seconds(model: Model, card: Card, results: Path = MEASURED) -> float | None:
    """Seconds of one picture that benchmarks/gpu.py took on such a card, for as many steps as the model's own.

    None where nobody measured it, or where its blocks did not run compiled as a worker's do.
    """
    found = json.loads(results.read_text())
    if not found["full_size"] or found["machine"]["card"] not in card.types:
        return None
    ways = found["models"].get(model.name, {"ways": ()})["ways"]
    rows = [row for row in ways if row["way"] == _AS_SERVED and "seconds_per_step" in row and "fell_back" not in row]
    return rows[0]["seconds_per_step"] * model.num_inference_steps if rows else None
