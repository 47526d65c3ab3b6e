"""`python -m benchmarks.soak --jobs 2000`: one worker, all that clients may send, and what it holds afterwards.

The real SDK under the stand-in of tests/ gets forty requests over modes, adapters and formats, among them jobs that
are wrong, hostile, or cancelled while they wait or run. Each request must give the same bytes every time, each job one
answer of its kind, and memory, handles and threads must stay what they were. Writes results/soak.json and
results/soak.png; exit status 1 where a check fails.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from benchmarks.digests import requests
from benchmarks.machine import machine
from src.settings import ROOT
from tests.runpod_stand_in import FINAL, JobRecord, StandIn, WorkerProcess, worker
from tests.test_images import PHOTO, bomb_in_text, file_of, huge_png

RESULTS = Path(__file__).parent / "results"
WAVE = 50  # jobs at once; before the next, the worker is idle and measured
FIRST = 200  # jobs after which it is to hold what it holds at the end
GROWTH = 0.03
SECONDS = 1_800  # for a wave, and then it hangs
PLAIN = "plain"
SUCCESS, CANCELLED = "success", "cancelled"


@dataclass(frozen=True)
class Kind:
    """A job, by the name of what it is about, and how it is to end: `success`, `cancelled` or an error's code."""

    name: str
    fields: Mapping[str, Any]
    ends: str = SUCCESS


def _honest() -> list[Kind]:
    """The requests of benchmarks/digests.py, small."""
    kinds = []
    for name, fields in requests().items():
        small: dict[str, Any] = {} if fields.keys() & {"sigmas", "speed", "inputs"} else {"num_inference_steps": 2}
        if not fields.keys() & {"width", "aspect_ratio", "inputs", "outpaint"}:
            small |= {"width": 64, "height": 64}
        prompt = {} if "inputs" in fields else {"prompt": "a green circle on an orange background"}
        kinds.append(Kind(name, {**prompt, "seed": 7, **small, **fields}))
    return kinds


def _scans(count: int) -> bytes:
    """A progressive JPEG that says its last scan over and over."""
    file = file_of(PHOTO, "JPEG", progressive=True)
    last = file.rindex(b"\xff\xda")
    return file[:last] + file[last:-2] * count + file[-2:]


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _text(file: bytes) -> str:
    return base64.b64encode(file).decode()


def _bad() -> list[Kind]:
    """What clients get wrong."""
    bad: list[tuple[str, dict[str, Any]]] = [
        ("no prompt", {"prompt": ""}),
        ("a side that is none", {"width": 63}),
        ("a field that is none", {"stepz": 4}),
        ("damaged picture", {"init_image": _text(file_of(PHOTO)[:-200])}),
        ("mask alone", {"mask_image": _text(file_of(PHOTO))}),
        ("no such adapter", {"lora_path": "missing.safetensors"}),
        ("another model's adapter", {"lora_path": "wide.safetensors"}),
    ]
    return [Kind(name, {"prompt": "x", **fields}, "invalid_request") for name, fields in bad]


def _hostile() -> list[Kind]:
    """What only those send who mean harm."""
    keys = {f"k{i}": 1 for i in range(200_000)}
    scene = _text(file_of(PHOTO))
    hostile: list[tuple[str, dict[str, Any]]] = [
        ("an address for slow patterns", {"init_image": "https:///?" + "sig" * 64_000}),
        ("a data: address of parameters", {"init_image": "data:" + ";a" * 500_000}),
        ("200,000 keys", {"init_image": scene, "outpaint": keys}),
        ("four times 50,000 keys", {"controls": [{"image": scene, **dict(list(keys.items())[:50_000])}] * 4}),
        ("a JPEG of 2,800 scans", {"init_image": _text(_scans(2_800))}),
        ("a PNG of 144 million pixels", {"init_image": _text(huge_png(12_000))}),
        ("a PNG whose text is a bomb", {"init_image": _text(bomb_in_text())}),
        ("15 MB of 0xFF", {"init_image": _text(b"\xff" * 15_000_000)}),
        ("lists in lists", {"loras": _nested(300)}),
        ("a number of 300 digits", {"seed": 10**300}),
        ("half a letter", {"scheduler": "\ud800"}),
        ("a prompt of 5 MB", {"prompt": "x" * 5_000_000}),
        ("the cloud's own address", {"init_image": "https://169.254.169.254/latest/meta-data/"}),
        ("this machine's address", {"lora_path": "https://127.0.0.1:8000/a.safetensors"}),
        ("an adapter of long names", {"lora_path": "names.safetensors"}),
        ("an adapter that is not finite", {"lora_path": "nan.safetensors"}),
        ("an adapter that leads out", {"lora_path": "../../etc/passwd.safetensors"}),
    ]
    return [Kind(name, {"prompt": "x", **fields}, "invalid_request") for name, fields in hostile]


ENDLESS = Kind("cancelled", {"prompt": "x", "num_inference_steps": 100, "num_images": 4, "preview": True}, CANCELLED)
OUT = "transformer.transformer_blocks.0.attn.to_out.0"


