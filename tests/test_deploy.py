"""`python -m deploy`: the plan, the endpoint that it makes, and what it says where it makes none."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.full_size import FULL_SIZE, sizes
from deploy.__main__ import main
from deploy.cards import CARDS, SHARE_OF_PEAK, find_card
from deploy.endpoint import MIN_CUDA
from deploy.plan import WEIGHTS, disk_gb, estimate, init_seconds, measured_seconds, weights_of
from scripts.licences import locked
from src.catalog import MODELS, Model, get_model
from src.errors import InvalidSettings
from src.settings import ROOT, Settings, runpod_api_key
from src.weights.placement import GB
from tests.runpod_rest import GPU_TYPES, KEY, RestStandIn, rest_api

IMAGE = "ghcr.io/someone/flux2-endpoint:1.0"
TOKEN = "{{ RUNPOD_SECRET_HF_TOKEN }}"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[RestStandIn]:
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    with rest_api() as stand_in:
        yield stand_in


def apply(api: RestStandIn, model: str = "FLUX.2-klein-4B", gpu: str = "H100", *more: str) -> int:
    return main(["--model", model, "--gpu", gpu, "--image", IMAGE, "--api", api.url, "--apply", *more])


def card(name: str) -> Any:
    found = find_card(name)
    assert found is not None, name
    return found


# ---- the tables


def test_layers_are_as_large_as_the_models_of_full_size_and_as_the_catalog_says() -> None:
    assert json.loads(WEIGHTS.read_text()) == sizes(), "run python -m benchmarks.full_size"
    for name in FULL_SIZE:
        assert round(weights_of(get_model(name)).size / GB, 1) == get_model(name).download_gb


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_model_of_the_catalog_has_its_layers(model: Model) -> None:
    size = weights_of(model).size / GB
    assert size == pytest.approx(model.download_gb, abs=0.05)
    assert (model.download_gb == 0) == (not model.repo.startswith("black-forest-labs/"))


def test_cards_are_those_of_runpod() -> None:
    assert {kind for card in CARDS for kind in card.types} <= set(GPU_TYPES)
    assert len({card.pool for card in CARDS}) == len(CARDS)


@pytest.mark.parametrize(
    ("name", "found"),
    [("H100", "H100"), ("h100", "H100"), ("4090", "RTX 4090"), ("rtx-4090", "RTX 4090"), ("A6000", "A40"),
     ("AMPERE_80", "A100"), ("NVIDIA H100 80GB HBM3", "H100"), ("nvidia l40s", "L40S")],
)  # fmt: skip
def test_a_card_goes_by_its_name_its_pool_and_its_type(name: str, found: str) -> None:
    assert card(name).name == found


def test_the_driver_is_what_torch_is_built_for() -> None:
    assert locked("cuda")["nvidia-cuda-runtime"].startswith(f"{MIN_CUDA}.")


# ---- the figures


def test_modelled_seconds_are_near_the_published_ones() -> None:
    """FLUX.1-dev on an H100, compiled, bfloat16, 28 steps: 4.21 s; schnell over HTTP, with all around it: 0.72 s."""
    dev = estimate(get_model("FLUX.1-dev"), card("H100"), Settings())
    assert dev.source == "modelled"
    assert 28 * dev.placement.step_seconds == pytest.approx(4.21, rel=0.1)
    assert estimate(get_model("FLUX.1-schnell"), card("H100"), Settings()).seconds == pytest.approx(0.72, rel=0.25)
    assert 0 < SHARE_OF_PEAK < 1


def test_a_thousand_pictures_cost_their_seconds() -> None:
    found = estimate(get_model("FLUX.1-schnell"), card("A100"), Settings())
    assert found.dollars == pytest.approx(1000 * found.seconds * 0.00076)


def test_measured_seconds_win_where_there_are_some(tmp_path: Path) -> None:
    results = {
        "full_size": True,
        "machine": {"card": "NVIDIA H100 80GB HBM3"},
        "models": {"FLUX.1-dev": {"ways": [{"way": "+ compiled blocks", "seconds": 4.2, "seconds_per_step": 0.15}]}},
    }
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(results))
    dev = get_model("FLUX.1-dev")
    assert measured_seconds(dev, card("H100"), file) == pytest.approx(50 * 0.15)
    assert measured_seconds(dev, card("A100"), file) is None, "another card"
    assert measured_seconds(get_model("FLUX.1-schnell"), card("H100"), file) is None, "another model"
    file.write_text(json.dumps({**results, "full_size": False}))
    assert measured_seconds(dev, card("H100"), file) is None, "flux-shapes without a card"


def test_disk_and_start_follow_the_bytes() -> None:
    dev, klein, shapes = (get_model(name) for name in ("FLUX.1-dev", "FLUX.2-klein-4B", "flux-shapes"))
    assert [disk_gb([model], Settings()) for model in (dev, klein, shapes)] == [70, 55, 40]
    assert disk_gb([shapes, dev], Settings()) == 70, "the largest"
    assert disk_gb([klein], Settings(lora_cache_gb=100)) == 135
    assert [init_seconds([model]) for model in (dev, klein)] == [1800, 1080]


# ---- the endpoint

# Container disk, seconds that a start may take, the worker's variables.
WANTED: dict[str, tuple[int, dict[str, str]]] = {
    "FLUX.1-dev": (
        70, {"MODEL_NAME": "black-forest-labs/FLUX.1-dev", "HF_TOKEN": TOKEN, "RUNPOD_INIT_TIMEOUT": "1800"},
    ),
    "FLUX.2-klein-4B": (
        55, {"MODEL_NAME": "black-forest-labs/FLUX.2-klein-4B", "RUNPOD_INIT_TIMEOUT": "1080"},
    ),
    "flux-shapes": (40, {"MODEL_NAME": "flux-shapes"}),
}  # fmt: skip
TYPES = {
    "RTX 4090": ["NVIDIA GeForce RTX 4090"],
    "A40": ["NVIDIA A40", "NVIDIA RTX A6000"],
    "A100": ["NVIDIA A100 80GB PCIe", "NVIDIA A100-SXM4-80GB"],
    "H100": ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"],
}


@pytest.mark.parametrize("gpu", TYPES)
@pytest.mark.parametrize("model", WANTED)
def test_every_setting_of_the_endpoint_is_right(
    model: str, gpu: str, api: RestStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(api, model, gpu) == 0
    disk, env = WANTED[model]
    name = re.sub("[^a-z0-9]+", "-", model.lower())
    assert api.template == {
        "id": "te1",
        "name": name,
        "imageName": IMAGE,
        "isServerless": True,
        "category": "NVIDIA",
        "containerDiskInGb": disk,
        "env": env,
    }
    assert api.endpoint == {
        "id": "en1",
        "name": name,
        "templateId": "te1",
        "computeType": "GPU",
        "gpuTypeIds": TYPES[gpu],
        "gpuCount": 1,
        "minCudaVersion": "13.0",
        "workersMin": 0,
        "workersMax": 3,
        "idleTimeout": 60,
        "executionTimeoutMs": 600_000,
        "scalerType": "QUEUE_DELAY",
        "scalerValue": 4,
        "flashboot": True,
    }
    said = capsys.readouterr().out
    assert f"template {name} is made: te1" in said
    assert "curl -X POST https://api.runpod.ai/v2/en1/runsync" in said
    assert ("Model: https://huggingface.co/" in said) == (model != "flux-shapes")
    assert ("accept the licence at https://huggingface.co/black-forest-labs/FLUX.1-dev" in said) == (
        model == "FLUX.1-dev"
    )
    assert KEY not in said


def test_options_and_settings_reach_the_endpoint(api: RestStandIn) -> None:
    more = [
        "--name", "mine", "--workers-min", "1", "--workers-max", "5", "--idle-timeout", "300", "--no-flash-boot",
        "--network-volume", "vol1", "--registry-auth", "auth1",
        "--set", "MAX_PIXELS=1048576", "--set", "log_level=debug",
    ]  # fmt: skip
    assert apply(api, "FLUX.1-schnell", "A40", *more) == 0
    assert api.template["name"] == api.endpoint["name"] == "mine"
    assert api.template["containerRegistryAuthId"] == "auth1"
    assert api.template["env"] == {
        "MODEL_NAME": "black-forest-labs/FLUX.1-schnell",
        "HF_TOKEN": TOKEN,
        "RUNPOD_INIT_TIMEOUT": "1800",
        "HF_HOME": "/runpod-volume/huggingface",
        "MAX_PIXELS": "1048576",
        "LOG_LEVEL": "debug",
    }
    endpoint = api.endpoint
    assert (endpoint["workersMin"], endpoint["workersMax"], endpoint["idleTimeout"]) == (1, 5, 300)
    assert (endpoint["flashboot"], endpoint["networkVolumeId"]) == (False, "vol1")


def test_a_second_run_makes_and_changes_nothing(api: RestStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(api) == 0
    before = json.dumps(api.kept)
    api.asked.clear()
    capsys.readouterr()
    assert apply(api) == 0
    assert json.dumps(api.kept) == before
    assert [method for method, _, _ in api.asked] == ["GET", "GET", "PATCH"]
    assert set(api.asked[-1][2]) == {"minCudaVersion", "flashboot"}, "what RunPod does not tell is said again"
    assert "template flux-2-klein-4b is as wanted: te1" in capsys.readouterr().out


def test_another_run_changes_what_differs(api: RestStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(api) == 0
    api.asked.clear()
    capsys.readouterr()
    newer = IMAGE.replace("1.0", "1.1")
    assert apply(api, "FLUX.2-klein-4B", "A100", "--image", newer, "--set", "BATCH_SIZE=2") == 0
    changed = [(path, set(body)) for method, path, body in api.asked if method == "PATCH"]
    assert changed == [
        ("/v1/templates/te1", {"imageName", "env"}),
        ("/v1/endpoints/en1", {"gpuTypeIds", "minCudaVersion", "flashboot"}),
    ]
    assert (api.template["imageName"], api.template["env"]["BATCH_SIZE"]) == (newer, "2")
    assert "template flux-2-klein-4b is changed (imageName, env): te1" in capsys.readouterr().out


def test_what_failed_half_way_goes_on(api: RestStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    api.answers["POST", "endpoints"] = (503, "busy")
    assert apply(api) == 1
    assert not api.kept["endpoints"]
    assert apply(api) == 0
    assert api.endpoint["templateId"] == api.template["id"]


# ---- what it says without --apply


def test_without_apply_nothing_is_sent_and_all_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "FLUX.1-dev", "--gpu", "H100"]) == 0
    said = capsys.readouterr().out
    for part in (
        "FLUX.1-dev on H100 (ADA_80_PRO), endpoint flux-1-dev",
        "exact",
        "1000 pictures $",
        "modelled",
        "disk          70 GB",
        "cached model  https://huggingface.co/black-forest-labs/FLUX.1-dev:main",
        "POST https://rest.runpod.io/v1/templates",
        "POST https://rest.runpod.io/v1/endpoints",
    ):
        assert part in said, part
    template, endpoint = (shlex.split(line) for line in said.splitlines() if line.startswith("runpodctl"))
    assert json.loads(template[template.index("--env") + 1]) == WANTED["FLUX.1-dev"][1]
    for flag, value in {
        "--gpu-id": "ADA_80_PRO", "--min-cuda-version": "13.0", "--execution-timeout": "600", "--idle-timeout": "60",
        "--workers-max": "3", "--model-reference": "https://huggingface.co/black-forest-labs/FLUX.1-dev:main",
    }.items():  # fmt: skip
        assert endpoint[endpoint.index(flag) + 1] == value
    assert "--flash-boot=true" in endpoint


def test_torch_is_not_imported() -> None:
    script = (
        "import sys; from deploy.__main__ import main; assert main(['--model', 'FLUX.1-dev', '--gpu', 'H100']) == 0; "
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


def test_a_secret_is_sent_and_not_said(api: RestStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "hf_abcdefghijklmnop"
    assert main(["--model", "FLUX.1-dev", "--gpu", "H100", "--set", f"HF_TOKEN={secret}"]) == 0
    assert apply(api, "FLUX.1-dev", "H100", "--set", f"HF_TOKEN={secret}") == 0
    assert api.template["env"]["HF_TOKEN"] == secret
    said = capsys.readouterr()
    assert secret not in said.out + said.err


# ---- what it says where nothing can be made


def fault(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one sentence on stderr."""
    capsys.readouterr()
    assert main([*arguments]) == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1, text
    assert text.endswith(".\n")
    return text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model FLUX.9 --gpu H100", r"--model FLUX\.9 is none of FLUX\.1-dev, .*flux-shapes\."),
        ("--model FLUX.1-dev --gpu T4", r"--gpu T4 is none of RTX 4090, A40, L40S, A100, H100, H200\."),
        ("--model FLUX.1-dev --gpu H100 --set MAX_PIXEL=1", r"MAX_PIXEL is no setting .* nearest is MAX_PIXELS"),
        ("--model FLUX.1-dev --gpu H100 --set MAX_PIXELS=1", r"MAX_PIXELS='1': .*4096"),
        ("--model FLUX.1-dev --gpu H100 --set BATCH_SIZE", r"--set wants KEY=VALUE, got 'BATCH_SIZE'"),
        ("--model FLUX.1-dev --gpu H100 --set MODEL_NAME=x", r"MODEL_NAME is what --model says"),
        ("--model FLUX.1-dev --gpu H100 --set BUCKET_ENDPOINT_URL=https://a/b", r"must be set together"),
        ("--model FLUX.1-dev --gpu H100 --workers-min 9", r"--workers-max must be at least"),
        ("--model FLUX.1-dev --gpu H100 --apply", r"--apply wants --image"),
        ("--model FLUX.2-dev --gpu A40", r"FLUX\.2-dev does not fit A40 .*MEMORY_MODE=\w+ \(not exact\)"),
        ("--model FLUX.2-dev --gpu 4090", r"FLUX\.2-dev does not fit RTX 4090 .*no memory mode fits"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(said, fault(capsys, *arguments.split()))


def test_a_limit_of_memory_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "FLUX.1-dev", "--gpu", "H100", "--set", "MEMORY_LIMIT_GB=16"]) == 0
    assert re.search(
        r"memory +stream: [\d.]+ of 16 GB at the peak, .* in the host's memory; exact", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("mirror/FLUX.1-dev", "cached model  https://huggingface.co/mirror/FLUX.1-dev:v2"),
        ("/runpod-volume/FLUX.1-dev", "cached model  none"),
    ],
)
def test_a_copy_of_a_model_is_taken_from_where_it_is(model: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", model, "--gpu", "H100", "--set", "MODEL_REVISION=v2"]) == 0
    shown = capsys.readouterr().out
    assert said in shown
    assert f'"MODEL_NAME": "{model}"' in shown


def test_a_smaller_kind_of_weights_is_taken_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "FLUX.1-dev", "--gpu", "4090", "--set", "MEMORY_MODE=fp8"]) == 0
    assert re.search(r"memory +fp8: [\d.]+ of 24 GB at the peak.*; not exact", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "refuses POST /templates: {\"error\": \"no such thing\"} (HTTP 400)"),
        (401, "does not know RUNPOD_API_KEY"),
        (402, "has too little credit"),
        (403, "does not allow POST /templates to RUNPOD_API_KEY"),
        (404, "has nothing at POST /templates"),
        (409, "choose another --name"),
        (429, "had too many requests"),
        (500, "fails at POST /templates"),
        (503, "fails at POST /templates"),
    ],
)  # fmt: skip
def test_each_refusal_of_runpods_is_a_sentence(
    status: int, said: str, api: RestStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    api.answers["POST", "templates"] = (status, '{"error": "no such thing"}')
    text = fault(capsys, "--model", "flux-shapes", "--gpu", "A40", "--image", IMAGE, "--api", api.url, "--apply")
    assert said in text
    assert f"(HTTP {status})" in text
    assert api.kept == {"templates": {}, "endpoints": {}}


@pytest.mark.parametrize("text", ["<html>", "{}", "[]", "null", ""])
def test_an_answer_of_another_kind_is_a_sentence(
    text: str, api: RestStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    api.answers["POST", "templates"] = (200, text)
    said = fault(capsys, "--model", "flux-shapes", "--gpu", "A40", "--image", IMAGE, "--api", api.url, "--apply")
    assert said.startswith("RunPod's answer to POST /templates is not what its API describes")


def test_a_wrong_key_and_none_are_two_sentences(
    api: RestStandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "flux-shapes", "--gpu", "A40", "--image", IMAGE, "--api", api.url, "--apply"]
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_ANOTHERKEYANOTHER")
    assert "does not know RUNPOD_API_KEY" in fault(capsys, *arguments)
    monkeypatch.setenv("RUNPOD_API_KEY", "")
    assert "--apply wants RUNPOD_API_KEY in the environment" in fault(capsys, *arguments)
    with pytest.raises(InvalidSettings, match=r"RUNPOD_API_KEY holds the character U\+000A in place 4"):
        runpod_api_key({"RUNPOD_API_KEY": "rpa\nrpa"})


def test_a_host_that_cannot_be_reached_is_a_sentence(api: RestStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    text = fault(capsys, "--model", "flux-shapes", "--gpu", "A40", "--image", IMAGE, "--api", address, "--apply")
    assert text.startswith(f"RunPod cannot be reached at {address}: ")


def test_a_template_of_pods_is_not_touched(api: RestStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    api.kept["templates"]["te9"] = {"id": "te9", "name": "flux-shapes", "isServerless": False}
    text = fault(capsys, "--model", "flux-shapes", "--gpu", "A40", "--image", IMAGE, "--api", api.url, "--apply")
    assert "the template flux-shapes is there with isServerless=False" in text
    assert [method for method, _, _ in api.asked] == ["GET"]


def test_two_of_one_name_are_not_touched(api: RestStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(api, "flux-shapes") == 0
    api.kept["endpoints"]["en9"] = {**api.endpoint, "id": "en9"}
    text = fault(capsys, "--model", "flux-shapes", "--gpu", "A40", "--image", IMAGE, "--api", api.url, "--apply")
    assert "there are 2 endpoints of the name flux-shapes (en1, en9): delete all but one" in text
