"""`python -m benchmarks.batch`: what `python -m client.batch` does to RunPod's routes, to a job and to memory.

Under the stand-in of tests/: calls a job beside RunPod's own client, which asks for each job every second; 300 rows by
the real worker, with 10 % of all requests failing on both sides, a kill -9 in the middle and a resume; and the client's
memory at 500 and at 5,000 rows whose answers are made up. Writes results/batch.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import runpod

from benchmarks.machine import machine
from client.journal import NAME
from client.queue import CONCURRENCY
from src.settings import ROOT
from tests.answers import answer
from tests.runpod_stand_in import ENDPOINT, Faults, StandIn, worker

RESULTS = Path(__file__).parent / "results"
_KEY = "rpa_secret_of_the_client"
_SECONDS_A_JOB = {0.1: 120, 0.5: 60, 3.0: 40}  # and how many of such jobs
_FAULTS = ("429", "500", "drop", "slow", "unanswered", "garbage")
_SMALL = ("--set", "width=64", "--set", "height=64", "--set", "num_inference_steps=4")
_NO_MODE = 50  # one row in so many asks for what the model cannot do
_SIDE = 160  # pixels of a picture that is made up, of noise: 77 kB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--memory", type=int, nargs="+", default=[500, 5_000], help="rows")
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "concurrency": CONCURRENCY, "calls": []}
    for seconds, jobs in _SECONDS_A_JOB.items():
        found["calls"].append({"seconds_a_job": seconds, "jobs": jobs, **calls(seconds, jobs)})
        print(json.dumps(found["calls"][-1]))
    with tempfile.TemporaryDirectory() as folder:
        found["killed"] = killed_and_resumed(Path(folder), arguments.rows)
        print(json.dumps(found["killed"]))
    found["memory"] = []
    for rows in arguments.memory:
        with tempfile.TemporaryDirectory() as folder:
            found["memory"].append(memory(Path(folder), rows))
            print(json.dumps(found["memory"][-1]))
    (RESULTS / "batch.json").write_text(json.dumps(found, indent=2) + "\n")


def write_rows(file: Path, count: int, fields: Callable[[int], Mapping[str, object]] = lambda _: {}) -> Path:
    """A CSV of `count` rows with seeds 0, 1 ..."""
    rows = [{"prompt": "a red star on black", "seed": i, **fields(i)} for i in range(count)]
    with file.open("w", newline="") as opened:
        table = csv.DictWriter(opened, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return file


def batch(stand_in: StandIn, file: Path, out: Path, *more: str) -> list[str]:
    """The command, for the stand-in."""
    url = f"http://127.0.0.1:{stand_in.port}/v2"
    options = ["--endpoint", ENDPOINT, "--url", url, "--out", str(out), "--quiet"]
    return [sys.executable, "-m", "client.batch", str(file), *options, *more]


def begun(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """The command's process, whose words come into `log`."""
    with log.open("ab") as opened:
        return subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "RUNPOD_API_KEY": _KEY}, stdout=opened, stderr=opened
        )


def calls(seconds: float, jobs: int) -> dict[str, Any]:
    """Requests to RunPod, and seconds until all is done: this client's and RunPod's own."""
    row: dict[str, Any] = {}
    for way in ("ours", "runpod"):
        stand_in = StandIn(simulate=answer, seconds_a_job=seconds)
        began = time.monotonic()
        if way == "ours":
            with tempfile.TemporaryDirectory() as folder:
                file = write_rows(Path(folder) / "prompts.csv", jobs)
                process = begun(batch(stand_in, file, Path(folder) / "out"), Path(folder) / "log")
                assert process.wait() == 0, (Path(folder) / "log").read_text()
        else:
            with ThreadPoolExecutor(CONCURRENCY) as threads:
                assert all(threads.map(partial(_drawn_by_runpods, stand_in.client()), range(jobs)))
        row[way] = {
            "calls": sum(map(len, stand_in.calls.values())),
            "seconds": round(time.monotonic() - began, 1),
        }
        stand_in.close()
    return row


def _drawn_by_runpods(endpoint: runpod.Endpoint, seed: int) -> object:
    return endpoint.run({"input": {"prompt": "a red star", "seed": seed}}).output(timeout=600)