def _adapters(folder: Path) -> None:
    """LORA_DIR: the shipped adapter, and some that are none."""
    name = "pytorch_lora_weights.safetensors"
    (folder / name).write_bytes((ROOT / "models" / "flux-shapes-outline" / name).read_bytes())
    wide = {"lora_unet_single_blocks_0_linear1.lora_down.weight": torch.zeros(4, 3072)}
    wide["lora_unet_single_blocks_0_linear1.lora_up.weight"] = torch.zeros(27_648, 4)
    save_file(wide, folder / "wide.safetensors")
    nan = {f"{OUT}.lora_A.weight": torch.zeros(4, 160), f"{OUT}.lora_B.weight": torch.full((160, 4), torch.nan)}
    save_file(nan, folder / "nan.safetensors")
    save_file({"x?" + "sig" * 13_000: torch.zeros(1)}, folder / "names.safetensors")


def mix(count: int, seed: int = 0) -> list[Kind]:
    """`count` jobs: every 50th the plain one, of the others seven in ten honest, and each kind as often as any."""
    rng = random.Random(seed)
    groups = [(_honest(), 0.72), (_bad(), 0.12), (_hostile(), 0.1), ([ENDLESS], 0.06)]
    plain = Kind(PLAIN, {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2, "width": 64, "height": 64})
    decks: list[list[Kind]] = [[] for _ in groups]
    jobs = []
    for i in range(count):
        if i % WAVE == 0:
            jobs.append(plain)
            continue
        (which,) = rng.choices(range(len(groups)), [share for _, share in groups])
        if not decks[which]:
            decks[which] = rng.sample(groups[which][0], len(groups[which][0]))
        jobs.append(decks[which].pop())
    return jobs


def _ended(job: JobRecord) -> str:
    """As `Kind.ends`; how often it was answered, where that is not once."""
    if job.status == "CANCELLED":
        return CANCELLED if len(job.results) <= 1 else f"{len(job.results)} answers"
    if len(job.results) != 1:
        return f"{len(job.results)} answers"
    posted = job.results[0][1]
    return str(posted.get("error", SUCCESS)).partition(":")[0]


