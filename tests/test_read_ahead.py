"""Weights that are read before anybody asks for them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from src.settings import ROOT, Settings
from src.stages import START
from src.weights.host import HostMemory
from src.weights.read_ahead import one_ahead, read, read_ahead, size_of, weight_files
from tests.hub import Hub, Repo

SHIPPED = ROOT / "models" / "flux-shapes"


def read_by(settings: Settings, **arguments: Any) -> set[str]:
    """The networks whose weights were read."""
    networks: set[str] = set()
    thread = read_ahead(settings, read=lambda file: networks.add(file.parent.name), **arguments)
    thread.join(timeout=20)
    assert not thread.is_alive()
    return networks


def test_all_weights_of_a_local_model_are_read() -> None:
    networks = {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert read_by(Settings(model_name="flux-shapes")) == networks
    assert read_by(Settings(model_name=str(SHIPPED))) == networks


def test_files_are_read_to_their_ends(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    thread = Thread(target=read, args=(pipe,))
    thread.start()
    pipe.write_bytes(b"x" * 1_000_000)  # returns when all of it was taken
    thread.join(timeout=20)
    assert not thread.is_alive()


def test_nothing_is_downloaded_and_nothing_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.repos["someone/shapes"] = Repo(SHIPPED)
    asked = hub.requests
    settings = Settings(model_name="someone/shapes", runpod_model_cache=tmp_path / "none")

    def download(**arguments: Any) -> str:
        return str(snapshot_download(**{"cache_dir": tmp_path / "home", **arguments}))

    assert read_by(settings, download=download) == set()
    assert hub.requests == asked
    download(repo_id="someone/shapes")
    asked = hub.requests
    assert "transformer" in read_by(settings, download=download)
    assert hub.requests == asked
    assert read_by(Settings(model_name="/no/such/folder")) == set()


def test_what_memory_cannot_hold_is_not_read() -> None:
    size = size_of(weight_files(SHIPPED))
    settings = Settings(model_name="flux-shapes")
    assert read_by(settings, memory=lambda: HostMemory(total=1 << 40, free=size)) == set()
    assert read_by(settings, memory=lambda: HostMemory(total=1 << 40, free=2 * size)) != set()


def test_weights_that_are_kept_in_a_smaller_form_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "abc-nf4-bitsandbytes-1.pt").touch()
    here = {"model_name": "flux-shapes", "quantized_dir": tmp_path}
    smaller = read_by(Settings.model_validate({**here, "quantization": "nf4"}))
    assert "transformer" not in smaller
    assert tmp_path.name in smaller, "the smaller form itself is"
    assert "transformer" in read_by(Settings.model_validate({**here, "quantization": "fp8"}))
    assert "transformer" in read_by(Settings.model_validate(here))


def test_it_says_how_many_bytes_came_a_second(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "worker")
    START.seconds.pop("read-ahead", None)  # of another test
    read_by(Settings(model_name="flux-shapes"))
    (line,) = (record for record in caplog.records if "weights read ahead" in record.getMessage())
    size = size_of(weight_files(SHIPPED))
    assert f"bytes {size:,}, bytes per second " in line.getMessage()
    assert line.facts["bytes_per_second"] > 0  # type: ignore[attr-defined]


def test_one_group_of_files_is_ahead_of_who_uses_them_and_those_behind_are_dropped() -> None:
    groups = [[Path(f"{name}{number}") for number in range(2)] for name in "abcde"]
    held, most = set[Path](), 0
    coming = SimpleQueue[Path]()  # each is read when it is let through here

    def read(file: Path) -> None:
        nonlocal most
        coming.get(timeout=20)
        held.add(file)
        most = max(most, len(held))

    for file in groups[0]:
        coming.put(file)
    turns = one_ahead(groups, read, held.remove)
    for number, group in enumerate(groups):
        next(turns)
        assert held == set(group), "the next waits to be let through"
        for file in groups[number + 1] if number + 1 < len(groups) else []:
            coming.put(file)
    assert next(turns, "no more") == "no more"
    assert held == set()
    assert most <= 4, "two groups at most"


# The order of a start, as Python itself tells it


NOTES = """
import os, sys, threading
wanted = {"read ahead", "torch", "runpod", "socket.connect"}
def note(what):
    if what in wanted:
        wanted.remove(what)
        os.write(2, f"FIRST {what}\\n".encode())
sys.addaudithook(lambda event, arguments: note(arguments[0] if event == "import" else event))
start = threading.Thread.start
def begin(thread):
    note(thread.name)
    start(thread)
threading.Thread.start = begin
"""


def begun_first(tmp_path: Path, *command: str, **environment: str) -> list[str]:
    """What of reading ahead, of the imports that take seconds and of asking others began first in a start."""
    (tmp_path / "sitecustomize.py").write_text(NOTES)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    (tmp_path / "torch" / "version.py").write_text("__version__ = '9.9.0'\ncuda = None\n")
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "MODEL_NAME": "flux-shapes", "PYTHONPATH": str(tmp_path), **environment},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return [line.removeprefix("FIRST ") for line in ended.stderr.splitlines() if line.startswith("FIRST ")]


@pytest.mark.parametrize("command", [("handler.py",), ("-c", "import handler; handler.get_engine()")])
def test_reading_begins_before_all_that_takes_seconds(command: tuple[str, ...], tmp_path: Path) -> None:
    assert begun_first(tmp_path, *command)[0] == "read ahead"


def test_reading_begins_before_anybody_is_asked(tmp_path: Path) -> None:
    bucket = {
        "BUCKET_ENDPOINT_URL": "http://127.0.0.1:9/pictures", "BUCKET_ACCESS_KEY_ID": "k",
        "BUCKET_SECRET_ACCESS_KEY": "hidden",
    }  # fmt: skip
    assert begun_first(tmp_path, "handler.py", **bucket) == ["read ahead", "runpod", "socket.connect"]


def test_the_page_begins_to_read_before_torch(tmp_path: Path) -> None:
    begun = begun_first(tmp_path, "web.py", "--port", "0")
    assert begun.index("read ahead") < begun.index("torch")