def killed_and_resumed(folder: Path, rows: int) -> dict[str, Any]:
    """What became of `rows`, and of the jobs that were paid for them."""
    began = time.monotonic()
    out, log = folder / "out", folder / "batch.log"
    file = write_rows(folder / "prompts.csv", rows, lambda i: {"strength": 0.5 if _is_bad(i) else ""})
    stand_in = StandIn(Faults(0.1, seed=3), client_faults=Faults(0.1, _FAULTS, seed=5), poll_seconds=0.5)
    with worker(stand_in, folder / "worker.log") as process:
        first = begun(batch(stand_in, file, out, *_SMALL), log)
        while len(list(out.glob("*.png"))) < rows // 3:
            assert first.poll() is None, log.read_text()
            assert process.process.poll() is None, process.text()[-3_000:]
            time.sleep(0.05)
        first.kill()
        first.wait()
        second = begun(batch(stand_in, file, out, *_SMALL, "--resume"), log)
        status = second.wait(1_800)
    stand_in.close()
    journal = [json.loads(line) for line in (out / NAME).read_text().splitlines()[1:]]
    known = {line["sent"] for line in journal if "sent" in line}
    lost = sum("lost" in line for line in journal)
    jobs = Counter(job.input["seed"] for job in stand_in.jobs.values() if job.id in known)
    with (out / "results.csv").open(newline="") as opened:
        lines = list(csv.DictReader(opened))
    local = begun(
        [sys.executable, "-m", "client.batch", str(file), "--local", "--out", str(folder / "local"), *_SMALL], log
    )
    local.wait()
    ours, theirs = ({path.name: path.read_bytes() for path in each.glob("*.png")} for each in (out, folder / "local"))
    seconds = [job.taken[0] for job in stand_in.jobs.values() if job.taken]
    return {
        "rows": rows,
        "pictures": sum(bool(line["file"]) and not line["error"] for line in lines),
        "errors": sum(bool(line["error"]) and not line["file"] for line in lines),
        "expected_errors": sum(map(_is_bad, range(rows))),
        "rows_of_the_table": len({line["row"] for line in lines}),
        "jobs": len(stand_in.jobs),
        "paid_twice": sum(jobs.values()) - rows - lost,  # of those whose ids were known
        "sent_again": lost,
        "never_known": len(stand_in.jobs.keys() - known),  # their ids did not come, or not before the kill
        "files_as_local": ours == theirs,
        "calls_a_job": round(sum(map(len, stand_in.calls.values())) / len(stand_in.jobs), 2),
        "calls_above_the_limits": stand_in.over_limit.total(),
        "faults_of_the_client": stand_in.client_faults.injected.total(),
        "faults_of_the_worker": stand_in.faults.injected.total(),
        "exit_status": status,
        "jobs_a_minute": round(60 * len(seconds) / (max(seconds) - min(seconds))),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def _is_bad(i: int) -> bool:
    """Its `strength` has no effect without a picture, which is wrong."""
    return i % _NO_MODE == 7


def memory(folder: Path, rows: int) -> dict[str, Any]:
    """The most memory that the client's process had."""
    stand_in = StandIn(simulate=lambda input: answer(input, side=_SIDE))
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    process = begun(batch(stand_in, write_rows(folder / "prompts.csv", rows), folder / "out"), log)
    began, most = time.monotonic(), 0
    while process.poll() is None:
        most = max(most, _peak(process.pid))
        time.sleep(0.02)
    stand_in.close()
    assert process.returncode == 0, log.read_text()
    return {
        "rows": rows,
        "megabytes": round(most / 1e6),
        "megabytes_of_pictures": round(sum(file.stat().st_size for file in (folder / "out").glob("*.png")) / 1e6),
        "seconds": round(time.monotonic() - began, 1),
        "calls_above_the_limits": stand_in.over_limit.total(),
    }


def _peak(pid: int) -> int:
    """Bytes that the process held at most so far; rusage would count its parent's, which it begins with."""
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return 1_024 * int(found[1]) if found else 0
    return 0


if __name__ == "__main__":
    main()
