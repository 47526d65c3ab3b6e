"""The real handler.py and the real SDK under a stand-in for RunPod: progress, cancel, time-out, faults, the end."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from src.job import Progress
from src.response.progress import Watcher
from src.serving import sdk
from src.settings import ROOT
from tests.runpod_stand_in import ANSWERS, EVERY_KIND, REFUSALS, Faults, JobRecord, StandIn, WorkerProcess, worker

ENDLESS = {"prompt": "a red circle", "num_inference_steps": 100, "num_images": 4}


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    held = StandIn()
    yield held
    held.close()


@pytest.fixture(scope="module")
def shared() -> Iterator[StandIn]:
    held = StandIn()
    yield held
    held.close()


@pytest.fixture(scope="module")
def process(shared: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    settings = {"PROGRESS_INTERVAL": "0.2", "LOG_LEVEL": "DEBUG", "PREFETCH_JOBS": "4"}
    with worker(shared, tmp_path_factory.mktemp("worker") / "log", **settings) as held:
        yield held


def until_running(stand_in: StandIn, process: WorkerProcess, id: str) -> None:
    """Until the job has the device."""
    while not any(p["step"] for _, p in stand_in.jobs[id].progress):
        assert process.process.poll() is None
        time.sleep(0.01)


def picture(job: JobRecord) -> str:
    assert job.status == "COMPLETED", job.results
    text: str = job.results[0][1]["output"]["images"][0]
    return text


def test_runsync_status_and_health_work_for_the_real_client(shared: StandIn, process: WorkerProcess) -> None:
    client = shared.client()
    output = client.run_sync({"input": {"prompt": "a red circle", "seed": 1}}, timeout=90)
    assert output["status"] == "success"
    job = client.run({"input": {"prompt": "a red circle", "seed": 1}})
    assert job.output(timeout=30)["images"] == output["images"]
    assert client.health()["jobs"] == {"inQueue": 0, "inProgress": 0}


def test_a_bad_request_fails_with_the_contracts_text(shared: StandIn, process: WorkerProcess) -> None:
    (job,) = shared.wait(shared.submit(prompt="x", width=63))
    assert job.status == "FAILED"
    assert job.results[0][1]["error"].startswith("invalid_request: width: must be")


def test_progress_tells_phase_steps_percent_and_time_left(shared: StandIn, process: WorkerProcess) -> None:
    id = shared.submit(**ENDLESS, preview=True)
    waiting = shared.submit(prompt="a red circle", seed=2)
    (job, _) = shared.wait(id, waiting)
    assert len(job.progress) > 4
    steps = [posted["step"] for _, posted in job.progress]
    assert steps == sorted(steps)
    denoising = [posted for _, posted in job.progress if posted["phase"] == "denoise"]  # between them pictures' ends
    posted = denoising[len(denoising) // 2]
    assert (posted["steps"], posted["percent"]) == (400, round(posted["step"] / 4))
    assert 0 < posted["seconds_left"] < 600
    preview = Image.open(io.BytesIO(base64.b64decode(job.progress[-1][1]["preview"])))
    assert (preview.format, preview.size) == ("JPEG", (128, 128))
    assert shared.jobs[waiting].progress[0][1]["phase"] == "queued"
    time.sleep(1)  # five intervals
    assert all(at < job.results[0][0] for at, _ in job.progress), "no progress after the result"
    assert "preview" not in shared.jobs[waiting].progress[0][1]


def test_jobs_run_in_the_order_in_which_they_came(shared: StandIn, process: WorkerProcess) -> None:
    """On the device, that is: afterwards each job writes its files on a thread of its own, and some overtake others."""
    ids = [shared.submit(prompt="a red circle", num_inference_steps=1, seed=i) for i in range(12)]
    shared.wait(*ids)
    turns = [line["job"] for line in process.lines() if line.get("device") == "taken" and line["job"] in ids]
    assert turns == ids


def test_a_cancelled_job_stops_and_one_that_waits_never_starts(shared: StandIn, process: WorkerProcess) -> None:
    (before,) = shared.wait(shared.submit(prompt="a red circle", seed=3))
    running = shared.submit(**ENDLESS)
    until_running(shared, process, running)
    waiting = shared.submit(**ENDLESS)
    while shared.jobs[waiting].status == "IN_QUEUE":
        time.sleep(0.01)
    last = shared.submit(prompt="a red circle", seed=3)
    shared.client().rp_client.post(f"flux/cancel/{waiting}", data={})
    shared.cancel(running)
    (after,) = shared.wait(last)
    assert picture(after) == picture(before)
    assert shared.jobs[running].results == shared.jobs[waiting].results == []
    outcomes = {line["job"]: line for line in process.lines() if line.get("outcome")}
    assert outcomes[running]["outcome"] == outcomes[waiting]["outcome"] == "cancelled"
    assert "denoise" in outcomes[running]["seconds"]
    assert "encode_prompt" not in outcomes[waiting]["seconds"]
    assert sum(line["job"] == waiting for line in process.lines() if line.get("outcome")) == 1


def test_no_prompt_picture_or_key_is_in_the_log(shared: StandIn, process: WorkerProcess) -> None:
    (job,) = shared.wait(shared.submit(prompt="a very private circle", seed=1))
    text = process.text()
    assert job.id in text
    for secret in ("private", picture(job)[100:140], "rpa_secret_of_the_worker"):
        assert secret not in text


def test_odd_jobs_are_answered_or_left_out_alone(shared: StandIn, process: WorkerProcess) -> None:
    odd_ids = ["a/b\nc", "e&%2F?#", "&", "$ID", "ü"]
    good = [shared.submit_as(id, {"prompt": "a red circle"}) for id in odd_ids]
    bad = [shared.submit_as(id, input) for id, input in (("no input", None), ("a list", []), ("a number", 5))]
    shared.odd = [None, "job", {"id": 5}, {"input": {}}, [], {"id": ""}, {"id": "\ud800"}]
    last = shared.submit(prompt="a red circle")
    jobs = shared.wait(*good, *bad, last)
    assert [job.status for job in jobs] == ["COMPLETED"] * 5 + ["FAILED"] * 3 + ["COMPLETED"]
    assert all(len(job.results) == 1 for job in jobs)
    for job in jobs[5:8]:
        assert job.results[0][1]["error"].startswith("invalid_request: input: ")


def test_a_job_that_no_json_reader_reads_is_answered(shared: StandIn, process: WorkerProcess) -> None:
    deep: list[object] = []
    for _ in range(900):  # more, with what stands around it, than Python's reader takes
        deep = [deep]
    ids = [shared.submit_as("deep", {"prompt": deep}), shared.submit(prompt="a red circle", seed=10**400)]
    for job in shared.wait(*ids):
        assert job.results[0][1]["error"].startswith("invalid_request: ")


@pytest.mark.slow
def test_a_cancel_for_a_job_that_is_on_its_way_is_remembered(tmp_path: Path) -> None:
    held = StandIn(way_seconds=1.0)
    with worker(held, tmp_path / "log") as process:
        held.wait(held.submit(prompt="a red circle"))
        id = held.submit(**ENDLESS)
        while held.jobs[id].status == "IN_QUEUE":
            time.sleep(0.001)
        held.cancel(id)
        held.wait(held.submit(prompt="a red circle"))
    assert held.jobs[id].results == []
    assert f"job {id}: cancelled before it began" in process.text()
    held.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*ANSWERS, *REFUSALS, "429", "500"])
def test_polls_that_bring_nothing_come_with_pauses(kind: str, tmp_path: Path) -> None:
    faults = Faults(0.0, (kind,), in_a_row=10**9)
    held = StandIn(faults, poll_seconds=0)
    with worker(held, tmp_path / "log") as process:
        held.wait(held.submit(prompt="a red circle"))
        faults.rate = 1.0
        time.sleep(0.5)
        polls = held.polls
        time.sleep(4)
        assert 1 <= held.polls - polls < 30
        faults.rate = 0.0
        began = time.monotonic()
        held.wait(held.submit(prompt="a red circle"))
        assert time.monotonic() - began < 10, "it is there soon after RunPod is"
        assert "rpa_" not in process.text()
        assert process.terminate() == 0
    held.close()


@pytest.mark.slow
def test_every_job_has_one_result_whatever_runpod_answers(tmp_path: Path) -> None:
    held = StandIn(Faults(0.3, EVERY_KIND, in_a_row=6, seed=2), poll_seconds=0.5)
    with worker(held, tmp_path / "log", PROGRESS_INTERVAL="0.1") as process:
        ids = [held.submit(prompt="a red circle", seed=i, width=64, height=64) for i in range(60)]
        jobs = held.wait(*ids, seconds=300)
        assert process.terminate() == 0
    assert {job.status for job in jobs} == {"COMPLETED"}
    assert [len(job.results) for job in jobs] == [1] * 60
    assert "key=" not in process.text()
    assert "rpa_" not in process.text()
    held.close()


@pytest.mark.slow
def test_pings_name_the_jobs_in_hand(shared: StandIn, process: WorkerProcess) -> None:
    id = shared.submit(**ENDLESS)
    shared.wait(id)
    assert any(id in ping.get("job_id", "") for ping in shared.pings)


@pytest.mark.slow
def test_a_request_that_takes_too_long_ends_and_the_next_one_runs(stand_in: StandIn, tmp_path: Path) -> None:
    with worker(stand_in, tmp_path / "log", REQUEST_TIMEOUT="1"):
        late, waits = stand_in.submit(**ENDLESS), stand_in.submit(**ENDLESS)
        jobs = stand_in.wait(late, waits)
        (after,) = stand_in.wait(stand_in.submit(prompt="a red circle"))
    for job in jobs:
        assert job.results[0][1]["error"].startswith("timed_out: the job took longer than REQUEST_TIMEOUT=1 seconds")
    assert after.status == "COMPLETED"


_SLOW_TO_OPEN = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <string.h>
#include <unistd.h>
#define SLOW(name) \
    int name(const char *path, int flags, unsigned mode) { \
        int (*real)(const char *, int, unsigned) = (int (*)(const char *, int, unsigned))dlsym(RTLD_NEXT, #name); \
        if (strstr(path, "slow.safetensors")) sleep(9); \
        return real(path, flags, mode); \
    }
SLOW(open)
SLOW(open64)
"""


