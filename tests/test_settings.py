from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from src.errors import InvalidSettings
from src.settings import ROOT, Settings


def test_the_specifications_defaults() -> None:
    settings = Settings.from_environment({})
    assert settings.model_name == "FLUX.1-dev"
    assert settings.hf_token is None
    assert settings.batch_size == 1


def test_an_empty_variable_is_unset_and_others_are_none_of_ours() -> None:
    assert Settings.from_environment({"MODEL_NAME": " ", "PATH": "/bin"}) == Settings()


def test_values_are_read_as_their_types() -> None:
    settings = Settings.from_environment(
        {"BATCH_SIZE": "4", "INCLUDE_TRACEBACK": "false", "LOG_LEVEL": "debug", "MAX_PIXELS": "1048576"}
    )
    assert (settings.batch_size, settings.include_traceback, settings.log_level) == (4, False, "DEBUG")
    assert settings.max_pixels == 1024 * 1024


def test_all_wrong_variables_are_named_at_once() -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment({"BATCH_SIZE": "nine", "LOG_LEVEL": "loud"})
    assert "BATCH_SIZE='nine'" in str(caught.value)
    assert "LOG_LEVEL='loud'" in str(caught.value)


def test_settings_do_not_change_and_do_not_show_the_token() -> None:
    settings = Settings.from_environment({"HF_TOKEN": "hf_secret"})
    assert "hf_secret" not in repr(settings)
    name = "batch_size"  # a type checker forbids what is tried here
    with pytest.raises(ValidationError):
        setattr(settings, name, 2)


def test_a_dotenv_file_is_read_and_the_environment_wins(tmp_path: Path) -> None:
    script = (
        "import os; from src.settings import Settings; s = Settings.from_environment(); "
        "print(s.model_name, s.batch_size, os.environ.get('HF_HOME'))"
    )
    copy = tmp_path / "project"
    (copy / "src").mkdir(parents=True)
    for name in ("__init__.py", "settings.py", "errors.py", "redaction.py", "catalog.py"):
        (copy / "src" / name).write_text((ROOT / "src" / name).read_text())
    (copy / ".env").write_text("MODEL_NAME=flux-shapes\nBATCH_SIZE=3\nHF_HOME=\n")
    environment = {"PATH": os.environ["PATH"], "BATCH_SIZE": "2"}
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=copy, env=environment, capture_output=True, text=True, check=True
    )
    assert output.stdout.split() == ["flux-shapes", "2", "None"], "an empty line is no value"


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_dotenv_reaches_huggingface_hub(encoding: str, tmp_path: Path) -> None:
    """Which reads its environment when it is imported, and never again."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "handler.py", tmp_path)
    text = "HF_HOME='/some/where'\r\nHF_ENDPOINT=https://mirror.example\r\nHF_HUB_OFFLINE=1\r\n"
    (tmp_path / ".env").write_bytes(
        ("\ufeff" if encoding == "utf-16-le" else "").encode(encoding) + text.encode(encoding)
    )
    script = (
        "import handler; from huggingface_hub import constants as c; print(c.HF_HOME, c.ENDPOINT, c.HF_HUB_OFFLINE)"
    )
    output = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.split() == ["/some/where", "https://mirror.example", "True"]


def test_a_dotenv_file_that_is_no_text_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_bytes(b"HF_HOME=\xff\xff\x80")
    monkeypatch.setattr("src.settings.ROOT", tmp_path)
    with pytest.raises(InvalidSettings, match=r"the file \.env is no text in UTF-8 or UTF-16"):
        Settings.from_environment()


def test_quotes_and_line_ends_around_values_are_taken_off() -> None:
    settings = Settings.from_environment(
        {"MODEL_NAME": '"flux-shapes"\r\n', "HF_TOKEN": "' hf_abc '", "BUCKET_PREFIX": '"'}
    )
    assert (settings.model_name, settings.bucket_prefix) == ("flux-shapes", '"')
    assert settings.hf_token is not None
    assert settings.hf_token.get_secret_value() == "hf_abc"


@pytest.mark.parametrize("name", ["HF_TOKEN", "CIVITAI_TOKEN", "BUCKET_SECRET_ACCESS_KEY"])
@pytest.mark.parametrize(("odd", "code"), [("\n", "U+000A"), ("…", "U+2026"), (" ", "U+0020")])
def test_a_token_that_no_header_can_carry_is_named_and_not_shown(name: str, odd: str, code: str) -> None:
    with pytest.raises(InvalidSettings) as caught:
        Settings.from_environment({name: f"abc{odd}def"})
    assert f"{name}: holds the character {code} in place 4 of 7" in str(caught.value)
    assert "abc" not in str(caught.value)


def test_the_example_file_shows_every_variable_with_its_default() -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    shown = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    expected = {name.upper() for name in Settings.model_fields} - {
        "RUNPOD_MODEL_CACHE", "RUNPOD_ENDPOINT_ID", "RUNPOD_REALTIME_PORT",
    }  # fmt: skip
    assert expected <= set(shown)
    assert Settings.from_environment(shown) == Settings()


def test_only_settings_reads_the_environment() -> None:
    sources = [*(ROOT / "src").rglob("*.py"), ROOT / "handler.py", ROOT / "local_test.py"]
    assert [file.name for file in sources if re.search(r"os\.environ|getenv", file.read_text())] == ["settings.py"]


def test_a_bucket_is_whole_or_none() -> None:
    with pytest.raises(InvalidSettings, match=r"must be set together, and BUCKET_ACCESS_KEY_ID is missing"):
        Settings.from_environment({"BUCKET_ENDPOINT_URL": "https://s3.example.com/x", "BUCKET_SECRET_ACCESS_KEY": "s"})
    with pytest.raises(InvalidSettings, match=r"BUCKET_ENDPOINT_URL='s3\.example\.com'"):
        Settings.from_environment({"BUCKET_ENDPOINT_URL": "s3.example.com"})


def test_warm_up_sizes_are_read() -> None:
    assert Settings.from_environment({"WARMUP_SIZES": "1024x1024, 512X768"}).warmup_sizes == ((1024, 1024), (512, 768))
    assert Settings.from_environment({"WARMUP_SIZES": "none"}).warmup_sizes == ()
    with pytest.raises(InvalidSettings, match="WARMUP_SIZES='big'"):
        Settings.from_environment({"WARMUP_SIZES": "big"})
