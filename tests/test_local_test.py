"""local_test.py as a user runs it."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image

import local_test
from handler import get_engine
from local_test import _value, main
from src.errors import ModelUnavailable
from src.outputs import Loaded
from src.serving.logs import log
from src.settings import ROOT


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def test_the_test_input_becomes_a_picture_and_a_table(tmp_path: Path) -> None:
    environment = {**os.environ, "MODEL_NAME": "flux-shapes"}
    run = subprocess.run(
        [sys.executable, "local_test.py", "--output", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert size(tmp_path / "42.png") == (128, 128)
    for line in ("load", "encode prompt", "denoise", "per step", "decode", "encode images", "total"):
        assert any(row.strip().startswith(line) for row in run.stdout.splitlines()), line
    assert f"saved    {tmp_path / '42.png'}" in run.stdout
    assert "denoise: 100%" in run.stderr or "8/8" in run.stderr
    lines = run.stderr.splitlines()
    assert [line for line in lines if line.startswith("start: ")], run.stderr
    assert any(line.startswith("start: weights read in ") for line in lines)
    assert "torchao" not in run.stderr
    assert "pytree" not in run.stderr


def test_where_no_picture_can_be_saved_no_model_is_loaded() -> None:
    """By a user who is not root."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        code = (
            "import os, sys, local_test, huggingface_hub.utils; os.geteuid() or os.setuid(10001); "
            f"sys.exit(local_test.main(['--output', '{folder}/outputs']))"
        )
        covered = {name for name in os.environ if name.startswith("COV")}  # its files are not that user's to write
        environment = {name: value for name, value in os.environ.items() if name not in covered}
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT, env={**environment, "MODEL_NAME": "/no/such/model"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert (run.returncode, run.stdout) == (1, "")
    assert re.fullmatch(r"error: \S+/outputs cannot be written by user .*, or give another --output\n", run.stderr)


def test_what_only_hinders_a_start_is_a_line_also_of_a_quiet_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load() -> object:
        log.info("start: done")
        log.warning("there is no NVIDIA driver")
        raise ModelUnavailable("nothing is loaded")

    monkeypatch.setattr(local_test, "get_engine", load)
    level, handlers = log.level, list(log.handlers)
    for options, expected in (([], ["start: done"]), (["--quiet"], [])):
        assert main([*options, "--output", str(tmp_path)]) == 1
        assert capsys.readouterr().err.splitlines() == [
            *expected, "warning: there is no NVIDIA driver", "error: nothing is loaded",
        ]  # fmt: skip
    assert (log.level, log.handlers) == (level, handlers)


def test_fields_are_options_and_several_pictures_get_a_contact_sheet(tmp_path: Path) -> None:
    arguments = ["--prompt", "a red circle", "--num-images", "3", "--seed", "1", "--output_format", "jpg"]
    assert main([*arguments, "--quiet", "--output", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.jpeg", "2.jpeg", "3.jpeg", "contact-sheet.png"]
    assert size(tmp_path / "contact-sheet.png") == (3 * 128 + 8, 128)


@pytest.mark.slow
def test_a_picture_is_drawn_as_it_is_and_says_so_or_is_warmed_up_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = get_engine()
    monkeypatch.setattr(engine, "loaded", lambda: Loaded((), (), {}, {"compiled": "not warmed up"}))
    asked = ["--quiet", "--output", str(tmp_path), "--prompt", "x"]
    assert main(asked) == 0
    assert "compiled no: a worker's blocks are compiled while it warms up" in capsys.readouterr().out
    assert main([*asked, "--warm-up"]) == 0
    assert re.search(r"^warm-up  128x128: \d+\.\d\d s$", capsys.readouterr().out, re.MULTILINE)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "input.json"
    file.write_text(json.dumps({"input": {"prompt": "a red circle", "seed": 1, "width": 64}}))
    assert main(["--input", str(file), "--seed", "2", "--quiet", "--output", str(tmp_path)]) == 0
    assert size(tmp_path / "2.png") == (64, 128)


def test_pictures_are_named_by_their_files_wherever_a_field_holds_some(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "red").save(file)
    sent = base64.b64encode(file.read_bytes()).decode()
    assert _value("init_image", str(file)) == sent
    assert _value("init_images", f"{file}, {file}") == [sent, sent]
    assert _value("controls", json.dumps([{"image": str(file), "type": "canny"}])) == [{"image": sent, "type": "canny"}]
    assert _value("control_image", "https://example.com/a.png") == "https://example.com/a.png"
    assert _value("init_image", "A" * 300) == "A" * 300
    assert _value("prompt", "42") == "42"
    assert _value("prompt", '["a fox", "an owl"]') == ["a fox", "an owl"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "x", "--num-images", "9"], "num_images: must be less than or equal to 4, got 9"),
        (["--prompt", "x", "--num-images", "many"], "got 'many'"),
        (["--input", "/no/such/file"], "No such file"),
        (["--input", str(ROOT / "requirements.txt")], "Expecting value"),
        (["--input", str(ROOT / "models" / "flux-shapes" / "model_index.json")], 'must hold {"input": {...}}'),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--quiet", "--output", str(tmp_path)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1  # more than that may be said of the machine
    assert lines[0].startswith("error: ")
    assert words in lines[0]


def test_the_test_input_suits_every_model() -> None:
    fields = json.loads((ROOT / "test_input.json").read_text())["input"]
    assert set(fields) <= {"prompt", "seed"}


def test_a_call_of_openais_api_is_printed_as_its_client_gets_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = {"openai_route": "/v1/images/generations", "openai_input": {"prompt": "a red star", "n": 1}}
    (tmp_path / "call.json").write_text(json.dumps({"input": call}))
    assert main(["--input", str(tmp_path / "call.json"), "--output", str(tmp_path), "--quiet"]) == 0
    assert '"b64_json"' in capsys.readouterr().out
    call["openai_input"] = {"prompt": "a red star", "n": 9}
    (tmp_path / "call.json").write_text(json.dumps({"input": call}))
    assert main(["--input", str(tmp_path / "call.json"), "--output", str(tmp_path), "--quiet"]) == 1
    assert '"param": "n"' in capsys.readouterr().err