@pytest.mark.slow
def test_an_adapter_on_a_volume_that_is_slow_stops_no_other_job(stand_in: StandIn, tmp_path: Path) -> None:
    source, library = tmp_path / "slow.c", tmp_path / "slow.so"
    source.write_text(_SLOW_TO_OPEN)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)  # noqa: S607
    (adapter,) = (ROOT / "models" / "flux-shapes-outline").glob("*.safetensors")
    shutil.copy(adapter, tmp_path / "slow.safetensors")
    with worker(stand_in, tmp_path / "log", LORA_DIR=str(tmp_path), LD_PRELOAD=str(library)):
        stand_in.wait(stand_in.submit(prompt="a red circle"))
        slow = stand_in.submit(prompt="a red circle", lora_path="slow.safetensors")
        others = stand_in.wait(*(stand_in.submit(prompt="a red circle", seed=i) for i in range(7)))
        assert not stand_in.jobs[slow].results
        (late,) = stand_in.wait(slow)
    assert all(job.status == "COMPLETED" for job in (*others, late))
    assert late.results[0][0] - late.taken[0] > 9


@pytest.mark.slow
def test_sigterm_finishes_what_is_in_hand_and_takes_no_more(stand_in: StandIn, tmp_path: Path) -> None:
    with worker(stand_in, tmp_path / "log") as process:
        running = stand_in.submit(**ENDLESS)
        while stand_in.jobs[running].status == "IN_QUEUE":
            time.sleep(0.01)
        process.wait_for(f'"requestId": "{running}", "message": "Started."')
        process.process.terminate()
        process.wait_for("stopping because of SIGTERM")
        time.sleep(1.5)  # a poll that is under way may still bring a job
        late = stand_in.submit(prompt="a red circle")
        assert process.process.wait(180) == 0
    assert stand_in.jobs[running].status == "COMPLETED"
    assert stand_in.jobs[late].status == "IN_QUEUE"


