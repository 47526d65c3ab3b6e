"""Weights that are read before anybody asks for them."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Thread
from typing import Any

from huggingface_hub import snapshot_download

from src.settings import ROOT, Settings
from src.weights.read_ahead import read, read_ahead
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
    assert read_by(Settings(model_name="flux-shapes"), share=0) == set()


def test_weights_that_are_kept_in_a_smaller_form_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "abc-nf4-bitsandbytes-1.pt").touch()
    here = {"model_name": "flux-shapes", "quantized_dir": tmp_path}
    assert "transformer" not in read_by(Settings.model_validate({**here, "quantization": "nf4"}))
    assert "transformer" in read_by(Settings.model_validate({**here, "quantization": "fp8"}))
    assert "transformer" in read_by(Settings.model_validate(here))
