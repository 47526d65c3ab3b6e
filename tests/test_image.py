"""The image: what it is made of, and by scripts/image.sh what it does. Weights that are baked into it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import src
from src.settings import ROOT, Settings
from src.weights import bake
from src.weights.files import Files
from tests.hub import REVISION, Hub, Repo
from tests.image import BUDGET, LAYERS, readme_commands

SHIPPED = ROOT / "models" / "flux-shapes"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
ENTRY_POINT = (ROOT / "scripts" / "entrypoint.sh").read_text()
SKIPPED = 77
GATED = Repo(SHIPPED, {None: (401, "GatedRepo")})


@pytest.mark.slow
def test_the_image_is_built_and_does_what_it_must(capsys: pytest.CaptureFixture[str]) -> None:
    """Also one that starts with no network, no token, and after its repo moved: tests/image.py has the cases."""
    done = subprocess.run([ROOT / "scripts" / "image.sh"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == SKIPPED:
        pytest.skip(done.stdout.strip())
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout


def test_the_base_image_is_held_by_its_digest() -> None:
    assert re.search(r"^ARG BASE_IMAGE=[\w.:/-]+@sha256:[0-9a-f]{64}$", DOCKERFILE, re.MULTILINE)
    assert "# syntax=" not in DOCKERFILE, "a frontend that is fetched by a tag"


def test_the_image_says_of_which_version_it_is() -> None:
    assert f"ARG VERSION={src.__version__}\n" in DOCKERFILE


def test_the_entry_point_gives_up_its_rights_for_the_images_user() -> None:
    (user,) = re.findall(r"useradd .*--uid (\d+)", DOCKERFILE)
    assert f"\nworker={user}\n" in ENTRY_POINT
    assert "user=$worker group=$worker" in ENTRY_POINT
    assert "setpriv --reuid $user --regid $group --groups $worker --no-new-privs" in ENTRY_POINT
    assert not re.findall(r"^(USER|ADD|EXPOSE)|sudo|setuid", DOCKERFILE, re.MULTILINE)
    assert "chown -R" not in ENTRY_POINT, "a volume may hold a million files"


def test_the_entry_point_makes_the_folders_of_the_settings() -> None:
    defaults = dict(re.findall(r"\$\{([A-Z_]+_DIR):-([^}]+)\}", ENTRY_POINT))
    assert defaults.keys() == {"QUANTIZED_DIR", "COMPILE_CACHE_DIR", "LORA_CACHE_DIR"}
    for name, folder in defaults.items():
        assert str(Settings.model_fields[name.lower()].default) == folder


def test_compose_knows_a_card_and_a_machine_without_one() -> None:
    config = yaml.safe_load((ROOT / "compose.yaml").read_text())
    cpu, gpu = config["services"]["cpu"], config["services"]["gpu"]
    assert (cpu["profiles"], gpu["profiles"]) == (["cpu"], ["gpu"])
    assert cpu["build"]["args"] == {"TORCH": "cpu"}
    assert cpu["environment"]["MODEL_NAME"] == "flux-shapes"
    assert f'api="{" ".join(cpu["command"])}"' in ENTRY_POINT
    assert cpu["volumes"] == ["huggingface:/home/worker/huggingface", "./outputs:/app/outputs"]
    assert config["volumes"].keys() == {"huggingface"}


def test_the_readme_has_the_commands_of_the_specification_and_a_run_of_each_is_a_case() -> None:
    commands = [command.partition(" #")[0].strip() for command in readme_commands()]
    assert "docker build -t flux2-endpoint ." in commands
    assert "docker run --gpus all -it --rm -e HF_TOKEN=your_token flux2-endpoint" in commands
    assert "docker run -it --rm -e MODEL_NAME=flux-shapes flux2-endpoint" in commands
    assert "docker compose --profile cpu up --build" in commands
    assert sum("docker " in line for line in (ROOT / "README.md").read_text().splitlines()) >= len(commands) - 1


@pytest.mark.parametrize("torch", ["cpu", "cuda"])
def test_the_budget_knows_each_build_of_torch(torch: str) -> None:
    assert f"{torch}) set --" in DOCKERFILE
    budget = json.loads(BUDGET.read_text())[torch]
    assert {"image", "torch"} <= budget.keys() <= {*LAYERS.values(), "image"}


@pytest.mark.parametrize(
    ("variables", "begins"),
    [
        ({}, "This is a FLUX worker for RunPod, and RunPod is not here"),
        ({"RUNPOD_POD_ID": "pod"}, "This is a pod of RunPod's"),
        ({"RUNPOD_POD_ID": "pod", "RUNPOD_WEBHOOK_GET_JOB": "http://127.0.0.1"}, "handler.py\n"),
        ({"RUNPOD_REALTIME_PORT": "8000"}, "handler.py\n"),
    ],
)
def test_what_the_container_starts_is_what_the_place_wants(
    variables: dict[str, str], begins: str, tmp_path: Path
) -> None:
    """By the entry point itself, with a `python` that says its arguments; not as root, who would give folders away."""
    (tmp_path / "python").write_text('#!/bin/sh\nshift\necho "$@"\n')
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MODEL_NAME": "flux-shapes", **variables}
    said = subprocess.run(
        ["/bin/sh", ROOT / "scripts" / "entrypoint.sh", "python", "-u", "handler.py"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.startswith(begins)
    started = said.stdout.splitlines()[-1]
    if begins.startswith("This is a pod"):
        assert started == "handler.py --rp_serve_api --rp_api_host 0.0.0.0"
    elif begins.startswith("This"):
        assert started == "local_test.py"
        assert '-e MODEL_NAME=flux-shapes -v "$PWD/outputs:/app/outputs"' in said.stdout
        assert "..." not in said.stdout


def test_what_bakes_has_all_that_it_imports(tmp_path: Path) -> None:
    """Its stage of the build copies the rooms that it is made of, not all of the code."""
    stage = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[-2]
    assert " AS weights\n" in stage
    for source, target in re.findall(r"^COPY (\S+) (\S+)$", stage, re.MULTILINE):
        for path in ROOT.glob(source):
            within = tmp_path / target / (path.name if target.endswith("/") else "")
            within.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if path.is_dir() else shutil.copy)(path, within)
    baking = subprocess.run(
        [sys.executable, "-m", "src.weights.bake", "maybe"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert baking.stderr.startswith("BAKE_MODEL=maybe: must be one of"), baking.stderr


def test_a_model_that_is_baked_again_is_not_downloaded_again(hub: Hub, tmp_path: Path) -> None:
    """And the image has the files of the present commit alone."""
    repo, downloads = "someone/cached", tmp_path / "downloads"
    hub.repos[repo] = Repo(SHIPPED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_NAME", repo)
        assert bake.main("true", tmp_path / "first", downloads) is None
        old = downloads / f"models--{repo.replace('/', '--')}"
        for stale in (old / "blobs" / "stale", old / "snapshots" / "stale" / "config.json", old / "refs" / "stale"):
            stale.parent.mkdir(exist_ok=True)
            stale.write_text("stale")
        asked = len(hub.asked)
        assert bake.main("true", tmp_path / "second", downloads) is None
    del hub.repos[repo]
    paths = [path for path, _ in hub.asked[asked:]]
    assert paths, "the hub says which commit is the newest"
    assert not [path for path in paths if "/resolve/" in path]
    first, second = (
        {
            str(file.relative_to(folder)): file.read_bytes()
            for file in folder.rglob("*")
            if file.is_file() and ".no_exist" not in file.parts
        }
        for folder in (tmp_path / "first", tmp_path / "second")
    )
    assert first == second
    assert not [path for path in second if "stale" in path]


@pytest.mark.parametrize("said", ["true", "True", "1", "yes", "ON"])
def test_a_baked_model_is_used_as_it_is_and_no_hub_is_asked(
    hub: Hub, tmp_path: Path, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gated, by its short name; and its repo is gone afterwards."""
    monkeypatch.setenv("MODEL_NAME", "FLUX.1-schnell")
    monkeypatch.setenv("HF_TOKEN", "hf_opens")
    monkeypatch.setitem(hub.repos, "black-forest-labs/FLUX.1-schnell", GATED)
    assert bake.main(said, tmp_path / "weights", tmp_path / "downloads") is None
    monkeypatch.delitem(hub.repos, "black-forest-labs/FLUX.1-schnell")
    asked = hub.requests
    files = Files(Settings(), baked=tmp_path / "weights")
    assert files.find("FLUX.1-schnell", "black-forest-labs/FLUX.1-schnell").revision == REVISION
    assert hub.requests == asked


