"""What the log says of a job, and what it never says."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from handler import respond
from src.catalog import get_model
from src.engine import Engine
from src.job import Job
from src.serving import logs
from src.settings import Settings
from tests.fakes import FakePipeline

MODEL = get_model("flux-shapes")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    handlers, level, propagate = list(logs.log.handlers), logs.log.level, logs.log.propagate
    yield
    logs.log.handlers[:], logs.log.propagate = handlers, propagate
    logs.log.setLevel(level)


def run(settings: Settings, *failures: Exception, **fields: object) -> None:
    logs.configure(settings)
    event = {"id": "job-1", "input": {"prompt": "a secret prompt", "width": 64, "height": 128, **fields}}
    respond(event, Job.of(event), lambda: settings, lambda: Engine(FakePipeline(*failures), MODEL, None))


def test_a_job_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    run(Settings(), num_images=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "INFO worker: job job-1: success | mode text-to-image size 64x128 steps 8 images 2 | prepare "
    )
    assert "denoise" in line
    assert "secret" not in line


def test_on_runpod_it_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    run(Settings(runpod_endpoint_id="flux"))
    line = json.loads(capsys.readouterr().err)
    expected = {"requestId": "job-1", "level": "INFO", "outcome": "success", "size": "64x128", "steps": 8, "images": 1}
    assert {name: line[name] for name in expected} == expected
    assert set(line["seconds"]) == {"prepare", "queued", "encode_prompt", "denoise", "decode", "encode_images"}


def test_a_refused_request_is_one_line_without_its_values(capsys: pytest.CaptureFixture[str]) -> None:
    run(Settings(runpod_endpoint_id="flux"), negative_prompt="another secret", width=63)
    line = json.loads(capsys.readouterr().err)
    assert (line["outcome"], line["level"]) == ("invalid_request", "INFO")
    assert line["error"] == "invalid_request: width, negative_prompt"
    assert "secret" not in json.dumps(line)


def test_a_failure_brings_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    run(Settings(), RuntimeError("hf_abcdefghijkl is wrong"))
    text = capsys.readouterr().err
    assert text.startswith("ERROR worker: job job-1: generation_failed: the model refused")
    assert "fakes.py" in text
    assert "hf_abcdefghijkl" not in text


def test_log_level_counts(capsys: pytest.CaptureFixture[str]) -> None:
    run(Settings(log_level="WARNING"))
    assert capsys.readouterr().err == ""
    assert logging.getLogger("worker").level == logging.WARNING
