"""`python -m benchmarks.generated --requests 200000`: requests made at random, each answered by one process.

Made by the strategies of tests/test_properties.py, here with another seed each time: any JSON, requests that the schema
takes, such with one or two places changed. They are planned or described, so that nothing is drawn. Measured: seconds
of the processor for each, the codes of the answers, and the memory after a tenth of them and at the end. Writes
results/generated.json; exit status 1 where one takes over a second, is answered as a fault of the worker's or memory
grows by more than 3 %.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import sys
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.machine import machine
from tests.test_properties import ENGINE, JSON, mutated, requests

RESULTS = Path(__file__).parent / "results"
EXPECTED = {"success", "invalid_request", "adapter_unavailable"}
SECONDS, GROWTH = 1.0, 0.03
MEASURE = "how much memory?"  # instead of an event


@st.composite
def events(draw: st.DrawFn) -> dict[str, Any]:
    """What a worker is sent, and is not to draw."""
    event: dict[str, Any] = {"id": draw(JSON), "input": draw(mutated() | requests() | JSON)}
    if isinstance(event["input"], dict):
        event["input"][draw(st.sampled_from(["describe", "dry_run"]))] = True
    return event


def answer(pipe: Connection) -> None:
    """The process that answers: seconds and a code for each event, megabytes where it is asked for them."""
    import runpod  # noqa: F401 - or the first address that is fetched imports it, and memory grows by that

    from handler import respond
    from src.job import Job
    from src.settings import Settings

    settings = Settings()
    while (event := pipe.recv()) is not None:
        if event == MEASURE:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            pipe.send(psutil.Process().memory_info().rss / 1e6)
            continue
        began = time.process_time()
        response = respond(event, Job.of(event), lambda: settings, lambda: ENGINE)
        pipe.send((time.process_time() - began, response.get("error_code", response["status"])))


def run(count: int) -> dict[str, Any]:
    """All of them, and what was measured."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs,))
    process.start()
    theirs.close()
    answers, seconds, megabytes = Counter[str](), list[float](), list[float]()

    def ask(message: object) -> Any:
        ours.send(message)
        return ours.recv()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(events())
    def each(event: dict[str, Any]) -> None:
        if len(seconds) == count // 10 and not megabytes:
            megabytes.append(ask(MEASURE))
        took, code = ask(event)
        seconds.append(took)
        answers[code] += 1

    each()
    megabytes.append(ask(MEASURE))
    ours.send(None)
    process.join()
    return {
        "machine": machine(),
        "requests": len(seconds),
        "answers": dict(answers.most_common()),
        "slowest_seconds": round(max(seconds), 3),
        "megabytes": [round(size, 1) for size in megabytes],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200_000)
    results = run(parser.parse_args().requests)
    print(json.dumps(results, indent=2))
    (RESULTS / "generated.json").write_text(json.dumps(results, indent=2) + "\n")
    first, last = results["megabytes"]
    return int(
        results["slowest_seconds"] > SECONDS or not results["answers"].keys() <= EXPECTED or last > first * (1 + GROWTH)
    )


if __name__ == "__main__":
    sys.exit(main())