@pytest.mark.slow
def test_sigterm_ends_an_idle_worker_at_once(stand_in: StandIn, tmp_path: Path) -> None:
    held = StandIn(poll_seconds=60)
    with worker(held, tmp_path / "log") as process:
        held.wait(held.submit(prompt="a red circle"))
        polls = held.polls
        started = time.monotonic()
        process.process.terminate()
        time.sleep(0.2)
        assert process.terminate() == 0, "once more, it changes nothing"
        assert time.monotonic() - started < 30, "it does not sit out its polls"
    assert held.polls <= polls + 1, "and begins no other"
    assert process.text().count("stopping because of") == 1
    assert "into the start" not in process.text()
    held.close()


@pytest.mark.slow
def test_a_job_handed_out_while_the_signal_arrives_is_run_or_never_taken(tmp_path: Path) -> None:
    for number, after in enumerate((-0.02, 0.0, 0.02, 0.3)):
        held = StandIn(way_seconds=0.02)
        with worker(held, tmp_path / f"log-{number}") as process:
            held.wait(held.submit(prompt="a red circle"))
            if after < 0:
                id = held.submit(prompt="a red circle")
            time.sleep(abs(after))
            process.process.terminate()
            if after >= 0:
                time.sleep(after)
                id = held.submit(prompt="a red circle")
            assert process.process.wait(60) == 0
        assert held.jobs[id].status in ("COMPLETED", "IN_QUEUE")
        held.close()


