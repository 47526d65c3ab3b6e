"""SIGTERM at any time: the exit status, the seconds, what is left behind. The real handler.py under the stand-in."""

from __future__ import annotations

import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.runpod_stand_in import StandIn, WorkerProcess, worker

ENDLESS = {"prompt": "a red circle", "num_inference_steps": 100, "num_images": 4}
MOMENTS = 20
READY = "start: ready for jobs"


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    held = StandIn(poll_seconds=60)
    yield held
    held.close()


def until_it_is_caught(process: WorkerProcess) -> None:
    """Until handler.py's first lines have run: before them the interpreter itself would end by the signal."""
    status = Path(f"/proc/{process.process.pid}/status")
    while not int(re.findall(r"SigCgt:\s*(\w+)", status.read_text())[0], 16) >> (signal.SIGTERM - 1) & 1:
        assert process.process.poll() is None
        time.sleep(0.001)


def end(process: WorkerProcess) -> float:
    """SIGTERM; the seconds until it ended well, and left nobody of its own."""
    begun = time.monotonic()
    assert process.terminate(60) == 0, process.text()
    seconds = time.monotonic() - begun
    left = [other.name() for other in psutil.process_iter() if alive_of(process.process.pid, other)]
    assert left == [], process.text()
    assert process.text().count("stopping because of SIGTERM") <= 1
    return seconds


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def alive_of(session: int, process: psutil.Process) -> bool:
    """Whether it is of this session; whoever has ended waits for init alone, which is none of ours."""
    try:
        state, _, _, of = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return False
    return int(of) == session and state != "Z"


def test_in_the_first_moment(stand_in: StandIn, tmp_path: Path) -> None:
    with worker(stand_in, tmp_path / "log") as process:
        until_it_is_caught(process)
        end(process)
    assert process.text() == "INFO worker: stopping because of SIGTERM, while the worker's code was being imported\n"


def test_in_a_stage_which_is_named(stand_in: StandIn, tmp_path: Path) -> None:
    with worker(stand_in, tmp_path / "log") as process:
        process.wait_for('"stage": "files"')
        end(process)
    assert re.search(
        r"stopping because of SIGTERM \d+\.\d s into the start, in its stage (files|torch)", process.text()
    )


def test_idle_and_never_called_not_ready(stand_in: StandIn, tmp_path: Path) -> None:
    with worker(stand_in, tmp_path / "log") as process:
        process.wait_for(READY)
        stages = [line["stage"] for line in process.lines() if "stage" in line]
        print(f"idle: {end(process):.2f} s")
    stages.remove("read-ahead")  # it ends whenever it ends
    assert stages == [
        "settings", "checks", "files", "torch", "device", "inspect", "placement", "read", "load", "warm-up", "ready",
    ]  # fmt: skip
    assert "into the start" not in process.text()


def test_in_the_sdks_http_server(stand_in: StandIn, tmp_path: Path) -> None:
    """Which answers SIGTERM by itself, and raises it once more at its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ("handler.py", "--rp_serve_api", "--rp_api_port", str(port))
    with worker(stand_in, tmp_path / "log", *command) as process:
        while not answers(port):
            assert process.process.poll() is None
            time.sleep(0.05)
        end(process)
        stages = [line["stage"] for line in process.lines() if "stage" in line]
    assert "into the start" not in process.text()
    assert stages[-2:] == ["warm-up", "ready"], "its first client waits for no compiler"


@pytest.mark.slow
def test_in_the_midst_of_a_job(stand_in: StandIn, tmp_path: Path) -> None:
    with worker(stand_in, tmp_path / "log", PROGRESS_INTERVAL="0.1") as process:
        id = stand_in.submit(**ENDLESS)
        while not any(posted["step"] for _, posted in stand_in.jobs[id].progress):
            assert process.process.poll() is None
            time.sleep(0.01)
        seconds = end(process)
    ended = time.time()
    print(f"in the midst of a job: {seconds:.2f} s, {ended - stand_in.jobs[id].results[0][0]:.2f} s after its result")
    assert stand_in.jobs[id].status == "COMPLETED"


@pytest.mark.slow
def test_at_random_moments_of_a_start(stand_in: StandIn, tmp_path: Path) -> None:
    with worker(stand_in, tmp_path / "log") as process:
        until_it_is_caught(process)
        begun = time.monotonic()
        process.wait_for(READY)
        whole = time.monotonic() - begun
    rng, seconds = random.Random(14), []
    for number in range(MOMENTS):
        moment = rng.uniform(0, 1.1 * whole)
        with worker(stand_in, tmp_path / f"log-{number}") as process:
            until_it_is_caught(process)
            time.sleep(moment)
            seconds.append(end(process))
            last = process.text().strip().splitlines()[-1]
            print(f"{moment:5.2f} s of {whole:.2f}: {seconds[-1]:.2f} s; {last}")
            assert "into the start" not in process.text() or READY not in process.text()
    print(f"{MOMENTS} moments: {max(seconds):.2f} s at most")
