"""Where the time of a step goes: products, attention, copies, all else, and a device that waits.

`python -m benchmarks.gpu --profile` profiles the same few steps as they are and compiled, in the worker's own loop. The
profiler itself takes time between kernels: what waits is at most so much.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_bench import Bench, as_new
from benchmarks.gpu_results import words
from benchmarks.gpu_ways import AS_SERVED, BY_THE_CARD, WAYS
from src.job import Progress

PROFILED = (BY_THE_CARD, AS_SERVED)
STEPS = 4  # those after a first one
_SHOWN = 12  # of the kernels that take the most time
# By names of CUDA's kernels, and of torch's operators where there is no card; the first that fits counts.
_KINDS = {
    "attention": r"flash|fmha|sdpa|attention",
    "products": r"gemm|nvjet|cutlass|matmul|addmm|\bmm\b|\bbmm\b|linear|conv",
    "copies": r"memcpy|memset|copy|clone|\bcat\b|CatArray",
}
_REST = "norms, gates, activations"


def keep(bench: Bench, file: Path, machine: Mapping[str, Any]) -> None:
    """Write the model's profiles into `file`, beside those of other models on this machine."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    models = found.get("models", {}) if found.get("machine") == dict(machine) else {}
    facts = bench.facts()
    models[bench.model.name] = {
        "floor_seconds_per_step": {
            kind: each and round(each / facts["steps"], 6) for kind, each in facts["floor_seconds"].items()
        },
        **dict(profiles(bench)),
    }
    whole = {"machine": dict(machine), "profiled_steps": STEPS, "models": models}
    file.write_text(json.dumps(whole, indent=2) + "\n")


def profiles(bench: Bench) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each way of PROFILED, and where its steps go; or its error."""
    for way in WAYS:
        if way.name in PROFILED:
            with as_new(bench.device):
                try:
                    yield way.name, steps(bench.prepare(way).draw, bench.device)
                except Exception as error:  # noqa: BLE001 - whatever the profiler of this machine raises
                    yield way.name, {"error": words(error)}


def steps(draw: Callable[..., object], device: torch.device) -> dict[str, Any]:
    """Seconds of a step, the share of each kind and of waiting, and the kernels that take the most."""
    on_card = device.type == "cuda"
    settle: Callable[[], object] = torch.cuda.synchronize if on_card else lambda: None
    profiler = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_card])
    at: list[float] = []

    def watch(progress: Progress) -> None:
        if not at and progress.step == 1:
            settle()
            profiler.start()
            at.append(time.perf_counter())
        elif len(at) == 1 and progress.step == progress.steps:
            settle()
            at.append(time.perf_counter())
            profiler.stop()

    draw("profiled", 1 + STEPS)
    draw("profiled", 1 + STEPS, watch)
    wall = at[1] - at[0]
    spent, calls = Counter[str](), Counter[str]()
    under_way = []
    events: Any = profiler.events()  # type: ignore[no-untyped-call]
    for event in events or ():
        times = event.time_range
        is_label = getattr(event, "is_user_annotation", False)  # around kernels that are events of their own
        if is_label or on_card != (event.device_type.name == "CUDA"):
            continue
        spent[event.name] += (times.elapsed_us() if on_card else event.self_cpu_time_total) / 1e6
        calls[event.name] += 1
        under_way.append((times.start, times.end))
    busy = union(under_way) / 1e6 if on_card else sum(spent.values())
    kinds = Counter[str]()
    for name, seconds in spent.items():
        kinds[kind_of(name)] += seconds
    largest = [
        {
            "name": name[:100],
            "kind": kind_of(name),
            "ms": round(1000 * seconds / STEPS, 4),
            "calls": calls[name] / STEPS,
        }
        for name, seconds in spent.most_common(_SHOWN)
    ]
    return {
        "seconds_per_step": round(wall / STEPS, 6),
        "share": {kind: round(seconds / wall, 4) for kind, seconds in kinds.most_common()}
        | {"waiting": round(max(1 - busy / wall, 0), 4)},
        "largest": largest,  # milliseconds and calls are a step's
    }


def kind_of(kernel: str) -> str:
    """The row of _KINDS that a kernel's or an operator's name fits."""
    return next((kind for kind, names in _KINDS.items() if re.search(names, kernel, re.IGNORECASE)), _REST)


def union(ranges: Iterable[tuple[float, float]]) -> float:
    """How long at least one of `ranges` was under way: kernels and copies of several streams overlap."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(end - max(start, until), 0)
        until = max(until, end)
    return total