@pytest.mark.slow
@pytest.mark.parametrize("attribute", [call.attribute for call in sdk.CALLS])
def test_an_sdk_that_moved_something_runs_by_itself_and_that_is_said(
    attribute: str, stand_in: StandIn, tmp_path: Path
) -> None:
    with worker(stand_in, tmp_path / "log", "-m", "tests.moved_sdk", attribute) as process:
        ids = [stand_in.submit(prompt="a red circle", seed=i) for i in range(3)]
        assert {job.status for job in stand_in.wait(*ids)} == {"COMPLETED"}
        (line,) = (line for line in process.lines() if line["level"] == "WARNING")
    assert f"JobScaler.{attribute} is not the SDK's own" in line["message"]
    assert all(call.lost not in line["message"] for call in sdk.CALLS if call.attribute != attribute)


def test_the_pinned_sdk_has_moved_nothing() -> None:
    assert whats_moved() == ""


@pytest.mark.slow
def test_the_newest_sdk_has_moved_nothing(tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path), "runpod"]
    installed = subprocess.run(install, capture_output=True, text=True, timeout=300, check=False)
    if installed.returncode:
        pytest.skip(f"no registry to be reached: {installed.stderr.strip().splitlines()[-1]}")
    assert whats_moved(PYTHONPATH=str(tmp_path)) == ""


def whats_moved(**environment: str) -> str:
    """By the SDK's attributes, a line each."""
    command = [sys.executable, "-m", "src.serving.sdk"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=True
    ).stdout


def test_the_sdks_http_server_refuses_several_processes_before_the_load(stand_in: StandIn, tmp_path: Path) -> None:
    command = ("handler.py", "--rp_serve_api", "--rp_api_concurrency", "4")
    with worker(stand_in, tmp_path / "log", *command) as process:
        assert process.process.wait(60) == 1
    assert "invalid_settings: --rp_api_concurrency=4" in process.text()
    assert "weights read in" not in process.text()


@pytest.mark.slow
def test_a_control_plane_that_is_gone_is_asked_with_pauses(tmp_path: Path) -> None:
    held = StandIn()
    with worker(held, tmp_path / "log") as process:
        held.wait(held.submit(prompt="a red circle"))
        held.close()
        time.sleep(4)
        assert 1 <= process.text().count("job-take failed") < 10
        assert process.terminate() == 0


@pytest.mark.slow
def test_a_job_cancelled_in_the_sdks_hands_leaves_its_slot(stand_in: StandIn, tmp_path: Path) -> None:
    with worker(stand_in, tmp_path / "log", PREFETCH_JOBS="1") as process:
        for _ in range(15):
            id = stand_in.submit(**ENDLESS)
            while stand_in.jobs[id].status == "IN_QUEUE":
                time.sleep(0.001)
            stand_in.cancel(id)
        (after,) = stand_in.wait(stand_in.submit(prompt="a red circle"), seconds=60)
        assert after.status == "COMPLETED"
        assert process.terminate() == 0, "nothing is counted as in hand for ever"


