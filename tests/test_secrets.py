"""Secrets planted in every place, by their values: they come out of none."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from handler import handler, respond
from src.catalog import get_model
from src.engine import Engine
from src.job import Job
from src.outputs import Loaded
from src.redaction import keep_secret
from src.response.describe import describe
from src.response.encode import read_parameters
from src.settings import Settings
from tests.conftest import opened
from tests.fakes import FakePipeline
from tests.runpod_stand_in import Faults, StandIn, WorkerProcess, worker

MODEL = get_model("flux-shapes")
PLANTED = {
    "HF_TOKEN": "planted+hub/token=1",
    "CIVITAI_TOKEN": "planted&civitai?token@2",
    "RUNPOD_AI_API_KEY": "PlantedKeyOfTheWorker3",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret:4",
    "RUNPOD_SECRET_mine": "planted%secret{5}",
    "REDIS_PASSWORD": "planted#password'6",
}
IN_ADDRESSES = "PlantedKeyOfAWebhook7"
EVERY = [*PLANTED.values(), IN_ADDRESSES]


def spellings(secret: str) -> set[str]:
    return {
        secret,
        quote(secret),
        quote(secret, safe=""),
        json.dumps(secret)[1:-1],
        base64.b64encode(secret.encode()).decode()[:-4],
    }


def assert_none(text: str, where: str = "") -> None:
    found = [secret for secret in EVERY if any(spelled in text for spelled in spellings(secret))]
    assert found == [], where


def hostile(secret: str) -> list[dict[str, Any]]:
    """Requests that hold `secret` wherever a text may stand."""
    coded, address = base64.b64encode(f"user:{secret}".encode()).decode(), quote(secret, safe="")
    return [
        {"prompt": "x", secret: 1, "width": secret, "scheduler": secret, "seed": [secret], f"x{coded}": 1},
        {"prompt": "x", "outpaint": {secret: 1}, "loras": [{"path": secret, secret: secret}], "size": secret},
        {"prompt": "x", "lora_path": f"{secret}/{secret}", "control_type": secret, "image": secret, "mask": address},
        {"prompt": "x", "init_image": f"https://user:{secret}@127.0.0.1/{address}?key={address}#{coded}"},
        {"prompt": "x", "lora_path": f"https://127.0.0.1/{address}.safetensors?x={address}", "style": secret},
        {
            "prompt": "x",
            "loras": [{"path": "someone/nothing", "revision": secret, "weight_name": f"{secret}.safetensors"}],
        },
        {
            "prompt": "x" * 6_000 + secret,
            "negative_prompt": f"{secret}\0",
            "parameters": {secret: secret, "seed": secret},
        },
        {
            "prompt": "x",
            "num_images": {secret: {secret: secret}},
            "quality": secret,
            "input_image": secret,
            "image_url": "x",
        },
        {secret: secret},
    ]


@pytest.fixture
def planted() -> None:
    keep_secret(*EVERY)


@pytest.mark.parametrize("secret", EVERY)
def test_none_comes_back_in_a_refusal(secret: str, planted: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for fields in hostile(secret):
        for more in ({}, {"dry_run": True}, {"describe": True}):
            response = handler({"id": f"job-{secret}", "input": {**fields, **more}})
            assert_none(json.dumps(response, ensure_ascii=False), str(response)[:2_000])
    for event in (
        {secret: secret},
        secret,
        [secret],
        {"input": secret},
        {
            "input": {"prompt": "x"},
            "s3Config": {
                "endpointUrl": f"https://127.0.0.1/{secret}",
                "accessId": secret,
                "accessSecret": secret,
                "bucketName": secret,
            },
        },
    ):
        assert_none(json.dumps(handler(event), ensure_ascii=False))  # type: ignore[arg-type]
    assert_none(caplog.text)


def test_none_is_in_a_picture_or_what_is_said_of_it(planted: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = " ".join(EVERY)
    words = {"prompt": f"a fox, {secret}", "prompt_2": secret, "negative_prompt": secret, "true_cfg_scale": 2}
    fields = {**words, "width": 64, "height": 64}
    for format in ("PNG", "JPEG", "WEBP"):
        event = {
            "id": "job",
            "input": {
                **fields,
                "output_format": format,
                "num_inference_steps": 1,
                "style": secret,
                "lora_scales": secret,
            },
        }
        response = handler(event)
        assert response["status"] == "success"
        assert_none(json.dumps(response["metadata"], ensure_ascii=False))
        (picture,) = opened(response)
        assert_none(json.dumps(read_parameters(picture)))
        assert_none(base64.b64decode(response["images"][0]).decode("latin-1"))
    plan = handler({"input": {**fields, "dry_run": True}})
    assert plan["plan"]["prompts"] == ["a fox, " + " ".join(["[redacted]"] * len(EVERY))]
    assert_none(json.dumps(plan))
    assert_none(caplog.text)


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, OSError, LookupError, MemoryError])
def test_none_is_in_a_traceback(kind: type[Exception], planted: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for secret in EVERY:
        failure = kind(f"{'x ' * 5_000}{secret} at https://a.test/?k={quote(secret, safe='')}")
        failure.__cause__ = ConnectionError(secret)
        failure.add_note(secret)
        engine = Engine(FakePipeline(failure, failure, failure), MODEL, None)  # short memory is tried again
        event = {"id": "job", "input": {"prompt": "x", "width": 64, "height": 64}}
        response = respond(event, Job("job"), Settings, lambda engine=engine: engine)  # type: ignore[misc]
        assert response["status"] == "error"
        assert_none(json.dumps(response, ensure_ascii=False))
        assert len(json.dumps(response)) < 100_000
    assert_none(caplog.text)


def test_none_is_in_a_description(planted: None, tmp_path: Path) -> None:
    name = EVERY[2]
    (tmp_path / f"{name}.safetensors").write_bytes(b"")
    settings = Settings(lora_dir=tmp_path, hf_token=PLANTED["HF_TOKEN"], redux_model=name)
    loaded = Loaded((f"{name}.safetensors", f"https://a.test/{name}", name), (), {"device": name})
    assert_none(json.dumps(describe(MODEL, name, settings, loaded)))


def test_settings_that_are_wrong_say_none(planted: None) -> None:
    from src.errors import InvalidSettings
    from src.redaction import redact

    wrong = {
        "HF_TOKEN": "planted-but-wrong-\u00e9-9",
        "BUCKET_ENDPOINT_URL": f"ftp://user:{EVERY[0]}@x",
        "BATCH_SIZE": EVERY[0],
    }
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment(wrong)
    text = redact(f"{caught.value.code}: {caught.value}")
    assert_none(text)
    assert "planted-but-wrong" not in text
    assert "BATCH_SIZE" in text


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    held = StandIn(Faults(0.3, kinds=("500", "drop")))
    yield held
    held.close()


@pytest.fixture(scope="module")
def process(stand_in: StandIn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    environment = {
        name: address.replace("rpa_in_the_query", IN_ADDRESSES)
        for name, address in stand_in.environment().items()
        if name.startswith("RUNPOD_WEBHOOK")
    }
    environment["RUNPOD_WEBHOOK_PING"] += f"?key={IN_ADDRESSES}"
    log = tmp_path_factory.mktemp("worker") / "log"
    with worker(stand_in, log, LOG_LEVEL="DEBUG", PROGRESS_INTERVAL="0.1", **PLANTED, **environment) as held:
        yield held


def test_a_worker_under_faults_writes_and_posts_none(stand_in: StandIn, process: WorkerProcess) -> None:
    ids = [stand_in.submit(**fields) for secret in EVERY for fields in hostile(secret)]
    ids += [stand_in.submit(prompt=f"a fox {secret}", num_inference_steps=1, width=64, height=64) for secret in EVERY]
    for job in stand_in.wait(*ids):
        assert_none(json.dumps([job.results, job.progress], ensure_ascii=False))
    text = process.text()
    assert "invalid_request" in text
    assert "success" in text
    assert_none(text, text[-3_000:])
