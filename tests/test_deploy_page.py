"""docs/deploy.md: each of its commands is run, or held against what it names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import pytest

from deploy.__main__ import main
from deploy.endpoint import OTHER_VARIABLES
from src.settings import ROOT, Settings
from tests.runpod_rest import KEY, rest_api

PAGE = ROOT / "docs" / "deploy.md"
# Of docker's, curl's and runpodctl's options those that the page uses, as their manuals have them.
OPTIONS: Mapping[str, frozenset[str]] = {
    "docker build": frozenset({"-t", "--build-arg", "--secret"}),
    "docker push": frozenset(),
    "curl": frozenset({"-X", "-H", "-d"}),
    "runpodctl serverless logs": frozenset({"--follow"}),
}
ADDRESSES = (
    r"https://api\.runpod\.ai/v2/\$ENDPOINT_ID/(runsync|health|status/\$JOB_ID)",
    r"https://api\.runpod\.io/v2/network-volumes",
)
# What stands in capitals on the page and is no setting.
OTHER_NAMES = {"IMAGE", "ENDPOINT_ID", "JOB_ID", "RUNPOD_API_KEY", "BAKE_MODEL", "IN_QUEUE", "IN_PROGRESS"}


def commands() -> list[str]:
    """Every command of the page, each on one line."""
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def begins(command: str) -> str:
    """The words of OPTIONS, or of CHECKS, that it begins with."""
    return next((known for known in (*OPTIONS, *CHECKS) if command.startswith(f"{known} ")), "")


def options(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("-")}


def runs(command: str) -> None:
    """`python -m deploy`, against a stand-in of RunPod's API where it is to send something."""
    words = shlex.split(command.replace("$IMAGE", "ghcr.io/you/flux2-endpoint:1.0"))[3:]
    with rest_api() as stand_in:
        assert main([*words, "--api", stand_in.url]) == 0
        assert bool(stand_in.kept) == ("--apply" in words)


def builds(command: str) -> None:
    """`docker build`: arguments that the Dockerfile takes, in a folder that has one."""
    words, dockerfile = shlex.split(command), (ROOT / "Dockerfile").read_text()
    given = [word.partition("=")[0] for option, word in pairwise(words) if option == "--build-arg"]
    assert set(given) <= set(re.findall(r"^ARG (\w+)", dockerfile, re.MULTILINE))
    secrets = [word.partition("id=")[2].partition(",")[0] for word in words if word.startswith("id=")]
    assert all(f"type=secret,id={secret}" in dockerfile for secret in secrets)
    assert (ROOT / words[-1]).is_dir()


def asks(command: str) -> None:
    """`curl`: an address of RunPod's, files that are there."""
    words = shlex.split(command)
    (address,) = (word for word in words if word.startswith("https://"))
    assert any(re.fullmatch(pattern, address) for pattern in ADDRESSES), address
    assert all((ROOT / word[1:]).is_file() for word in words if word.startswith("@"))


def sets(command: str) -> None:
    """`export`: a variable that the page uses."""
    name = command.removeprefix("export ").partition("=")[0]
    assert f"${name}" in PAGE.read_text() or name == "RUNPOD_API_KEY"


CHECKS: Mapping[str, Callable[[str], None]] = {
    "python -m deploy": runs,
    "docker build": builds,
    "docker push": lambda _: None,
    "curl": asks,
    "export": sets,
    "runpodctl serverless logs": lambda _: None,
}


@pytest.mark.parametrize("command", commands())
def test_each_command_runs_or_names_what_there_is(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", KEY)
    kind = begins(command)
    assert kind, f"no test knows {command}"
    if kind in OPTIONS:
        assert options(shlex.split(command)) <= OPTIONS[kind]
    CHECKS[kind](command)


def test_the_commands_lead_from_an_image_to_a_picture() -> None:
    steps = [begins(command) for command in commands()]
    way = ["docker build", "docker push", "python -m deploy", "curl"]
    assert [steps.index(step) for step in way] == sorted(steps.index(step) for step in way)


def test_every_setting_that_it_names_is_one() -> None:
    known = {name.upper() for name in Settings.model_fields} | set(OTHER_VARIABLES) | OTHER_NAMES
    named = re.findall(r"`([A-Z][A-Z_0-9]{3,})`|--set ([A-Z_]+)=", PAGE.read_text())
    assert {name for pair in named for name in pair if name} <= known


def test_every_file_and_option_that_it_names_is_there() -> None:
    text = PAGE.read_text()
    assert all((PAGE.parent / name).exists() for name in re.findall(r"\]\((?!https://)([^)#]+)\)", text))
    assert all(Path(ROOT / name).exists() for name in re.findall(r"`((?:tests|benchmarks|docs)/[\w./]+)`", text))
    code = (ROOT / "deploy" / "__main__.py").read_text()
    named = set(re.findall(r"`(--[a-z-]+)", text)) - {"--model-reference"}  # runpodctl's
    assert {option for option in named if f'"{option.replace("--no-", "--")}"' not in code} == set()