@pytest.mark.parametrize("said", ["false", "FALSE", "0", "no", "off"])
def test_nothing_is_baked_where_that_is_not_asked_for(hub: Hub, tmp_path: Path, said: str) -> None:
    asked = hub.requests
    assert bake.main(said, tmp_path / "weights") is None
    assert list((tmp_path / "weights").iterdir()) == []
    assert hub.requests == asked


def test_what_cannot_be_baked_is_a_sentence(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bake.main("maybe", tmp_path) == "BAKE_MODEL=maybe: must be one of true, 1, yes, on, false, 0, no, off"
    monkeypatch.setitem(hub.repos, "black-forest-labs/FLUX.1-dev", GATED)
    monkeypatch.setenv("MODEL_NAME", "FLUX.1-dev")
    said = bake.main("true", tmp_path, tmp_path / "downloads")
    assert said is not None
    assert said.startswith("MODEL_NAME=FLUX.1-dev: is gated: accept its licence")
    assert "--secret id=HF_TOKEN,env=HF_TOKEN" in said
    monkeypatch.setenv("MEMORY_MODE", "much")
    assert str(bake.main("true", tmp_path)).startswith("MEMORY_MODE='much': must be one of")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({}, False), ({"quantization": "nf4"}, True), ({"memory_mode": "fp8"}, True), ({"memory_mode": "stream"}, False)],
)
def test_what_quantizes_is_on_the_path_where_it_is_asked_for(
    settings: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    Settings.model_validate(settings).add_packages()
    assert ("/opt/quantization" in sys.path) is wanted
    assert "-r locked/quantization.txt --target /opt/quantization" in DOCKERFILE
