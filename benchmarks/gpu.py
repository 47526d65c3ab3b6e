"""`python -m benchmarks.gpu`: plain diffusers, each step of the ladder, adapters, and our plan on smaller cards.

Models of full size with random weights are built on the spot (no download); all ways run in one process, one after
another, and each way's picture is compared with the plain one's, or with that of the same way without what saves
memory or compiles its adapters. Without a card the same script runs flux-shapes, on pretended cards of its size: that
shows exactness, not speed.

A way that fails is a row that says why, and so is one that wants a package, a setting or more time than there is. The
file is written after every row; rows of earlier runs stay, and ways that have none come first. torch, transformers,
diffusers, what they bring and pydantic, in which the settings are written, are enough to run it; ways of this worker
want psutil too, some others what their rows name.

    python -m benchmarks.gpu                                         # all models, all ways
    python -m benchmarks.gpu --models FLUX.1-dev --ways 'within*'    # some of them, and the plain way
    python -m benchmarks.gpu --minutes 9.5 --output gpu.json         # what fits into that time
    python -m benchmarks.gpu --profile                               # and where the time of a step goes

Writes results/gpu.json, results/gpu.png where there is matplotlib, and with --profile results/gpu_profile.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.bare import without_needless_packages
from benchmarks.gpu_results import OtherMachine, Results, Row, words
from benchmarks.gpu_ways import LeftOut, Way, chosen, with_references

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUTPUT = Path(__file__).parent / "results" / "gpu.json"
ALLOCATOR = "expandable_segments:True"  # as in the Dockerfile: torch's allocator splinters less


class Bench(Protocol):
    """What benchmarks/gpu_bench.py measures a model with."""

    def facts(self) -> dict[str, Any]:
        """What holds for all of its rows."""

    def measure(self, way: Way) -> Row:
        """The row of `way`; raises where there is none."""

    def works(self) -> bool:
        """Whether the device still computes."""


class Budget:
    """Seconds until `minutes` are over, by `clock`; without `minutes` there is no end."""

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if minutes is None else clock() + 60 * minutes

    def clock(self) -> float:
        """Seconds, from some beginning."""
        return self._clock()

    def why_not(self, expected: float) -> str | None:
        """Why nothing is begun that is expected to take so many seconds; None where there is time for it."""
        left = float("inf") if self._end is None else self._end - self._clock()
        if left > 0 and expected <= left:
            return None
        return f"--minutes: {max(left, 0):.0f} seconds were left, and it is expected to take {expected:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", ALLOCATOR)  # before torch is imported
    budget = Budget(options.minutes)
    try:
        with without_needless_packages():
            import torch

            from benchmarks import gpu_bench, gpu_profile
            from benchmarks.machine import machine
    except ModuleNotFoundError as error:
        raise SystemExit(f"benchmarks.gpu wants {error.name}, which this machine does not have") from error

    on_card = torch.cuda.is_available()
    models = options.models or (gpu_bench.MODELS if on_card else (gpu_bench.SHIPPED,))
    try:
        ways = chosen(options.ways)
        results = Results(options.output, machine(), full_size=on_card)
    except (OtherMachine, ValueError) as error:
        raise SystemExit(str(error)) from error
    for name in models:
        bench = run(gpu_bench.Bench, name, ways, results, budget)
        if options.profile and bench is not None and not budget.why_not(0):
            gpu_profile.keep(bench, options.output.with_name("gpu_profile.json"), machine())
        del bench
    try:
        plot(results.found["models"]).savefig(options.output.with_suffix(".png"), dpi=80)
    except ModuleNotFoundError as error:
        print(f"no plot without {error.name}", file=sys.stderr)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--models", nargs="+", metavar="NAME", help="rows of the catalog; three by default")
    parser.add_argument("--ways", nargs="+", default=(), metavar="PATTERN", help="names of ways, * for any letters")
    parser.add_argument("--minutes", type=float, help="begin nothing that would take longer than what is left of them")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, metavar="FILE", help="JSON with the rows, earlier ones too"
    )
    parser.add_argument("--profile", action="store_true", help="also where the time of a step goes")
    return parser.parse_args(arguments)


def run(make: Callable[[str], Any], name: str, ways: Sequence[Way], results: Results, budget: Budget) -> Any | None:
    """All `ways` of one model, and what they are held against; the Bench that `make` gave, or None where it failed."""
    rows = {row["way"]: row for row in results.rows(name)}
    measured = {way for way, row in rows.items() if "seconds" in row}
    bench: Bench | None = None
    why = budget.why_not(0)
    if not why:
        try:
            bench = make(name)
            results.describe(name, bench.facts())
        except Exception as error:  # noqa: BLE001 - the other models are to be measured all the same
            why = f"the model could not be made: {words(error)}"
    took: list[float] = []
    for way in with_references(ways, measured):
        expected = rows.get(way.name, {}).get("took_seconds") or (median(took) if took else 0.0)
        left_out = why or budget.why_not(expected)
        if left_out or bench is None:
            row: Row = {"way": way.name, "left_out": left_out}
        else:
            begun = budget.clock()
            row = attempt(bench, way)
            row["took_seconds"] = round(budget.clock() - begun, 1)
            took.append(row["took_seconds"])
            if "error" in row and not bench.works():
                why = f"the device failed while it drew {way.name!r}, and computes nothing in this process"
        results.keep(name, row)
        print(name, row, file=sys.stderr, flush=True)
    return bench


def attempt(bench: Bench, way: Way) -> Row:
    """The way's row; one that fails says why, whatever it raised."""
    from src.errors import let_go

    try:
        return bench.measure(way)
    except (KeyboardInterrupt, SystemExit):
        raise
    except LeftOut as error:
        return {"way": way.name, "left_out": str(error)}
    except ModuleNotFoundError as error:
        return {"way": way.name, "left_out": f"it wants {error.name}, which this machine does not have"}
    except BaseException as error:  # noqa: BLE001 - compilers and extensions raise anything
        let_go(error)  # its frames hold a model's weights
        return {"way": way.name, "error": words(error)}


def plot(models: Mapping[str, Any]) -> Figure:
    """Seconds of each way that was measured, the model's floor by a warm product as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1 + 5 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), squeeze=False)[:, 0]
    for axis, (name, found) in zip(axes, models.items(), strict=True):
        ways = [way for way in found["ways"] if "seconds" in way]
        seconds = [way["seconds_per_step"] * found["steps"] for way in ways]
        names = [way["way"] + (" (ran eager)" if "fell_back" in way else "") for way in ways]
        axis.barh(names, seconds, color="#4878a8")
        if found.get("floor_seconds"):
            axis.axvline(found["floor_seconds"]["product"], color="#c04040", label="floor by a warm product")
            axis.legend()
        axis.set(title=name, xlabel=f"seconds for a picture of {found.get('steps')} steps")
        axis.invert_yaxis()
    return figure


if __name__ == "__main__":
    main()
