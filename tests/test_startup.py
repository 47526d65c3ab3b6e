"""What ends a start, and how soon: no torch, no weights. The hub is HTTP, the driver a library that gcc makes."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from src.serving import startup
from src.settings import ROOT, Settings
from src.stages import STAGES, Start
from src.weights.disk import why_not_writable
from tests.headers import safetensors
from tests.hub import SIGNED, Hub, Repo
from tests.runpod_stand_in import StandIn, worker

SHIPPED = ROOT / "models" / "flux-shapes"
GATED = "someone/gated"
TORCH = """__version__ = '9.9.0+cu{digits}'
cuda: Optional[str] = {cuda}
"""


def fake_torch(folder: Path, cuda: str | None) -> str:
    """A folder for PYTHONPATH whose torch cannot be imported, and says that it is built for `cuda`."""
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')\n")
    digits = (cuda or "").replace(".", "")
    (folder / "torch" / "version.py").write_text(TORCH.format(digits=digits, cuda=repr(cuda)))
    return str(folder)


def fake_driver(folder: Path, version: int) -> str:
    """A folder for LD_LIBRARY_PATH whose libcuda.so.1 says that it is of this version."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no compiler, and so no library to load")
    folder.mkdir()
    (folder / "driver.c").write_text(f"int cuDriverGetVersion(int *version) {{ *version = {version}; return 0; }}\n")
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(folder / "driver.c")]
    subprocess.run(command, check=True)
    return str(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a megabyte."""
    yield from mounted(tmp_path / "small", "size=1m")


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    """A folder where nobody may write."""
    folder = tmp_path / "unwritable"
    if os.geteuid() == 0:  # who may write everywhere but there
        yield from mounted(folder, "ro")
    else:
        folder.mkdir(mode=0o500)
        yield folder
        folder.chmod(0o700)


def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    made = subprocess.run(
        ["/bin/mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["/bin/umount", str(folder)], check=True)


def refused(tmp_path: Path, hub: Hub, **environment: str) -> str:
    """The one line that ends this start; its seconds are printed, and neither torch nor a weight was asked for."""
    hub.asked.clear()
    begun = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "handler.py"],
        cwd=ROOT,
        env={
            **os.environ,
            "HF_HOME": str(tmp_path / "home"),
            "RUNPOD_MODEL_CACHE": str(tmp_path / "none"),
            "PYTHONPATH": fake_torch(tmp_path / "no_torch", None),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    line = ended.stderr.strip().splitlines()[-1]
    print(f"{time.monotonic() - begun:.1f} s: {line}")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "torch was imported" not in ended.stderr + ended.stdout
    assert not [path for path, _ in hub.asked if path.endswith(".safetensors")]
    return line


def faults(model: str, *, free: int = 1 << 40, **settings: Any) -> list[str]:
    wanted = Settings.model_validate({"model_name": model, "runpod_model_cache": "/nonexistent", **settings})
    return [str(fault) for fault in startup.check_files(wanted, free=lambda _: free)]


# Each line that ends a start


def test_a_missing_token(hub: Hub, tmp_path: Path) -> None:
    hub.repos[GATED] = Repo(SHIPPED, {None: (401, "GatedRepo")})
    assert refused(tmp_path, hub, MODEL_NAME=GATED) == (
        f"model_unavailable: {GATED}: is gated: accept its licence on {hub.url}/{GATED} and set HF_TOKEN "
        "(MODEL_NAME=flux-shapes runs the small model that ships with this worker)"
    )


def test_a_file_that_is_no_flux_and_its_base(hub: Hub, tmp_path: Path) -> None:
    file = safetensors(tmp_path / "style.safetensors", {"lora_unet_double_blocks_0.lora_down.weight": [4, 4]})
    line = refused(tmp_path, hub, MODEL_NAME=str(file), BASE_MODEL="someone/nothing")
    assert line == (
        f"model_unavailable: {file}: is a LoRA: give it in a request as lora_path, and in MODEL_NAME the model; "
        "BASE_MODEL=someone/nothing: there is no such repo on the hub that can be seen without HF_TOKEN"
    )


def test_a_token_without_access_names_the_page(hub: Hub) -> None:
    hub.repos[GATED] = Repo(SHIPPED, {"hf_stranger": (403, "GatedRepo")})
    (fault,) = faults(GATED, hf_token="hf_stranger")
    assert f"the account of HF_TOKEN has no access: accept its licence on {hub.url}/{GATED}" in fault


def test_a_wrong_token(hub: Hub) -> None:
    hub.repos[GATED] = Repo(SHIPPED)
    assert faults(GATED, hf_token="hf_expired") == [f"{GATED}: the hub refuses HF_TOKEN: it is wrong or has expired"]


def test_a_repo_and_a_revision_that_are_not_there(hub: Hub) -> None:
    hub.repos["someone/shapes"] = Repo(SHIPPED)
    assert faults("someone/nothing") == [
        "someone/nothing: there is no such repo on the hub that can be seen without HF_TOKEN"
    ]
    assert faults("someone/nothing", hf_token="hf_friend")[0].endswith("that HF_TOKEN can see")
    assert faults("someone/shapes", model_revision="v9") == [
        "someone/shapes: the repo has no revision 'v9' (MODEL_REVISION)"
    ]
    assert faults("/no/such/folder")[0].startswith("/no/such/folder: is not a folder, not a hub id")


def test_a_hub_that_is_down(hub: Hub) -> None:
    hub.down = True
    try:
        assert faults("someone/shapes") == ["someone/shapes: the hub answered 503: try again later"]
    finally:
        hub.down = False


def test_a_hub_that_is_busy_is_asked_again(hub: Hub) -> None:
    hub.repos["someone/shapes"] = Repo(SHIPPED)
    hub.busy = 2
    assert faults("someone/shapes") == []


def test_a_hub_that_cannot_be_reached_and_the_token_that_will_be_wanted(hub: Hub, tmp_path: Path) -> None:
    line = refused(tmp_path, hub, MODEL_NAME="FLUX.1-dev", HF_ENDPOINT="http://127.0.0.1:9")
    assert line.startswith(
        "model_unavailable: FLUX.1-dev: is not on this machine, or not all of it, and the hub cannot"
    )
    assert line.endswith("; it is gated, so HF_TOKEN must be set too")


def test_no_room_on_the_disk(hub: Hub, tmp_path: Path, small_disk: Path) -> None:
    hub.repos["someone/shapes"] = Repo(SHIPPED)
    line = refused(tmp_path, hub, MODEL_NAME="someone/shapes", HF_HOME=str(small_disk))
    assert line.startswith(f"model_unavailable: HF_HOME={small_disk}: has 0.00105 GB free, and 0.0")
    assert "are still to be downloaded: give the container more disk (containerDiskInGb), or set HF_HOME" in line


def test_bytes_are_those_of_the_files_that_are_wanted(hub: Hub) -> None:
    hub.repos["someone/shapes"] = Repo(SHIPPED)
    wanted = [*SHIPPED.glob("*.json"), *(file for file in SHIPPED.glob("*/*") if file.suffix != ".md")]
    size = sum(file.stat().st_size for file in wanted)
    assert faults("someone/shapes", free=size) == []
    assert len(faults("someone/shapes", free=size - 1)) == 1


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path, unwritable: Path) -> None:
    hub.repos["someone/shapes"] = Repo(SHIPPED)
    line = refused(tmp_path, hub, MODEL_NAME="someone/shapes", HF_HOME=str(unwritable))
    assert line.startswith(f"model_unavailable: HF_HOME={unwritable}: cannot be written by user {os.geteuid()}")


def test_the_owner_of_a_folder_is_named_with_the_remedy(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can be somebody else")
    tmp_path.chmod(0o755)
    script = (
        "import os, pathlib; from src.weights.disk import why_not_writable; os.setgid(10001); os.setuid(10001); "
        f"print(*map(why_not_writable, map(pathlib.Path, {[str(ROOT), str(ROOT / 'a' / 'b')]})), sep=chr(10))"
    )
    found = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    why = f"cannot be written by user 10001, since {ROOT} belongs to user 0: run"
    assert found.splitlines() == [
        f"{why} `chown -R 10001 {ROOT}` as root",
        f"{why} `install -d -o 10001 {ROOT / 'a' / 'b'}` as root",  # and not all of what it lies in
    ]
    assert why_not_writable(tmp_path / "a" / "b") is None


def test_an_old_driver_and_all_else_that_is_wrong_at_once(hub: Hub, tmp_path: Path, unwritable: Path) -> None:
    hub.repos[GATED] = Repo(SHIPPED, {None: (401, "GatedRepo")})
    line = refused(
        tmp_path,
        hub,
        MODEL_NAME=GATED,
        HF_HOME=str(unwritable),
        PYTHONPATH=fake_torch(tmp_path / "cuda", "13.0"),
        LD_LIBRARY_PATH=fake_driver(tmp_path / "driver", 12040),
    )
    assert "is gated: accept its licence" in line
    assert f"HF_HOME={unwritable}: cannot be written" in line
    assert "the NVIDIA driver: knows CUDA 12.4, and torch 9.9.0+cu130 is built for CUDA 13.0: start this worker" in line


@pytest.mark.parametrize(
    ("cuda", "driver", "fits"), [("13.0", 12090, False), ("12.9", 12040, True), ("12.8", 13000, True)]
)
def test_a_driver_of_the_same_major_version_is_enough(cuda: str, driver: int, fits: bool, tmp_path: Path) -> None:
    script = "from src.serving.startup import check_driver; print([str(fault) for fault in check_driver(None)])"
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": fake_torch(tmp_path / "torch", cuda),
            "LD_LIBRARY_PATH": fake_driver(tmp_path / "driver", driver),
        },
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert (found == "[]\n") == fits


def test_no_card_at_all_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if startup.driver_cuda() is not None:
        pytest.skip("there is a driver")
    caplog.set_level(logging.WARNING, "worker")
    monkeypatch.setattr(startup, "torch_build", lambda: ("9.9.0", "13.0"))
    assert list(startup.check_driver(Settings())) == []
    assert "there is no NVIDIA driver (libcuda.so.1), and torch 9.9.0 is built for CUDA 13.0" in caplog.text


def test_the_torch_that_is_installed_says_what_it_is_built_for() -> None:
    import torch

    assert startup.torch_build() == (torch.__version__, torch.version.cuda)


def test_runpod_is_shown_the_same(hub: Hub, tmp_path: Path) -> None:
    hub.repos[GATED] = Repo(SHIPPED, {None: (401, "GatedRepo")})
    held = StandIn()
    settings = {"MODEL_NAME": GATED, "HF_HOME": str(tmp_path), "RUNPOD_MODEL_CACHE": "/nonexistent"}
    with worker(held, tmp_path / "log", **settings, PYTHONPATH=fake_torch(tmp_path / "no_torch", None)) as process:
        assert process.process.wait(120) == 1
    (posted,) = (ping for ping in held.pings if ping.get("status") == "unhealthy")
    held.close()
    assert posted["check"] == "check_start"
    assert f"model_unavailable: {GATED}: is gated: accept its licence" in posted["reason"]
    assert "Fitness check failed: check_start" in process.text()


# What is here is used as it is


def test_what_is_whole_asks_the_hub_nothing_whatever_became_of_it(hub: Hub, tmp_path: Path) -> None:
    """A process: HF_HOME is read once. The repo was gated, moved on and went away since."""
    hub.repos["someone/baked"] = Repo(SHIPPED)
    home = tmp_path / "home"
    snapshot_download("someone/baked", cache_dir=home / "hub")
    del hub.repos["someone/baked"]
    hub.asked.clear()
    environment = {"MODEL_NAME": "someone/baked", "HF_HOME": str(home), "RUNPOD_MODEL_CACHE": str(tmp_path / "none")}
    script = "from handler import get_engine; print(get_engine().revision)"
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert ran.stdout.strip() == "0123456789abcdef0123456789abcdef01234567"
    assert hub.asked == []


def test_a_cache_that_cannot_be_written_is_a_warning_where_all_is_here(
    unwritable: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "worker")
    monkeypatch.setattr(startup, "CACHE", unwritable)
    assert faults("flux-shapes") == []
    (record,) = caplog.records
    assert f"cannot be written by user {os.geteuid()}" in record.getMessage()
    assert record.getMessage().endswith("; what requests want of the hub beyond the model cannot be kept")


def test_a_control_net_that_stays_in_memory_is_checked_with_the_model(hub: Hub, tmp_path: Path) -> None:
    name = "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro-2.0"
    hub.repos.pop(name, None)  # of other tests
    found = faults("FLUX.1-dev", controlnets=(name,))
    assert len(found) == 2, found
    assert all("there is no such repo" in fault for fault in found)


# The stages


def test_a_stage_is_one_line_with_its_seconds_and_its_facts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker")
    start = Start()
    with start.stage("files") as facts:
        facts |= {"folder": "/models", "revision": None, "downloaded_bytes": 1_234_567}
    with start.stage("files"):  # of another model
        pass
    assert "in its stage files" in start.under_way()
    start.ready()
    assert start.under_way() == ""
    files, ready = caplog.records
    assert files.getMessage().startswith(f"start: {STAGES['files']} in 0.0")
    words, _, speed = files.getMessage().partition(", downloaded bytes per second ")
    assert words.endswith(" s, folder /models, downloaded bytes 1,234,567")
    assert int(speed.replace(",", "")) == files.facts["downloaded_bytes_per_second"] > 1_234_567  # type: ignore[attr-defined]
    assert files.facts["stage"] == "files"  # type: ignore[attr-defined]
    assert ready.getMessage().startswith("start: ready for jobs after 0.0")
    assert ready.facts["stages"] == {"files": files.facts["seconds"]}  # type: ignore[attr-defined]


def test_a_stage_that_fails_has_no_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker")
    start = Start()
    with pytest.raises(ValueError, match="no"), start.stage("torch"):
        raise ValueError("no")
    assert caplog.records == []
    assert "in its stage torch" in start.under_way()


def test_no_request_of_the_hubs_is_logged_at_any_level(hub: Hub, tmp_path: Path) -> None:
    """A process: the hub's library sets its own levels when it is imported."""
    other = Hub()
    other.repos["someone/signed"] = Repo(SHIPPED)
    hub.repos["someone/signed"] = Repo(SHIPPED, elsewhere=other.url)
    script = (
        "import logging; logging.basicConfig(level=logging.DEBUG); from src.settings import Settings; "
        "from src.serving import logs, startup; settings = Settings.from_environment(); logs.configure(settings); "
        "startup.check_start(settings); print('bytes', startup.find_files(settings), startup.find_files(settings))"
    )
    environment = {"MODEL_NAME": "someone/signed", "HF_HOME": str(tmp_path), "LOG_LEVEL": "DEBUG", "HF_DEBUG": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, **environment, "RUNPOD_MODEL_CACHE": "/nonexistent", "HF_TOKEN": "hf_friend"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    other.close()
    text = ran.stdout + ran.stderr
    assert "files of the model found" in text
    came, again = map(int, re.findall(r"^bytes (\d+) (\d+)$", text, re.MULTILINE)[0])
    assert came > 10_000_000, "what is read ahead anew"
    assert again == 0
    assert [path for path, _ in other.asked if SIGNED in path], "files came by signed addresses"
    for word in ("Signature", "0f1e2d3c", "HTTP", "GET", "Request", "hf_friend"):
        assert word not in text, text
