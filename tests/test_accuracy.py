"""The shipped model's promise, over every colour, shape and background."""

from __future__ import annotations

import pytest

from benchmarks.accuracy import generate, measure
from benchmarks.wordings import FORMS, newcomers
from src.catalog import SCHEDULERS
from training import judge
from training.report import sample_grid
from training.scenes import every_prompt


@pytest.mark.slow
def test_the_shipped_model_draws_what_it_is_asked_for() -> None:
    accuracy, misses = measure()
    assert accuracy["prompts"] == 8 * 5 * 7
    assert accuracy["centre"] >= 0.97, misses
    assert accuracy["background"] >= 0.97, misses
    assert accuracy["shape"] >= 0.85, misses


@pytest.mark.slow
def test_the_shipped_model_understands_newcomers() -> None:
    accuracy, misses = measure(newcomers(each=3))
    assert accuracy["prompts"] == 3 * len(FORMS) == 180
    assert min(accuracy[name] for name in ("centre", "background", "shape")) >= 0.95, misses


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_makes_a_right_picture(scheduler: str) -> None:
    prompts = list(every_prompt())[::7]
    assert len(prompts) == 40
    right = 0
    for seed, (prompt, scene) in enumerate(prompts):
        picture = generate(prompt, seed=seed, scheduler=scheduler)
        seen = judge.centre_colour(picture), judge.background_colour(picture)
        right += seen == (scene.things[0].colour, scene.background)
    assert right >= 36


def test_the_samples_make_a_sheet() -> None:
    assert sample_grid(generate).width > 4 * 128
