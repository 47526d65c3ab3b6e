"""`python -m benchmarks.serving`: this worker's loop beside the plain synchronous handler, in one run.

Both are processes with the real SDK under the stand-in of tests/. Measured: how busy the device is kept, jobs per
second, how long a job is in hand, what is lost when requests fail, how fast four large pictures become a response, and
how long a worker takes from its start to its first result. Writes results/serving.json and results/serving.png.

With `--workers 3` instead how jobs are spread over so many workers of one endpoint: benchmarks/fleet.py.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import fleet
from benchmarks.machine import machine
from benchmarks.photographs import photographs
from src.catalog import get_model
from src.job import Job
from src.outputs import Generation
from src.plan.plan import make_plan
from src.request.reading import read_request
from src.response.delivery import deliver
from tests.runpod_stand_in import Faults, StandIn, worker

RESULTS = Path(__file__).parent / "results"
WAYS = ("plain", "ours")
JOBS = {0.1: 60, 0.3: 60, 1.0: 25, 3.0: 8, 0.0: 60}  # seconds on the device: jobs; 0 is the shipped model
FAULT_RATES = (0.05, 0.2, 0.5)
STARTS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1, help="above 1: how jobs are spread over them")
    workers = parser.parse_args().workers
    if workers > 1:
        rows = fleet.fleet(workers)
        results = {"machine": machine(), "workers": workers, "rows": rows}
        (RESULTS / "fleet.json").write_text(json.dumps(results, indent=2) + "\n")
        fleet.plot(rows).savefig(RESULTS / "fleet.png", dpi=80)
    else:
        measure()


def measure() -> None:
    """One worker."""
    results: dict[str, Any] = {
        "machine": machine(),
        "device": [{"seconds": s, "way": way, **loop(way, s, n)} for s, n in JOBS.items() for way in WAYS],
        "lost": [{"fault_rate": rate, "way": way, **lost(way, rate)} for rate in FAULT_RATES for way in WAYS],
        "assembly": assembly(),
        "start": start(),
    }
    (RESULTS / "serving.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results["device"]).savefig(RESULTS / "serving.png", dpi=80)
    print(json.dumps(results, indent=2))


def loop(way: str, seconds: float, count: int) -> dict[str, Any]:
    """`count` jobs that wait at RunPod when the worker comes."""
    with tempfile.TemporaryDirectory() as folder:
        turns_file = Path(folder) / "turns"
        stand_in = StandIn(max_body=50_000_000)
        ids = [stand_in.submit(prompt="a red circle", seed=i) for i in range(count)]
        with worker(stand_in, Path(folder) / "log", *_command(way, seconds, turns_file)):
            jobs = stand_in.wait(*ids, seconds=600)
        stand_in.close()
        turns = [json.loads(line) for line in turns_file.read_text().splitlines()][-count:]
    assert all(job.status == "COMPLETED" for job in jobs)
    assert all(one["ended"] <= other["began"] for one, other in itertools.pairwise(turns)), "two at once"
    span = turns[-1]["ended"] - turns[0]["began"]
    return {
        "jobs": count,
        "busy_percent": round(100 * sum(turn["ended"] - turn["began"] for turn in turns) / span, 1),
        "jobs_per_second": round(count / span, 2),
        "median_seconds_in_hand": round(statistics.median(job.results[0][0] - job.taken[0] for job in jobs), 2),
        "most_in_hand": stand_in.most_in_hand,
    }


def lost(way: str, rate: float, count: int = 40) -> dict[str, Any]:
    """Jobs without any result when `rate` of all requests fail, however often in a row."""
    with tempfile.TemporaryDirectory() as folder:
        stand_in = StandIn(Faults(rate, ("429", "500", "drop"), in_a_row=1_000, seed=3), max_body=50_000_000)
        ids = [stand_in.submit(prompt="a red circle", seed=i) for i in range(count)]
        command = _command(way, 0.02, Path(folder) / "turns")
        with worker(stand_in, Path(folder) / "log", *command, RUNPOD_POD_ID="worker") as process:
            deadline = time.monotonic() + 240
            while time.monotonic() < deadline and not all(stand_in.jobs[id].results for id in ids):
                log = process.text()
                if all(stand_in.jobs[id].results or _given_up(log, id) for id in ids):
                    break
                time.sleep(0.2)
        stand_in.close()
    results = [len(stand_in.jobs[id].results) for id in ids]
    return {"jobs": count, "lost": results.count(0), "twice": sum(n > 1 for n in results)}


def _given_up(log: str, id: str) -> bool:
    return any(id in line and "Failed to return job results" in line for line in log.splitlines())


def _command(way: str, seconds: float, log: Path) -> tuple[str, ...]:
    return ("-m", "benchmarks.serving_worker", way, str(seconds), str(log))


def assembly(repeats: int = 5) -> dict[str, Any]:
    """Four photographs of 1024x1024 into a response: Pillow's PNG one after another, and deliver()."""
    pictures = photographs(4, 1024)
    model = get_model("flux-shapes")
    fields = {"prompt": "x", "seed": 1, "num_images": 4, "width": 1024, "height": 1024}
    request, faults, _ = read_request({"input": fields})
    plan = make_plan(request, faults, model, max_pixels=2048 * 2048)
    generation = Generation(tuple(pictures), "euler", {}, (), None)

    def plain() -> list[str]:
        texts = []
        for picture in pictures:
            file = io.BytesIO()
            picture.save(file, "PNG")
            texts.append(base64.b64encode(file.getvalue()).decode())
        return texts

    def ours() -> list[str]:
        response = deliver(generation, plan, model, None, job=Job(), max_bytes=50_000_000)
        return list(response["images"])

    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    megabytes: dict[str, float] = {}
    for _ in range(repeats):
        for way, make in (("plain", plain), ("ours", ours)):
            began = time.perf_counter()
            texts = make()
            seconds[way].append(time.perf_counter() - began)
            megabytes[way] = round(sum(map(len, texts)) / 1e6, 2)
            for text, picture in zip(texts, pictures, strict=True):
                file = Image.open(io.BytesIO(base64.b64decode(text)))
                assert np.array_equal(np.asarray(file), np.asarray(picture)), "other pixels"
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "seconds": {way: round(value, 4) for way, value in medians.items()},
        "megabytes_of_base64": megabytes,
        "times_faster": round(medians["plain"] / medians["ours"], 1),
        "repeats": repeats,
    }