@pytest.mark.slow
def test_sigterm_while_the_model_loads_ends_it_too(stand_in: StandIn, tmp_path: Path) -> None:
    with worker(stand_in, tmp_path / "log", WARMUP_SIZES="1024x1024") as process:
        process.wait_for("fitness check(s)")
        assert process.terminate() == 0
    with worker(stand_in, tmp_path / "log-2", WARMUP_SIZES="1024x1024", LOG_LEVEL="DEBUG") as process:
        process.wait_for("warming up")
        time.sleep(0.3)
        assert process.terminate() == 0, "also in the midst of a step"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "check", "reason"),
    [
        ({"MODEL_NAME": "/no/such/folder"}, "check_start", "model_unavailable: /no/such/folder: is not a folder"),
        ({"WARMUP_SIZES": "100x100"}, "warm_up", "WARMUP_SIZES: width: must be a multiple of 8, got 100"),
        (
            {"BUCKET_ENDPOINT_URL": "http://127.0.0.1:9/pictures", "BUCKET_ACCESS_KEY_ID": "k",
             "BUCKET_SECRET_ACCESS_KEY": "hidden"},
            "check_bucket", "do not let this worker upload",
        ),
    ],
)  # fmt: skip
def test_an_unfit_worker_says_why_to_runpod_and_ends(
    environment: dict[str, str], check: str, reason: str, stand_in: StandIn, tmp_path: Path
) -> None:
    with worker(stand_in, tmp_path / "log", **environment) as process:
        assert process.process.wait(180) == 1
    (posted,) = (ping for ping in stand_in.pings if ping.get("status") == "unhealthy")
    assert posted["check"] == check
    assert reason in posted["reason"]
    text = process.text()
    assert f"Fitness check failed: {check}" in text
    assert "hidden" not in text


@pytest.mark.slow
def test_results_survive_what_the_sdk_alone_would_lose(tmp_path: Path) -> None:
    """Half of all requests fail, up to three times in a row: more than the SDK's own three tries."""
    held = StandIn(Faults(0.5, ("429", "500", "drop"), in_a_row=3, seed=1))
    with worker(held, tmp_path / "log", PROGRESS_INTERVAL="0.1"):
        ids = [held.submit(prompt="a red circle", seed=i) for i in range(10)]
        jobs = held.wait(*ids, seconds=120)
    assert {job.status for job in jobs} == {"COMPLETED"}
    assert [len(job.results) for job in jobs] == [1] * 10
    assert sum(count for (route, _), count in held.faults.injected.items() if route == "job-done") > 3
    held.close()


@pytest.mark.slow
def test_a_result_that_runpod_refuses_becomes_an_error_that_says_so(tmp_path: Path) -> None:
    held = StandIn(max_body=1_000, refused=413)
    with worker(held, tmp_path / "log"):
        (job,) = held.wait(held.submit(prompt="a red circle"), seconds=60)
    assert job.refused_bytes
    assert job.status == "FAILED"
    assert job.results[0][1]["error"].startswith("response_too_large: RunPod refused the result")
    held.close()


@pytest.mark.slow
def test_a_device_that_fails_is_reported_and_ends_the_worker(stand_in: StandIn, tmp_path: Path) -> None:
    with worker(stand_in, tmp_path / "log", "-m", "tests.broken_worker") as process:
        (job,) = stand_in.wait(stand_in.submit(prompt="a red circle"))
        assert process.process.wait(180) == 1
    assert job.status == "FAILED"
    result = job.results[0][1]
    assert result["error"].startswith("device_failed: the device failed and this worker must be replaced")
    assert result["stopPod"] is True


