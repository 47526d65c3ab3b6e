"""handler.py as a process: the real SDK, its local run and its local API, the real client."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import runpod

from src.settings import ROOT
from tests.conftest import opened

ENVIRONMENT = {**os.environ, "MODEL_NAME": "flux-shapes"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "handler.py", *arguments],
        cwd=ROOT, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def test_it_runs_test_input_json() -> None:
    finished = run()
    assert finished.returncode == 0, finished.stderr
    assert "completed successfully" in finished.stdout + finished.stderr


@pytest.mark.slow
def test_a_bad_test_input_fails() -> None:
    finished = run("--test_input", '{"input": {"prompt": ""}}')
    assert finished.returncode == 1
    assert "invalid_request: prompt: must not be blank" in finished.stdout + finished.stderr


@pytest.mark.slow
def test_it_does_not_start_without_its_model_and_says_why_in_one_line() -> None:
    finished = run(MODEL_NAME="/no/such/folder")
    assert finished.returncode == 1
    assert re.search(r"^model_unavailable: /no/such/folder: is not a folder", finished.stderr, re.MULTILINE)
    assert "Traceback" not in finished.stderr


def test_it_does_not_start_with_wrong_settings() -> None:
    finished = run(BATCH_SIZE="many", LOG_LEVEL="loud")
    assert finished.returncode == 1
    assert finished.stderr.strip().startswith("invalid_settings: ")
    assert "BATCH_SIZE='many'" in finished.stderr
    assert "LOG_LEVEL='loud'" in finished.stderr


@pytest.fixture(scope="module")
def endpoint() -> Iterator[runpod.Endpoint]:
    """The worker behind --rp_serve_api, and the real client at its door."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://localhost:{port}"
    worker = subprocess.Popen(
        [sys.executable, "handler.py", "--rp_serve_api", "--rp_api_port", str(port)],
        cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(600):
            assert worker.poll() is None, "the worker died"
            try:
                requests.get(f"{url}/docs", timeout=1)
                break
            except requests.RequestException:
                time.sleep(0.1)
        client = runpod.Endpoint(f"localhost:{port}", api_key="local")
        client.rp_client.endpoint_url_base = "http:/"  # the client asks {base}/{endpoint}/run
        yield client
    finally:
        worker.terminate()
        worker.wait(timeout=30)


@pytest.mark.slow
def test_runsync_gives_the_picture(endpoint: runpod.Endpoint) -> None:
    output: dict[str, Any] = endpoint.run_sync({"input": {"prompt": "a red circle", "seed": 1}}, timeout=180)
    assert output["status"] == "success"
    assert opened(output)[0].size == (128, 128)


@pytest.mark.slow
def test_run_gives_the_same_picture_later(endpoint: runpod.Endpoint) -> None:
    now = endpoint.run_sync({"input": {"prompt": "a red circle", "seed": 1}}, timeout=180)
    job = endpoint.run({"input": {"prompt": "a red circle", "seed": 1}})
    # The local API takes POST alone for a status, RunPod's own and so the client GET.
    status = requests.post(f"http://{endpoint.endpoint_id}/status/{job.job_id}", timeout=180).json()
    assert status["status"] == "COMPLETED"
    assert status["output"]["images"] == now["images"]


@pytest.mark.slow
def test_a_bad_request_fails_with_the_contracts_text(endpoint: runpod.Endpoint) -> None:
    url = f"http://{endpoint.endpoint_id}/runsync"
    answer = requests.post(url, json={"input": {"prompt": "x", "width": 513}}, timeout=180).json()
    assert answer["status"] == "FAILED"
    assert answer["error"].startswith("invalid_request: width: must be a multiple of 8, got 513")
