"""The shipped model's promise, over every colour, shape and background."""

from __future__ import annotations

import pytest

from benchmarks.accuracy import generate, measure
from training.report import sample_grid


@pytest.mark.slow
def test_the_shipped_model_draws_what_it_is_asked_for() -> None:
    accuracy, misses = measure()
    assert accuracy["prompts"] == 8 * 5 * 7
    assert accuracy["centre"] >= 0.97, misses
    assert accuracy["background"] >= 0.97, misses
    assert accuracy["shape"] >= 0.85, misses


def test_the_samples_make_a_sheet() -> None:
    assert sample_grid(generate).width > 4 * 128
