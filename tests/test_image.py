"""The image: what it is made of, and by scripts/image.sh what it does. Weights that are baked into it."""

from __future__ import annotations

import re
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
    assert "setpriv --reuid $worker --regid $worker --clear-groups --no-new-privs" in ENTRY_POINT
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
    assert " ".join(cpu["command"]) in ENTRY_POINT, "what the entry point says of the API"
    assert {volume.partition(":")[0] for volume in cpu["volumes"]} == config["volumes"].keys()


@pytest.mark.parametrize("said", ["true", "True", "1", "yes", "ON"])
def test_a_baked_model_is_used_as_it_is_and_no_hub_is_asked(
    hub: Hub, tmp_path: Path, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gated, by its short name; and its repo is gone afterwards."""
    monkeypatch.setenv("MODEL_NAME", "FLUX.1-schnell")
    monkeypatch.setenv("HF_TOKEN", "hf_opens")
    monkeypatch.setitem(hub.repos, "black-forest-labs/FLUX.1-schnell", GATED)
    assert bake.main(said, tmp_path / "weights") is None
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
    said = bake.main("true", tmp_path)
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
