"""How many jobs are held for which lengths, and how seldom that changes."""

from __future__ import annotations

import random

import pytest

from src.serving.concurrency import Concurrency
from src.settings import MAX_PREFETCH


@pytest.mark.parametrize(("seconds", "jobs"), [(0.01, MAX_PREFETCH), (0.3, 8), (1, 3), (3, 2), (30, 2), (90, 1)])
def test_long_jobs_hold_few_and_short_ones_many(seconds: float, jobs: int) -> None:
    prefetch = Concurrency()
    for _ in range(20):
        prefetch.observe(seconds)
        assert prefetch.jobs == jobs


def test_before_anything_is_seen_it_is_modest() -> None:
    assert Concurrency().jobs == 2


def test_a_fixed_number_stays() -> None:
    prefetch = Concurrency(5)
    prefetch.observe(100)
    assert prefetch.jobs == 5


def test_it_follows_a_change_and_ignores_an_exception() -> None:
    prefetch = Concurrency()
    for _ in range(10):
        prefetch.observe(0.3)
    prefetch.observe(3)
    assert prefetch.jobs == 8, "one long job is no reason to drain the worker"
    for _ in range(10):
        prefetch.observe(3)
    assert prefetch.jobs == 2
    for _ in range(20):
        prefetch.observe(0.3)
    assert prefetch.jobs == 8


def test_uneven_jobs_seldom_change_it() -> None:
    prefetch, rng, changes = Concurrency(), random.Random(0), 0
    for _ in range(200):
        before = prefetch.jobs
        prefetch.observe(rng.uniform(0.7, 1.3))
        changes += prefetch.jobs != before
    assert changes <= 4
