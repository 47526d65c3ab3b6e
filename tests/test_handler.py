"""The whole road on the shipped model: the picture shows what the prompt says, and the same request gives it again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from handler import handler, respond
from src.catalog import FORMATS, get_model
from src.engine import Engine
from src.errors import ModelUnavailable
from src.job import Job
from src.response.encode import read_parameters
from src.settings import ROOT, Settings
from tests.conftest import opened
from tests.fakes import FakePipeline
from training import judge

Generate = Callable[..., dict[str, Any]]
MODEL = get_model("flux-shapes")


@pytest.mark.parametrize(
    ("prompt", "centre", "background", "shape"),
    [
        ("a red circle on a blue background", "red", "blue", "circle"),
        ("a large white star on a black background", "white", "black", "star"),
        ("green triangle, yellow background", "green", "yellow", "triangle"),
        ("On a white background, a violet box", "purple", "white", "square"),
        ("please draw a big orange rhombus against a black backdrop", "orange", "black", "diamond"),
    ],
)
def test_the_picture_shows_what_the_prompt_says(
    prompt: str, centre: str, background: str, shape: str, generate: Generate
) -> None:
    (picture,) = opened(generate(prompt, seed=1))
    assert (judge.centre_colour(picture), judge.background_colour(picture)) == (centre, background)
    assert judge.shape(picture) == shape


def test_the_answer_is_the_contracts(generate: Generate) -> None:
    response = generate("a red circle", seed=5, num_images=2)
    assert set(response) == {"status", "images", "metadata"}
    assert set(response["metadata"]) >= {
        "model", "model_revision", "mode", "prompt", "seed", "seeds", "width", "height", "num_inference_steps",
        "guidance_scale", "num_images", "output_format", "scheduler", "loras", "inference_time", "timings", "warnings",
    }  # fmt: skip
    expected = {
        "model": "flux-shapes", "mode": "text-to-image", "prompt": "a red circle", "seed": 5, "seeds": [5, 6],
        "width": 128, "height": 128, "num_inference_steps": 8, "num_images": 2, "output_format": "PNG", "warnings": [],
    }  # fmt: skip
    assert {name: response["metadata"][name] for name in expected} == expected
    timings = response["metadata"]["timings"]
    assert all(timings[phase] > 0 for phase in ("encode_prompt", "denoise", "decode", "encode_images"))
    assert timings["total"] >= response["metadata"]["inference_time"] > 0
    json.dumps(response, allow_nan=False)


def test_what_is_wrong_of_the_bucket_comes_with_all_other_faults() -> None:
    response = handler({"input": {"prompt": "x", "width": "wide"}, "s3Config": {"accessSecret": "very-secret"}})
    assert {error["field"] for error in response["errors"]} == {"width", "s3Config"}
    assert "very-secret" not in json.dumps(response)


def test_another_seed_gives_another_picture_and_the_same_seed_the_same_bytes(generate: Generate) -> None:
    first, other, again = (generate("a red circle", seed=seed)["images"] for seed in (1, 2, 1))
    assert first == again
    assert first != other


def test_every_picture_of_a_batch_is_the_picture_of_its_seed(generate: Generate) -> None:
    batch = generate("a red circle", seed=7, num_images=4)
    assert len(set(batch["images"])) == 4
    for i, seed in enumerate(batch["metadata"]["seeds"]):
        assert generate("a red circle", seed=seed)["images"] == [batch["images"][i]]


@pytest.mark.parametrize("fields", [{}, {"scheduler": "lcm"}])
def test_pictures_drawn_at_once_show_the_same(fields: dict[str, Any]) -> None:
    from handler import get_engine

    event = {"input": {"prompt": "a red circle on a blue background", "seed": 7, "num_images": 3, **fields}}
    together = respond(event, Job(), lambda: Settings(batch_size=2), get_engine)
    for one, other in zip(opened(together), opened(handler(event)), strict=True):
        assert np.abs(np.asarray(one, float) - np.asarray(other, float)).mean() < 0.1


def test_a_picked_seed_is_answered_and_repeats(generate: Generate) -> None:
    picked = generate("a red circle")
    assert generate("a red circle", seed=picked["metadata"]["seed"])["images"] == picked["images"]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (72, 200), (136, 104), (256, 128)])
def test_exactly_the_requested_size_comes_back(width: int, height: int, generate: Generate) -> None:
    (picture,) = opened(generate("a red circle", width=width, height=height, num_inference_steps=1))
    assert picture.size == (width, height)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_opens_and_repeats_itself(format: str, generate: Generate) -> None:
    response = generate("a blue star", seed=3, num_images=2, output_format=format.lower(), output_quality=90)
    for picture, seed in zip(opened(response), (3, 4), strict=True):
        assert (picture.format, picture.size) == (format, (128, 128))
        event = read_parameters(picture)
        assert event is not None
        assert event["model"] == "flux-shapes"
        assert event["input"]["seed"] == seed
        assert handler(event)["images"] == [response["images"][seed - 3]]


def test_a_negative_prompt_changes_the_picture(generate: Generate) -> None:
    plain = generate("a circle", seed=1)
    steered = generate("a circle", seed=1, negative_prompt="a white background", true_cfg_scale=2)
    assert plain["images"] != steered["images"]
    assert steered["metadata"]["negative_prompt"] == "a white background"


def test_more_steps_are_taken_when_asked(generate: Generate) -> None:
    two, eight = (opened(generate("a red circle", seed=1, num_inference_steps=n))[0] for n in (2, 8))
    assert np.abs(np.asarray(two, float) - np.asarray(eight, float)).mean() > 0.5


def test_a_long_prompt_is_warned_of(generate: Generate) -> None:
    warnings = generate("red " * 100)["metadata"]["warnings"]
    limits = [warning.partition(" tokens for ")[2] for warning in warnings]
    assert limits == ["CLIP, which reads the first 77", "T5, which reads the first 32"]


def test_no_warning_for_a_prompt_that_fits(generate: Generate) -> None:
    assert generate("a red circle", guidance_scale=5)["metadata"]["warnings"] == [
        "guidance_scale has no effect on flux-shapes: it was trained without guidance"
    ]


def answer(engine: Engine, settings: Settings | None = None, **fields: Any) -> dict[str, Any]:
    return respond(
        {"id": "job", "input": {"prompt": "x", **fields}}, Job("job"), lambda: settings or Settings(), lambda: engine
    )


def test_a_failure_is_answered_and_so_is_the_next_request() -> None:
    engine = Engine(FakePipeline(RuntimeError("Expected tensor")), MODEL, None)
    failed = answer(engine)
    assert (failed["status"], failed["error_code"]) == ("error", "generation_failed")
    assert failed["error"].startswith("generation_failed: ")
    assert "fakes.py" in failed["traceback"]
    assert answer(engine)["status"] == "success"


def test_a_fault_of_ours_is_answered_too(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(FakePipeline(LookupError("Bearer abcdef")), MODEL, None)
    failed = answer(engine)
    assert failed["error"] == "internal_error: LookupError: Bearer [redacted]"
    assert "abcdef" not in caplog.text
    assert "fakes.py" in caplog.text, "the log keeps the traceback"
    assert "job job: internal_error" in caplog.text


def test_the_traceback_stays_in_the_log_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(FakePipeline(RuntimeError("no")), MODEL, None)
    failed = answer(engine, Settings(include_traceback=False))
    assert "traceback" not in failed
    assert "fakes.py" in caplog.text


def test_a_model_that_cannot_be_loaded_is_an_answer() -> None:
    def unavailable() -> Engine:
        raise ModelUnavailable("FLUX.1-dev: is gated")

    failed = respond({"input": {"prompt": "x"}}, Job(), Settings, unavailable)
    assert failed["error"] == "model_unavailable: FLUX.1-dev: is gated"


def test_settings_bound_requests() -> None:
    engine = Engine(FakePipeline(), MODEL, "abc")
    assert answer(engine, Settings(max_pixels=64 * 64))["error_code"] == "invalid_request"
    assert answer(engine)["metadata"]["model_revision"] == "abc"


def test_importing_the_handler_loads_no_torch_and_starts_nothing() -> None:
    script = (
        "import sys, handler; print([m for m in ('torch', 'diffusers', 'transformers', 'runpod') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_the_specifications_one_liner() -> None:
    event = {"input": {"prompt": "test", "width": 512, "height": 512, "num_inference_steps": 1}}
    assert handler(event)["metadata"]["width"] == 512
