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
from deploy.endpoint import MIN_CUDA, OTHER_VARIABLES
from deploy.plan import WEIGHTS, disk_gb, estimate, image_gb, init_seconds, measured_seconds, weights_of
from scripts.licences import locked
from src.catalog import MODELS, UPSAMPLER_GB, Model, get_model
from src.errors import InvalidSettings
from src.settings import ROOT, Settings, runpod_api_key
from src.weights.placement import GB
from tests.runpod_rest import GPU_TYPES, KEY, POOLS, RestStandIn, rest_api

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
    assert (model.download_gb == 0) == (model.repo == "models/flux-shapes")


def test_cards_are_those_of_runpod() -> None:
    assert {kind for card in CARDS for kind in card.types} <= set(GPU_TYPES)
    assert len({card.pool for card in CARDS}) == len(CARDS)
    assert {card.pool for card in CARDS} <= set(POOLS)


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
    results: dict[str, Any] = {
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
    results["models"]["FLUX.1-dev"]["ways"][0]["fell_back"] = "114 of 114 calls of blocks ran eager"
    file.write_text(json.dumps(results))
    assert measured_seconds(dev, card("H100"), file) is None, "not as a worker serves it"
    del results["models"]["FLUX.1-dev"]["ways"][0]["fell_back"]
    file.write_text(json.dumps({**results, "full_size": False}))
    assert measured_seconds(dev, card("H100"), file) is None, "flux-shapes without a card"


def test_disk_and_start_follow_the_bytes() -> None:
    dev, klein, shapes = (get_model(name) for name in ("FLUX.1-dev", "FLUX.2-klein-4B", "flux-shapes"))
    assert [disk_gb([model], Settings()) for model in (dev, klein, shapes)] == [75, 55, 40]
    assert disk_gb([shapes, dev], Settings()) == 75, "the largest"
    assert disk_gb([klein], Settings(lora_cache_gb=100)) == 135
    assert image_gb() == json.loads((ROOT / "scripts" / "image-budget.json").read_text())["cuda"]["image"] / 1000
    assert [init_seconds([model], Settings()) for model in (dev, klein)] == [1800, 1080]
    writes, plain = Settings(prompt_upsampler="someone/writes"), Settings()
    flows = get_model("FLUX.3-klein")
    assert [disk_gb([flows], each) for each in (plain, writes)] == [60, 80]
    assert init_seconds([flows], writes) - init_seconds([flows], plain) == pytest.approx(40 * UPSAMPLER_GB, abs=60)


# ---- the endpoint

# Container disk, seconds that a start may take, the worker's variables.
WANTED: dict[str, tuple[int, dict[str, str]]] = {
    "FLUX.1-dev": (
        75, {"MODEL_NAME": "black-forest-labs/FLUX.1-dev", "HF_TOKEN": TOKEN, "RUNPOD_INIT_TIMEOUT": "1800"},
    ),
    "FLUX.2-klein-4B": (
        55, {"MODEL_NAME": "black-forest-labs/FLUX.2-klein-4B", "RUNPOD_INIT_TIMEOUT": "1080"},
    ),
    "flux-shapes": (40, {"MODEL_NAME": "flux-shapes"}),
}  # fmt: skip


@pytest.mark.parametrize("gpu", ["RTX 4090", "A40", "A100", "H100"])
@pytest.mark.parametrize("model", WANTED)
def test_every_setting_of_the_endpoint_is_right(
    model: str, gpu: str, api: RestStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(api, model, gpu) == 0
    disk, env = WANTED[model]
    name = re.sub("[^a-z0-9]+", "-", model.lower())
    assert api.asked[-1] == ("POST", "/v2/serverless", {
        "name": name,
        "type": "QUEUE",
        "image": IMAGE,
        "registry": None,
        "disk": disk,
        "env": env,
        "gpu": {"pools": [card(gpu).pool], "count": 1, "minCudaVersion": "13.0", "allowedCudaVersions": []},
        "workers": {"min": 0, "max": 3, "idleTimeout": 60},
        "scaling": {"type": "QUEUE_DELAY", "queueDelay": 4},
        "networkVolumes": [],
        "timeout": 600_000,
        "flashboot": "FLASHBOOT",
    })  # fmt: skip
    said = capsys.readouterr().out
    assert f"endpoint {name} is made: ep1" in said
    assert "curl -X POST https://api.runpod.ai/v2/ep1/runsync" in said
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
    endpoint = api.endpoint
    assert (endpoint["name"], endpoint["registry"]) == ("mine", "auth1")
    assert endpoint["env"] == {
        "MODEL_NAME": "black-forest-labs/FLUX.1-schnell",
        "HF_TOKEN": TOKEN,
        "RUNPOD_INIT_TIMEOUT": "1800",
        "HF_HOME": "/runpod-volume/huggingface",
        "LORA_CACHE_DIR": "/runpod-volume/lora-cache",
        "MAX_PIXELS": "1048576",
        "LOG_LEVEL": "debug",
    }
    assert endpoint["workers"] == {"min": 1, "max": 5, "idleTimeout": 300}
    assert (endpoint["flashboot"], endpoint["networkVolumes"]) == ("OFF", ["vol1"])
    assert endpoint["disk"] == 20, "weights and adapters are on the volume"


def test_several_cards_reach_the_endpoint_and_are_counted(api: RestStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(api, "FLUX.1-dev", "H100", "--gpus", "4") == 0
    assert api.endpoint["gpu"]["count"] == 4
    assert main(["--model", "FLUX.1-dev", "--gpu", "H100", "--gpus", "2"]) == 0
    said = capsys.readouterr().out
    second = find_card("H100").dollars  # type: ignore[union-attr]
    assert f"cards         2 a worker, ${2 * second:.5f} a second: a picture on each of them" in said
    assert "--gpu-count 2" in said
    assert "all of them on one picture" not in said


def test_cards_that_share_a_picture_have_the_whole_model_each(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--model", "FLUX.1-dev", "--gpu", "4090", "--set", "PARALLEL=picture"]
    assert main(asked) == 0, "alone it streams"
    assert main([*asked, "--gpus", "2"]) == 1
    assert "does not fit RTX 4090 with MEMORY_MODE=full" in capsys.readouterr().err
    assert main(["--model", "FLUX.1-dev", "--gpu", "H100", "--set", "PARALLEL=picture", "--gpus", "2"]) == 0
    assert "all of them on one picture" in capsys.readouterr().out


OPTIONS = ["--network-volume", "vol1", "--registry-auth", "auth1", "--no-flash-boot", "--set", "BATCH_SIZE=2"]


@pytest.mark.parametrize("options", [[], OPTIONS])
def test_a_second_run_makes_and_changes_nothing(
    options: list[str], api: RestStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(api, "FLUX.1-dev", "H100", *options) == 0
    before = json.dumps(api.kept)
    api.asked.clear()
    capsys.readouterr()
    assert apply(api, "FLUX.1-dev", "H100", *options) == 0
    assert json.dumps(api.kept) == before
    assert [method for method, _, _ in api.asked] == ["GET"]
    assert "endpoint flux-1-dev is as wanted: ep1" in capsys.readouterr().out


def test_what_runpod_leaves_out_or_adds_is_no_difference(api: RestStandIn) -> None:
    assert apply(api) == 0
    found = api.endpoint
    del found["registry"], found["networkVolumes"], found["gpu"]["allowedCudaVersions"]
    found["gpu"]["excludedTypes"] = ["NVIDIA H100 NVL"]
    found["name"] += " -fb"
    found["scaling"]["queueDelay"] = 4.0
    api.asked.clear()
    assert apply(api) == 0
    assert [method for method, _, _ in api.asked] == ["GET"]


def test_another_run_changes_what_differs(api: RestStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(api) == 0
    api.asked.clear()
    capsys.readouterr()
    newer = IMAGE.replace("1.0", "1.1")
    assert apply(api, "FLUX.2-klein-4B", "A100", "--image", newer, "--set", "BATCH_SIZE=2") == 0
    method, path, body = api.asked[-1]
    assert (method, path, set(body)) == ("PATCH", "/v2/serverless/ep1", {"image", "env", "gpu"})
    assert (api.endpoint["image"], api.endpoint["env"]["BATCH_SIZE"]) == (newer, "2")
    assert "endpoint flux-2-klein-4b is changed (image, env, gpu): ep1" in capsys.readouterr().out


def test_what_is_no_longer_wanted_is_cleared_and_named(api: RestStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(api, "flux-shapes", "H100", *OPTIONS) == 0
    capsys.readouterr()
    assert apply(api, "flux-shapes") == 0
    endpoint = api.endpoint
    assert (endpoint["registry"], endpoint["networkVolumes"], endpoint["env"]) == (
        None, [], {"MODEL_NAME": "flux-shapes"},
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "is changed (registry cleared, disk, env, networkVolumes cleared, flashboot): ep1" in said


def test_what_stays_although_it_is_no_longer_wanted_is_said(
    api: RestStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(api, "flux-shapes", "H100", "--network-volume", "vol1") == 0
    api.stays.add("networkVolumes")
    text = fault(capsys, "--model", "flux-shapes", "--gpu", "H100", "--image", IMAGE, "--api", api.url, "--apply")
    assert "kept its networkVolumes: change that in the console" in text
    assert "endpoint/ep1" in text


def test_a_list_of_cuda_versions_gives_way_to_the_least_one(api: RestStandIn) -> None:
    """As an endpoint has that was made from the Hub."""
    assert apply(api) == 0
    api.endpoint["gpu"] |= {"allowedCudaVersions": ["13.0"], "minCudaVersion": None}
    assert apply(api) == 0
    assert (api.endpoint["gpu"]["minCudaVersion"], api.endpoint["gpu"]["allowedCudaVersions"]) == ("13.0", [])


@pytest.mark.parametrize("name", OTHER_VARIABLES)
def test_variables_of_the_libraries_and_of_runpod_are_taken(name: str, api: RestStandIn) -> None:
    assert apply(api, "FLUX.2-klein-4B", "H100", "--set", f"{name}=1") == 0
    assert api.endpoint["env"][name] == "1"


@pytest.mark.parametrize(
    ("volume", "said"),
    [
        ((), ["disk          75 GB: the image, 33.7 GB of weights, adapters and room"]),
        (
            ("--network-volume", "vol1"),
            [
                "disk          20 GB: the image and room",
                "volume        at least 65 GB: 33.7 GB of weights, adapters and room",
            ],
        ),
        (
            ("--network-volume", "vol1", "--set", "MEMORY_MODE=fp8", "--set", "LORA_CACHE_GB=50"),
            ["volume        at least 115 GB"],
        ),
    ],
)
def test_what_is_kept_is_counted_where_it_is_kept(
    volume: tuple[str, ...], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", "FLUX.1-dev", "--gpu", "H100", *volume]) == 0
    shown = capsys.readouterr().out
    assert [line for line in said if line not in shown] == []
    assert ("volume  " in shown) == bool(volume)


def test_the_shipped_model_is_too_small_for_the_model_of_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "flux-shapes", "--gpu", "4090"]) == 0
    shown = capsys.readouterr().out
    assert "one picture   is too small for the model of cost" in shown
    assert "modelled" not in shown
    assert "1000 pictures" not in shown


# ---- what it says without --apply


def test_without_apply_nothing_is_sent_and_all_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "FLUX.1-dev", "--gpu", "H100"]) == 0
    said = capsys.readouterr().out
    for part in (
        "FLUX.1-dev on H100 (ADA_80_PRO), endpoint flux-1-dev",
        "exact",
        "1000 pictures $",
        "modelled",
        "disk          75 GB",
        "cached model  https://huggingface.co/black-forest-labs/FLUX.1-dev:main",
        "POST https://api.runpod.io/v2/serverless",
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
    assert api.endpoint["env"]["HF_TOKEN"] == secret
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
        (
            "--model a/b/flux.gguf --gpu H100",
            r"--model a/b/flux\.gguf is a model in one file, .*: give the model",
        ),
        (
            "--model FLUX.1-dev --gpu H100 --set PROMPT_UPSAMPLER=someone/writes",
            r"PROMPT_UPSAMPLER is someone/writes, and FLUX\.1-dev reads prompts as they are; allowed: none, or .*FLUX",
        ),
        ("--model FLUX.1-dev --gpu H100 --set BASE_MODEL=FLUX.1-dev", r"--set BASE_MODEL is for a model in one file"),
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
        (400, "refuses POST /serverless: Request validation failed. 'colour' is unknown (HTTP 400)"),
        (401, "does not know RUNPOD_API_KEY"),
        (402, "has too little credit"),
        (403, "does not allow POST /serverless to RUNPOD_API_KEY"),
        (404, "has nothing at POST /serverless"),
        (409, "choose another --name"),
        (422, "refuses POST /serverless: Request validation failed. 'colour' is unknown (HTTP 422)"),
        (429, "had too many requests"),
        (500, "fails at POST /serverless"),
        (503, "fails at POST /serverless"),
    ],
)  # fmt: skip
def test_each_refusal_of_runpods_is_a_sentence(
    status: int, said: str, api: RestStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = {"title": "A title", "detail": "Request validation failed.", "errors": ["'colour' is unknown"]}
    api.answers["POST"] = (status, json.dumps(problem))
    text = fault(capsys, "--model", "flux-shapes", "--gpu", "A40", "--image", IMAGE, "--api", api.url, "--apply")
    assert said in text
    assert f"(HTTP {status})" in text
    assert api.kept == {}


@pytest.mark.parametrize(("text", "said"), [("<html>no</html>", "<html>no</html>"), ("", "without a reason")])
def test_a_refusal_that_is_no_problem_is_repeated(
    text: str, said: str, api: RestStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    api.answers["POST"] = (400, text)
    shown = fault(capsys, "--model", "flux-shapes", "--gpu", "A40", "--image", IMAGE, "--api", api.url, "--apply")
    assert f"refuses POST /serverless: {said} (HTTP 400)" in shown


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"imageName": IMAGE}, "imageName"),
        ({"gpuTypeIds": ["NVIDIA H200"]}, "gpuTypeIds"),
        ({"type": "QUEUE"}, "type"),
        ({"gpu": {"pools": ["ADA_24"], "id": "NVIDIA H200"}}, "id"),
        ({"workers": {"idle": 5}}, "idle"),
    ],
)
def test_the_stand_in_names_what_runpod_does_not_take(body: dict[str, Any], named: str, api: RestStandIn) -> None:
    assert apply(api) == 0
    status, text = api.answer("PATCH", "/v2/serverless/ep1", f"Bearer {KEY}", body)
    assert status == 422
    assert f"'{named}' was unexpected" in text


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("text", ["<html>", "{}", "[]", "null", ""])
def test_an_answer_of_another_kind_is_a_sentence(
    text: str, method: str, api: RestStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    api.answers[method] = (200, text)
    said = fault(capsys, "--model", "flux-shapes", "--gpu", "A40", "--image", IMAGE, "--api", api.url, "--apply")
    assert said.startswith(f"RunPod's answer to {method} /serverless is not what its API describes")


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
        address = f"http://127.0.0.1:{server.getsockname()[1]}/v2"
    text = fault(capsys, "--model", "flux-shapes", "--gpu", "A40", "--image", IMAGE, "--api", address, "--apply")
    assert text.startswith(f"RunPod cannot be reached at {address}: ")


@pytest.mark.parametrize(
    ("other", "said"),
    [({"type": "LOAD_BALANCER"}, "of the kind LOAD_BALANCER"), ({"cpu": [{"id": "cpu5c"}]}, "of the kind CPU")],
)
def test_an_endpoint_of_another_kind_is_not_touched(
    other: dict[str, Any], said: str, api: RestStandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    api.kept["ep9"] = {"id": "ep9", "name": "flux-shapes", **other}
    text = fault(capsys, "--model", "flux-shapes", "--gpu", "A40", "--image", IMAGE, "--api", api.url, "--apply")
    assert f"the endpoint flux-shapes is there, {said}" in text
    assert [method for method, _, _ in api.asked] == ["GET"]


def test_two_of_one_name_are_not_touched(api: RestStandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(api, "flux-shapes") == 0
    api.kept["ep9"] = {**api.endpoint, "id": "ep9"}
    text = fault(capsys, "--model", "flux-shapes", "--gpu", "A40", "--image", IMAGE, "--api", api.url, "--apply")
    assert "there are 2 endpoints of the name flux-shapes (ep1, ep9): delete all but one" in text