def start() -> dict[str, Any]:
    """Seconds from a process's start to its first result, on the shipped model."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(STARTS):
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                stand_in = StandIn()
                id = stand_in.submit(prompt="a red circle", seed=1)
                began = time.time()
                with worker(stand_in, Path(folder) / "log", *_command(way, 0, Path(folder) / "turns")):
                    (job,) = stand_in.wait(id)
                    seconds[way].append(job.results[0][0] - began)
                stand_in.close()
    return {
        "median_seconds": {way: round(statistics.median(values), 2) for way, values in seconds.items()},
        "all_seconds": {way: [round(value, 2) for value in values] for way, values in seconds.items()},
    }


def plot(rows: list[dict[str, Any]]) -> Figure:
    """How busy the device is, by the length of a job."""
    lengths = list(JOBS)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for offset, way, colour in ((-0.2, "plain", "tab:gray"), (0.2, "ours", "tab:green")):
        values = [next(r["busy_percent"] for r in rows if (r["seconds"], r["way"]) == (s, way)) for s in lengths]
        label = {"plain": "plain synchronous handler", "ours": "this worker"}[way]
        bars = axes.bar([i + offset for i in range(len(lengths))], values, 0.38, color=colour, label=label)
        axes.bar_label(bars, fmt="%.0f %%")
    axes.set_xticks(range(len(lengths)), ["flux-shapes" if not s else f"{s:g} s" for s in lengths])
    axes.set(ylabel="device busy", xlabel="length of a job", ylim=(0, 112))
    figure.legend(loc="outside upper center", ncols=len(WAYS))
    return figure


if __name__ == "__main__":
    main()
