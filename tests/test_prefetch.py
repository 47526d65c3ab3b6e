"""How much work is held in advance, and how much is asked for."""

from __future__ import annotations

import time

import pytest

from src.job import Job, Progress
from src.serving.prefetch import MAX_DELIVERED_BYTES, MAX_DELIVERING, Held, Prefetch
from src.settings import MAX_PREFETCH


def queued(work: float | None = None) -> Job:
    job = Job()
    job.work = work
    job.report(Progress("queued"))
    return job


def on_device(seconds_ago: float = 0.0, work: float | None = None) -> Job:
    job = queued(work)
    job.on_device_since = time.monotonic() - seconds_ago
    return job


def learned(seconds: float, work: float | None = None, trip: float = 0.02) -> Prefetch:
    prefetch = Prefetch()
    for _ in range(20):
        prefetch.observe(seconds, work)
    prefetch.trip(trip)
    return prefetch


@pytest.mark.parametrize(("seconds", "jobs"), [(0.001, 18), (0.05, 4), (0.1, 2), (0.3, 1), (3, 1), (300, 1)])
def test_an_empty_worker_asks_for_what_lasts_until_more_can_come(seconds: float, jobs: int) -> None:
    assert learned(seconds).wanted([]) == jobs


def test_a_job_that_has_long_to_go_is_enough() -> None:
    prefetch = learned(4)
    assert prefetch.wanted([Held(queued())]) == 0
    assert prefetch.wanted([Held(on_device(1))]) == 0
    assert prefetch.wanted([], coming=1) == 0


def test_the_next_is_asked_for_when_the_last_is_nearly_done() -> None:
    prefetch = learned(4)
    assert prefetch.wanted([Held(on_device(3.9))]) == 1
    assert prefetch.wanted([Held(on_device(3.9)), Held(queued())]) == 0
    assert prefetch.wanted([Held(on_device(1), left=0.1)]) == 1, "its steps know better"
    assert prefetch.wanted([Held(on_device(100), left=5)]) == 0


def test_it_is_asked_for_earlier_where_runpod_is_further() -> None:
    job = [Held(on_device(3.4))]
    assert learned(4, trip=0.02).wanted(job) == 0
    assert learned(4, trip=0.4).wanted(job) == 1


def test_a_poll_that_waited_for_a_job_does_not_count_as_the_way() -> None:
    prefetch = learned(4, trip=0.02)
    lead = prefetch.lead
    for _ in range(15):
        prefetch.trip(5)
    assert prefetch.lead == lead


def test_jobs_of_other_lengths_differ_by_their_work() -> None:
    prefetch = learned(4, work=100)
    assert prefetch.wanted([Held(queued(work=100))]) == 0
    assert prefetch.wanted([Held(queued(work=1))]) == 1, "a short one does not last"


def test_what_is_being_delivered_does_not_count_up_to_a_bound() -> None:
    prefetch, delivering = learned(4), on_device(4)
    delivering.device_seconds = 4
    assert prefetch.wanted([Held(delivering)] * (MAX_DELIVERING - 1)) == 1
    assert prefetch.wanted([Held(delivering)] * MAX_DELIVERING) == 0
    assert prefetch.wanted([], delivered_bytes=MAX_DELIVERED_BYTES) == 0


def test_a_job_that_is_read_for_long_is_not_counted_on() -> None:
    prefetch, job = learned(4), Job()
    assert prefetch.wanted([Held(job)]) == 0
    job.arrived -= 10
    assert prefetch.wanted([Held(job)]) == 1
    assert prefetch.wanted([Held(job)] * MAX_PREFETCH) == 0


def test_jobs_that_take_long_to_read_are_asked_for_earlier() -> None:
    prefetch = learned(1)
    for _ in range(20):
        prefetch.observe(1, reading=2)
    assert prefetch.wanted([Held(on_device()), Held(queued())]) == 1
    for _ in range(20):
        prefetch.observe(1, reading=1_000)
    assert prefetch.wanted([Held(on_device()), *[Held(queued())] * 3]) == 0, "and not for ever"


def test_before_anything_is_seen_it_is_modest() -> None:
    assert Prefetch().wanted([]) == 1
    assert Prefetch().wanted([Held(queued())]) == 0


def test_a_fixed_number_stays() -> None:
    prefetch = Prefetch(5)
    prefetch.observe(100)
    assert prefetch.wanted([]) == 5
    assert prefetch.wanted([Held(queued())] * 3, coming=2) == 0
    delivering = on_device()
    delivering.device_seconds = 1
    assert prefetch.wanted([Held(delivering)]) == 5


def test_each_device_has_something_to_do() -> None:
    prefetch = learned(4)
    prefetch.devices = 2
    assert prefetch.wanted([]) == 2
    assert prefetch.wanted([Held(on_device(1))]) == 1, "one that has long to go keeps one of them busy"
    assert prefetch.wanted([Held(on_device(1)), Held(on_device(1))]) == 0
    assert prefetch.wanted([Held(on_device(3.9)), Held(on_device(1))]) == 1
    assert prefetch.wanted([Held(on_device(3.9)), Held(on_device(1)), Held(queued())]) == 0
    assert prefetch.wanted([Held(on_device(3.9)), Held(on_device(3.9)), Held(queued())]) == 1
    assert prefetch.wanted([], coming=2) == 0


def test_a_fixed_number_is_held_for_each_device() -> None:
    prefetch = Prefetch(2)
    prefetch.devices = 3
    assert prefetch.wanted([Held(on_device())]) == 5
