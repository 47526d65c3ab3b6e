"""`python -m benchmarks.faults`: does each job have one result, whatever RunPod answers and whoever ends the worker?

A thousand jobs at each rate of faults of every kind at every route, through the real SDK under the stand-in of tests/.
On the way four minutes in which RunPod answers nothing, a SIGTERM, after which another worker goes on, and a kill -9,
after which RunPod hands out again what that worker had in hand, but for one job. Writes results/faults.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from tests.runpod_stand_in import EVERY_KIND, FINAL, Faults, StandIn, WorkerProcess, worker

RESULTS = Path(__file__).parent / "results"
_IN_A_ROW = 12  # faults of one job or poll at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1_000)
    parser.add_argument("--rates", type=float, nargs="+", default=[5, 20, 50], help="percent of all requests")
    parser.add_argument("--dark", type=float, default=240, help="seconds")
    arguments = parser.parse_args()
    rows = [row(rate / 100, arguments.jobs, arguments.dark) for rate in arguments.rates]
    (RESULTS / "faults.json").write_text(json.dumps({"machine": machine(), "rates": rows}, indent=2) + "\n")


def row(rate: float, count: int, dark: float) -> dict[str, Any]:
    """What became of `count` jobs."""
    began = time.monotonic()
    stand_in = StandIn(Faults(rate, EVERY_KIND, in_a_row=_IN_A_ROW, seed=7), poll_seconds=0.5)
    ids = [_submit(stand_in, i) for i in range(count)]
    abandoned: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with worker(stand_in, log, RUNPOD_POD_ID="worker-1") as process:
            _until(stand_in, process, ids[: count // 4])
            stand_in.darken(dark)
            _until(stand_in, process, ids[: count // 2])
            ended = process.terminate(seconds=600)
        with worker(stand_in, log, RUNPOD_POD_ID="worker-2") as process:
            _until(stand_in, process, ids[: 3 * count // 4])
            while not (held := stand_in.in_hand("worker-2")):
                time.sleep(0.001)
            process.process.kill()
            process.process.wait()
            abandoned = held[:1]
            stand_in.hand_out_again("worker-2", but=abandoned)
        with worker(stand_in, log, RUNPOD_POD_ID="worker-3") as process:
            _until(stand_in, process, [id for id in ids if id not in abandoned])
        secrets = [word for word in ("rpa_", "key=") if word in process.text()]
    stand_in.close()
    results = Counter(len(stand_in.jobs[id].results) for id in ids if id not in abandoned)
    wrong = [id for id in ids if stand_in.jobs[id].status != ("FAILED" if _is_bad(ids.index(id)) else "COMPLETED")]
    late = sum(at > stand_in.jobs[id].results[0][0] for id in ids for at, _ in stand_in.jobs[id].progress
               if stand_in.jobs[id].results)  # fmt: skip
    row = {
        "percent_of_requests": round(100 * rate),
        "faults": sum(stand_in.faults.injected.values()),
        "kinds_met_at_job_done": len({kind for route, kind in stand_in.faults.injected if route == "job-done"}),
        "jobs": count,
        "one_result": results[1],
        "lost": results[0],
        "more_than_one": sum(number for times, number in results.items() if times > 1),
        "with_a_killed_worker": len(abandoned),
        "wrong_status": len([id for id in wrong if id not in abandoned]),
        "progress_after_the_result": late,
        "exit_status_after_sigterm": ended,
        "secrets_in_the_log": secrets,
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    print(json.dumps(row))
    return row


def _submit(stand_in: StandIn, i: int) -> str:
    size = 63 if _is_bad(i) else 64
    return stand_in.submit(prompt="a red circle", seed=i, width=size, height=64, num_inference_steps=4)


def _is_bad(i: int) -> bool:
    return i % 10 == 0


def _until(stand_in: StandIn, process: WorkerProcess, ids: list[str]) -> None:
    while not all(stand_in.jobs[id].status in FINAL for id in ids):
        assert process.process.poll() is None, process.text()[-3_000:]
        time.sleep(0.05)


if __name__ == "__main__":
    main()
