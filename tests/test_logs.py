"""What the log says of a job, and what it never says."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator

import pytest

from handler import respond
from src.catalog import get_model
from src.engine import Engine
from src.job import Job
from src.redaction import keep_secret
from src.serving import logs
from src.settings import Settings
from tests.fakes import FakePipeline

MODEL = get_model("flux-shapes")


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    level, propagate = logs.log.level, logs.log.propagate
    hooks = sys.excepthook, threading.excepthook
    yield
    sys.excepthook, threading.excepthook = hooks
    for handler in [handler for handler in logs.log.handlers if type(handler) is logging.StreamHandler]:
        logs.log.removeHandler(handler)  # and not pytest's own, which it takes off itself
    logs.log.propagate = propagate
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


SECRET = "Planted/in+the%log="
QUOTED = "Planted%2Fin%2Bthe%25log%3D"
OTHERS = (
    "httpx",
    "httpcore.http11",
    "urllib3.connectionpool",
    "botocore.auth",
    "huggingface_hub",
    "aiohttp.client",
    "asyncio",
)


@pytest.fixture
def configured() -> None:
    keep_secret(SECRET)
    logs.configure(Settings())


@pytest.mark.parametrize("name", OTHERS)
def test_no_librarys_logger_holds_a_secret(
    name: str, configured: None, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logging.getLogger(name)
    caplog.set_level(logging.DEBUG, name)
    logger.debug("HTTP Request: %s %s", "GET", f"https://a.test/x?key={QUOTED}")
    logger.debug("sent %(header)s", {"header": f"Bearer {SECRET}"})
    logger.debug({"Authorization": "Basic dXNlcjpnZWhlaW0="})
    logger.warning("%s", URL(f"https://user:{QUOTED}@a.test/?token=geheim"))
    logger.warning("%d", "no number")
    try:
        raise ConnectionError(f"https://a.test/?token=geheim {SECRET}")
    except ConnectionError:
        logger.exception("failed")
    written = caplog.text + capsys.readouterr().err
    assert all(secret not in written for secret in (SECRET, QUOTED, "geheim", "dXNlcjpnZWhlaW0"))
    assert "HTTP Request: GET https://a.test/x?[redacted]" in written
    assert "ConnectionError: https://a.test/?[redacted] [redacted]" in written


class URL:
    """As httpx has it: no text, and printed as one."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __str__(self) -> str:
        return self._text


def test_what_reads_a_records_arguments_still_finds_them(configured: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "uvicorn.access")
    logging.getLogger("uvicorn.access").info('%s - "%s %s" %d', "1.2.3.4:5", "POST", f"/run?key={SECRET}", 200)
    (record,) = caplog.records
    assert record.args == ("1.2.3.4:5", "POST", "/run?[redacted]", 200)


@pytest.mark.parametrize("endpoint", ["", "flux"])
def test_the_sdks_logger_holds_no_secret(
    endpoint: str, configured: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from runpod.serverless.modules import rp_http, rp_job, rp_ping

    monkeypatch.setenv("RUNPOD_ENDPOINT_ID", endpoint)
    url = f"http://a.test/job-done/worker/1?gpu=none&key={QUOTED}&isStream=false"
    rp_http.log.error(f"Failed to return job results. | 404, message='Not Found', url='{url}'", "job-1")
    rp_ping.log.error(ConnectionError(f"{url} {SECRET} \ud800"))
    rp_job.log.info(f"rp_job | get_job: {url}", SECRET)
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 3
    assert SECRET not in out
    assert QUOTED not in out
    assert "job-1" in out


def test_an_exception_that_nobody_caught_is_written_without_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    keep_secret(SECRET)
    logs.configure(Settings())

    def fail() -> None:
        raise ValueError(SECRET)

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        fail()
    except ValueError as error:
        sys.excepthook(ValueError, error, error.__traceback__)
    text = capsys.readouterr().err
    assert text.count("CRITICAL worker: nobody caught a ValueError") == 2
    assert text.count("ValueError: [redacted]") == 2
    assert SECRET not in text


def test_json_lines_hold_no_secret_and_stay_json(capsys: pytest.CaptureFixture[str]) -> None:
    keep_secret(SECRET)
    logs.configure(Settings(runpod_endpoint_id="flux"))
    try:
        raise ValueError(f'password="{SECRET}" \\ "token": "x"')
    except ValueError:
        logs.log.exception("job %s", SECRET, extra={"facts": {"job": SECRET, "outcome": "failed"}})
    line = json.loads(capsys.readouterr().err)
    assert SECRET not in str(line)
    assert (line["requestId"], line["outcome"]) == ("[redacted]", "failed")
    assert "ValueError: password=" in line["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"a secret prompt of a fox": 1},
        {"a_secret_prompt": 1},
        {"outpaint": {"left": 8, "a_secret_prompt": 1}},
        {"loras": [{"path": "a/b", "a_secret_prompt": 1}]},
        {"controls": [{"image": "x", "a_secret_prompt": {"a_secret_prompt": 1}}]},
        {"parameters": {"a_secret_prompt": 1}},
    ],
    ids=range(6),
)
def test_a_prompt_that_is_sent_as_a_name_is_not_logged(
    fields: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    run(Settings(log_level="DEBUG"), **fields)
    text = capsys.readouterr().err
    assert "invalid_request: " in text
    assert "an unknown field" in text
    assert "secret" not in text
