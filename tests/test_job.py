"""A job that is told to stop, or runs out of time, at every place it can be."""

from __future__ import annotations

import threading
import time

import pytest

from src.errors import Cancelled, TimedOut
from src.job import Job, Progress
from src.job_queue import JobQueue


def test_a_job_is_named_by_its_event() -> None:
    assert Job.of({"id": "abc"}).id == "abc"
    assert Job.of({}).id == Job.of("no event").id == "local"
    assert len(Job.of({"id": "x" * 5000}).id) < 120
    assert Job.of({"id": ["strange"]}).id == "['strange']"


def test_progress_is_passed_on_and_phases_are_timed() -> None:
    seen: list[Progress] = []
    job = Job(on_progress=seen.append)
    for phase in ("encode_prompt", "denoise", "denoise", "decode"):
        job.report(Progress(phase))
        time.sleep(0.01)
    job.end_phase()
    assert [p.phase for p in seen] == ["encode_prompt", "denoise", "denoise", "decode"]
    assert list(job.seconds) == ["prepare", "encode_prompt", "denoise", "decode"]
    assert job.seconds["denoise"] > 0.019
    assert job.seconds["decode"] > 0.009


def test_a_cancelled_job_stops_at_its_next_report() -> None:
    job = Job()
    job.report(Progress("denoise", 1, 8))
    job.cancel()
    with pytest.raises(Cancelled, match="denoise"):
        job.report(Progress("denoise", 2, 8))


def test_a_job_cancelled_in_the_line_never_gets_the_device() -> None:
    device = JobQueue()
    go = threading.Event()
    first, second = (Job(queue_up=device.ticket) for _ in range(2))
    threading.Thread(target=first.on_device, args=[go.wait]).start()
    threading.Timer(0.05, second.cancel).start()
    with pytest.raises(Cancelled, match="queued"):
        second.on_device(lambda: pytest.fail("cancelled"))
    go.set()
    device.close()


def test_a_deadline_ends_the_work_and_the_waiting() -> None:
    def denoise(job: Job) -> None:
        for step in range(100):
            job.report(Progress("denoise", step, 100))
            time.sleep(0.01)

    with pytest.raises(TimedOut, match=r"longer than REQUEST_TIMEOUT=0.03 seconds \(at denoise\)"):
        denoise(Job(timeout=0.03))

    device = JobQueue()
    go = threading.Event()
    first, second = Job(queue_up=device.ticket), Job(queue_up=device.ticket, timeout=0.03)
    threading.Thread(target=first.on_device, args=[go.wait]).start()
    with pytest.raises(TimedOut, match="queued"):
        second.on_device(lambda: pytest.fail("too late"))
    go.set()
    device.close()


def test_the_device_seconds_are_those_of_the_work() -> None:
    device = JobQueue()
    job = Job(queue_up=device.ticket)
    started = time.perf_counter()
    job.on_device(lambda: time.sleep(0.02))
    assert job.device_seconds is not None
    assert 0.019 < job.device_seconds <= time.perf_counter() - started
    device.close()
