"""Several workers on one endpoint: who gets the jobs, how long all of them take, how long one waits.

Part of `python -m benchmarks.serving --workers 3`: this worker, the same with PREFETCH_JOBS=2, and the plain
synchronous handler, each as so many processes with the real SDK under the stand-in of tests/, whose requests take 50 ms
each way. A job sleeps on the device for as many seconds as its pattern says.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tests.runpod_stand_in import JobRecord, StandIn, worker

WAYS = {"this worker": {}, "PREFETCH_JOBS=2": {"PREFETCH_JOBS": "2"}, "plain handler": {}}
_WAY_SECONDS = 0.05
_STEP_SECONDS = 0.05
_Jobs = list[tuple[float, float]]  # when each is sent, and how long it has the device, in seconds


def _bursts() -> _Jobs:
    return [(14.0 * burst, 3.75) for burst in range(3) for _ in range(6)]


def _random(lengths: tuple[float, ...], load: float, seconds: float, workers: int = 3) -> _Jobs:
    """Arrivals that know nothing of each other, and keep so many workers busy for this share of the time."""
    rng, at, jobs = random.Random(1), 0.0, _Jobs()
    mean = sum(lengths) / len(lengths)
    while (at := at + rng.expovariate(workers * load / mean)) < seconds:
        jobs.append((at, rng.choice(lengths)))
    return jobs


def _mixed() -> _Jobs:
    rng = random.Random(2)
    return [(0.0, rng.choice((0.3, 1.0, 3.75))) for _ in range(40)]


PATTERNS: dict[str, Callable[[], _Jobs]] = {
    "short": lambda: [(0.0, 0.3)] * 150,
    "long": lambda: [(0.0, 3.75)] * 12,
    "mixed": _mixed,
    "bursts": _bursts,
    "random": lambda: _random((0.3, 1.0, 3.75), 0.7, 40),
    "tail": lambda: [(0.0, 0.5)] * 30 + [(0.0, 5.0)] * 2,
}


def fleet(workers: int) -> list[dict[str, Any]]:
    """One row a way and pattern: makespan and 95th percentile in seconds, jobs of each worker, device busy."""
    return [row for way in WAYS for row in _way(way, workers)]


def _way(way: str, workers: int) -> list[dict[str, Any]]:
    stand_in = StandIn(max_body=50_000_000, way_seconds=_WAY_SECONDS)
    rows = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        turns = [Path(folder) / f"turns-{i}" for i in range(workers)]
        for i, file in enumerate(turns):
            command = (
                "-m",
                "benchmarks.serving_worker",
                "plain" if way == "plain handler" else "ours",
                str(8 * _STEP_SECONDS),
                str(file),
            )
            environment = {"RUNPOD_POD_ID": f"worker-{i}", **WAYS[way]}
            processes.enter_context(worker(stand_in, Path(folder) / f"log-{i}", *command, **environment))
        _ready(stand_in, workers)
        for pattern, jobs in PATTERNS.items():
            for file in turns:
                file.write_text("")
            began = time.time()
            done = _send(stand_in, jobs())
            rows.append({"way": way, "pattern": pattern, **_measured(done, began, turns, workers)})
            print(json.dumps(rows[-1]))
    stand_in.close()
    return rows


def _ready(stand_in: StandIn, workers: int) -> None:
    """Until each worker has answered a job."""
    while len({job.workers[-1] for job in stand_in.jobs.values() if job.results}) < workers:
        stand_in.wait(*[_submit(stand_in, 0.5) for _ in range(2 * workers)])


def _submit(stand_in: StandIn, seconds: float) -> str:
    return stand_in.submit(prompt="a red circle", seed=1, num_inference_steps=round(seconds / _STEP_SECONDS))


def _send(stand_in: StandIn, jobs: _Jobs) -> list[tuple[float, JobRecord]]:
    """The jobs, each with when it was sent, once all are done."""
    began, sent = time.time(), []
    for at, seconds in sorted(jobs, key=lambda job: job[0]):
        time.sleep(max(0.0, began + at - time.time()))
        sent.append((time.time(), _submit(stand_in, seconds)))
    records = stand_in.wait(*[id for _, id in sent], seconds=600)
    assert all(job.status == "COMPLETED" for job in records)
    return [(at, job) for (at, _), job in zip(sent, records, strict=True)]


def _measured(done: list[tuple[float, JobRecord]], began: float, turns: list[Path], workers: int) -> dict[str, Any]:
    ends = [job.results[0][0] for _, job in done]
    waits = sorted(end - at for end, (at, _) in zip(ends, done, strict=True))
    busy = [json.loads(line) for file in turns for line in file.read_text().splitlines()]
    span = max(turn["ended"] for turn in busy) - min(turn["began"] for turn in busy)
    share = Counter(job.workers[-1] for _, job in done)
    return {
        "jobs": len(done),
        "makespan_seconds": round(max(ends) - began, 1),
        "p95_seconds": round(waits[math.ceil(0.95 * len(waits)) - 1], 1),
        "jobs_by_worker": sorted((share[f"worker-{i}"] for i in range(workers)), reverse=True),
        "busy_percent": round(100 * sum(turn["ended"] - turn["began"] for turn in busy) / span / workers, 1),
    }


def plot(rows: list[dict[str, Any]]) -> Figure:
    """Makespan and 95th percentile of each pattern, beside the plain handler's."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    colours = ("tab:green", "tab:olive", "tab:gray")
    for axes, (key, title) in zip(
        figure.subplots(1, 2),
        (("makespan_seconds", "all jobs done after, s"), ("p95_seconds", "95 % of the jobs done within, s")),
        strict=True,
    ):
        for number, (way, colour) in enumerate(zip(WAYS, colours, strict=True)):
            values = [next(r[key] for r in rows if (r["way"], r["pattern"]) == (way, p)) for p in PATTERNS]
            places = [i + 0.28 * (number - 1) for i in range(len(PATTERNS))]
            bars = axes.bar(places, values, 0.26, color=colour, label=way if key == "makespan_seconds" else None)
            axes.bar_label(bars, fmt="%.0f", fontsize=7)
        axes.set_xticks(range(len(PATTERNS)), list(PATTERNS))
        axes.set_title(title)
    figure.legend(loc="outside upper center", ncols=len(WAYS))
    return figure