def test_what_a_watcher_tells() -> None:
    watcher = Watcher()
    assert watcher.progress() == {"phase": "queued", "step": 0, "steps": 0, "percent": 0, "seconds_left": None}
    started = time.monotonic()
    watcher.see(Progress("denoise", 0, 4))
    time.sleep(0.2)
    watcher.see(Progress("denoise", 1, 4))
    posted = watcher.progress()
    assert posted["percent"] == 25
    assert 0.6 <= posted["seconds_left"] <= 3 * (time.monotonic() - started) + 0.1
    json.dumps(posted)


@pytest.mark.slow
def test_fifty_cancels_at_random_steps(stand_in: StandIn, tmp_path: Path) -> None:
    """The device is free within a few steps; two jobs never run at once; the next picture is as before."""
    rng = random.Random(0)
    free_after, step_seconds = [], []
    with worker(stand_in, tmp_path / "log", PROGRESS_INTERVAL="0.1", LOG_LEVEL="DEBUG") as process:
        (first,) = stand_in.wait(stand_in.submit(prompt="a red circle", seed=3))
        for _ in range(50):
            victim = stand_in.submit(**ENDLESS)
            next_one = stand_in.submit(prompt="a red circle", seed=3)
            until_running(stand_in, process, victim)
            time.sleep(rng.uniform(0, 1.0))
            cancelled_at = time.time()
            stand_in.cancel(victim)
            (after,) = stand_in.wait(next_one, seconds=60)
            assert picture(after) == picture(first)
            seconds = next(line for line in process.lines() if line.get("job") == next_one and "seconds" in line)
            step_seconds.append(seconds["seconds"]["denoise"] / 8)
            released = next(line for line in process.lines() if line.get("device") == "free" and line["job"] == victim)
            free_after.append(released["at"] - cancelled_at)
    turns = [(line["at"], line["device"]) for line in process.lines() if "at" in line]
    assert [kind for _, kind in sorted(turns)] == ["taken", "free"] * (len(turns) // 2), "two at once"
    assert len(turns) >= 2 * 101
    late = [after - step for after, step in zip(free_after, step_seconds, strict=True)]
    print(f"free after {max(free_after):.3f} s at most, {sorted(free_after)[25]:.3f} s in the middle")
    assert max(late) < max(0.2, 5 * max(step_seconds))


@pytest.mark.slow
def test_five_hundred_jobs_with_faults_a_sigterm_and_a_restart(tmp_path: Path) -> None:
    """Every job ends with exactly one result, no progress follows it, and memory does not grow."""
    held = StandIn(Faults(0.05, seed=5), poll_seconds=0.5)
    log = tmp_path / "log"
    ids = [
        held.submit(prompt="a red circle", seed=i, width=64, height=64, num_inference_steps=4, num_images=1 + i % 3)
        if i % 10 else held.submit(prompt="a red circle", width=63)
        for i in range(500)
    ]  # fmt: skip
    with worker(held, log, PROGRESS_INTERVAL="0.1") as process:
        held.wait(*ids[:120], seconds=600)
        memory_first = resident_megabytes(process)
        held.wait(*ids[:400], seconds=600)
        memory_last = resident_megabytes(process)
        assert process.terminate() == 0
    assert any(job.status == "IN_QUEUE" for job in held.jobs.values()), "it was ended in the middle"
    with worker(held, log, PROGRESS_INTERVAL="0.1") as process:
        jobs = held.wait(*ids, seconds=600)
        deadline = time.monotonic() + 300
        while not {"job-take", "job-done", "job-stop", "ping"} <= {route for route, _ in held.faults.injected}:
            assert time.monotonic() < deadline, held.faults.injected
            time.sleep(0.1)  # it polls on, and each poll may meet one
        assert process.terminate() == 0
    assert [len(job.results) for job in jobs] == [1] * 500
    assert [len(job.taken) for job in jobs] == [1] * 500
    assert [job.status for job in jobs] == [("COMPLETED" if i % 10 else "FAILED") for i in range(500)]
    for job in jobs:
        assert all(at <= job.results[0][0] for at, _ in job.progress)
    print(f"faults {sum(held.faults.injected.values())}, memory {memory_first:.0f} -> {memory_last:.0f} MB")
    assert memory_last - memory_first < 40
    held.close()


def resident_megabytes(process: WorkerProcess) -> float:
    status = Path(f"/proc/{process.process.pid}/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