class Soak:
    """One worker, and what was seen of it."""

    def __init__(self, stand_in: StandIn, process: WorkerProcess, measured: Path) -> None:
        self._stand_in, self._process, self._measured = stand_in, process, measured
        self._rng = random.Random(1)
        self.waves: list[dict[str, Any]] = []
        self.ends: dict[str, Counter[str]] = {}  # of each kind's jobs
        self.files: dict[str, set[str]] = {}  # digests of each honest kind's pictures
        self._jobs = 0

    def run(self, kinds: list[Kind]) -> None:
        """All of `kinds` at once, until each has its end; then what the idle worker holds."""
        stand_in = self._stand_in
        ids = {stand_in.submit(**kind.fields): kind for kind in kinds}
        cancel = {id: self._rng.uniform(0, 2) for id, kind in ids.items() if kind.ends == CANCELLED}
        deadline = time.monotonic() + SECONDS
        while open_jobs := [id for id in ids if stand_in.jobs[id].status not in FINAL]:
            for id in cancel.keys() & set(open_jobs):
                taken = stand_in.jobs[id].taken
                if taken and time.time() - taken[0] > cancel[id]:
                    stand_in.cancel(id)
            assert self._process.process.poll() is None, self._process.text()[-3_000:]
            assert time.monotonic() < deadline, f"{len(open_jobs)} jobs are open"
            time.sleep(0.05)
        seconds = []
        for id, kind in ids.items():
            job = stand_in.jobs.pop(id) if kind.ends != CANCELLED else stand_in.jobs[id]  # it may be answered yet
            self.ends.setdefault(kind.name, Counter())[_ended(job)] += 1
            if kind.ends == SUCCESS and _ended(job) == SUCCESS:
                seconds.append(job.results[0][0] - job.taken[0])
                pictures = job.results[0][1]["output"]["images"]
                digest = hashlib.sha256("".join(pictures).encode()).hexdigest()
                self.files.setdefault(kind.name, set()).add(digest)
        self._jobs += len(kinds)
        self.waves.append({"jobs": self._jobs, **self.held(), **_latency(seconds)})

    def settle(self) -> None:
        """Measure the last wave again, until no connection that was kept open is closed any more."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            before = self.waves[-1]["handles"]
            time.sleep(5)
            self.waves[-1] |= self.held()
            if self.waves[-1]["handles"] >= before:
                return

    def held(self) -> dict[str, Any]:
        """What the worker holds, measured by itself."""
        self._measured.unlink(missing_ok=True)
        self._process.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 60
        while not self._measured.exists():
            assert time.monotonic() < deadline, "the worker does not answer SIGUSR1"
            time.sleep(0.02)
        held: dict[str, Any] = json.loads(self._measured.read_text())
        return held


def _latency(seconds: list[float]) -> dict[str, float]:
    """Of honest jobs, from being taken to being answered."""
    ordered = sorted(seconds)
    return {
        "median_seconds": round(statistics.median(ordered), 2),
        "p95_seconds": round(ordered[int(0.95 * (len(ordered) - 1))], 2),
        "most_seconds": round(ordered[-1], 2),
    }


def run(count: int) -> dict[str, Any]:
    """`count` jobs on one worker, and whether all was as it must be."""
    kinds = mix(count)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "loras").mkdir()
        _adapters(folder / "loras")
        environment = {
            "LORA_DIR": str(folder / "loras"), "LORA_CACHE_DIR": str(folder / "cache"), "HF_HUB_OFFLINE": "1",
            "PROGRESS_INTERVAL": "0.2", "WARMUP_SIZES": "64x64",
            "OMP_NUM_THREADS": "1",  # or each thread that torch was ever used on has helpers of its own
        }  # fmt: skip
        stand_in, measured = StandIn(max_body=50_000_000, poll_seconds=0.5), folder / "held"
        command = ("-m", "benchmarks.soak_worker", str(measured))
        began = time.monotonic()
        with worker(stand_in, folder / "log", *command, **environment) as process:
            soak = Soak(stand_in, process, measured)
            for i in range(0, count, WAVE):
                soak.run(kinds[i : i + WAVE])
                if i + WAVE in (FIRST, count):
                    soak.settle()
                print(_row(soak.waves[-1]), flush=True)
            seconds = time.monotonic() - began
            status = process.terminate()
        stand_in.close()
    expected = {kind.name: kind.ends for kind in kinds}
    checks = _checks(soak, expected, status)
    ends = {name: dict(found) for name, found in sorted(soak.ends.items())}
    return {
        "machine": machine(), "jobs": count, "seconds": round(seconds), "checks": checks, "waves": soak.waves,
        "ends": ends,
    }  # fmt: skip


def _checks(soak: Soak, expected: Mapping[str, str], status: int) -> dict[str, str]:
    """What must be, and "" or what is instead."""
    wrong = {
        name: {end: n for end, n in found.items() if end != expected[name]}
        for name, found in soak.ends.items()
        if set(found) != {expected[name]}
    }
    checks = {
        "each job is answered once, as its kind must be": json.dumps(wrong) if wrong else "",
        "the same request gives the same bytes": ", ".join(n for n, digests in soak.files.items() if len(digests) > 1),
        "SIGTERM ends it with status 0": "" if status == 0 else str(status),
    }
    last = soak.waves[-1]
    if last["jobs"] > FIRST:  # before, it is still getting warm
        first = next(wave for wave in soak.waves if wave["jobs"] >= FIRST)
        for name, most in {"megabytes": GROWTH, "handles": 0, "threads": 0}.items():
            found = f"{first[name]} after {first['jobs']} jobs, {last[name]} at the end"
            checks[f"{name} within {100 * most:.0f} %"] = found if last[name] > first[name] * (1 + most) else ""
    return checks


COLUMNS: Mapping[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "jobs": ("jobs", lambda wave: f"{wave['jobs']:,}"),
    "memory": ("memory, MB", lambda wave: f"{wave['megabytes']:,.0f}"),
    "handles": ("handles", lambda wave: str(wave["handles"])),
    "threads": ("threads", lambda wave: str(wave["threads"])),
    "median": ("in hand: median", lambda wave: f"{wave['median_seconds']:.2f} s"),
    "p95": ("p95", lambda wave: f"{wave['p95_seconds']:.2f} s"),
}


def _row(wave: dict[str, Any]) -> str:
    return "  ".join(f"{head} {cell(wave):>8}" for head, cell in COLUMNS.values())


def plot(waves: list[dict[str, Any]]) -> Figure:
    """Memory, handles and threads, seconds; over the jobs."""
    jobs = [wave["jobs"] for wave in waves]
    panels = (
        ("MB", {"memory": "megabytes", "before trimming": "megabytes_before_trim"}),
        ("open at once", {"handles": "handles", "threads": "threads"}),
        ("seconds in hand", {"median": "median_seconds", "p95": "p95_seconds", "longest": "most_seconds"}),
    )
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axes, (label, lines) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name, key in lines.items():
            axes.plot(jobs, [wave[key] for wave in waves], label=name)
        axes.set(xlabel="jobs", ylabel=label, ylim=(0, None))
        axes.legend(fontsize=8)
    return figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2_000, help=f"a multiple of {WAVE}")
    jobs = parser.parse_args().jobs
    if jobs < WAVE or jobs % WAVE:
        parser.error(f"--jobs must be a multiple of {WAVE}")
    results = run(jobs)
    (RESULTS / "soak.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results["waves"]).savefig(RESULTS / "soak.png", dpi=80)
    for name, found in results["checks"].items():
        print(f"{'fails' if found else 'holds'}: {name}{found and ': '}{found}")
    return any(results["checks"].values())


if __name__ == "__main__":
    sys.exit(main())
