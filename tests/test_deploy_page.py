"""docs/deploy.md: each of its commands is run, or held against what it names."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from deploy.__main__ import INTO_A_FILE, main
from deploy.endpoint import OTHER_VARIABLES
from scripts.docs import cards
from src.settings import ROOT, Settings
from tests.runpod_rest import KEY, rest_api

PAGE = ROOT / "docs" / "deploy.md"
# Of docker's, curl's and runpodctl's options those that the page uses, as their manuals have them.
OPTIONS: Mapping[str, frozenset[str]] = {
    "git clone": frozenset(),
    "docker login": frozenset(),
    "docker build": frozenset({"-t", "--build-arg", "--secret"}),
    "docker push": frozenset(),
    "curl": frozenset({"-X", "-H", "-d", "-o"}),
    "runpodctl serverless logs": frozenset({"--follow"}),
}
ADDRESSES = (
    r"https://api\.runpod\.ai/v2/\$ENDPOINT_ID/(runsync|health|status/\$JOB_ID)",
    r"https://api\.runpod\.io/v2/network-volumes",
)
# What stands in capitals on the page and is no setting.
OTHER_NAMES = {"IMAGE", "ENDPOINT_ID", "JOB_ID", "RUNPOD_API_KEY", "BAKE_MODEL", "IN_QUEUE", "IN_PROGRESS", "COMPLETED"}


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


def enters(command: str) -> None:
    """`cd`: the folder that the clone makes."""
    assert re.search(rf"^git clone https://\S+/{command.split()[1]}\.git$", PAGE.read_text(), re.MULTILINE)


def makes(command: str) -> None:
    """`make`: a target that there is."""
    assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text()


def activates(command: str) -> None:
    """The environment that `make` makes."""
    (folder,) = re.findall(r"^VENV := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert command == f". {folder}/bin/activate"


def logs_in(command: str) -> None:
    """`docker login`: to the registry of the image."""
    assert f"export IMAGE={command.split()[2]}/" in PAGE.read_text()


def says(command: str) -> None:
    """`python -c`: what `python -m deploy` says too; it is run below."""
    assert command == INTO_A_FILE


CHECKS: Mapping[str, Callable[[str], None]] = {
    "git clone": lambda _: None,
    "cd": enters,
    "make": makes,
    ".": activates,
    "docker login": logs_in,
    "python -m deploy": runs,
    "python -c": says,
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
    way = [
        "git clone", "cd", "make", ".", "docker login", "docker build", "docker push", "python -m deploy", "curl",
        "python -c",
    ]  # fmt: skip
    assert [steps.index(step) for step in way] == sorted(steps.index(step) for step in way)
    made = next(number for number, command in enumerate(commands()) if command.endswith("--apply"))
    assert steps.index("docker push") < made < steps.index("curl")


def test_the_way_ends_with_a_picture(tmp_path: Path) -> None:
    """The last command, on what the handler answers to the request that the page sends."""
    from handler import handler

    sent = json.loads((ROOT / "test_input.json").read_text())
    answer = {"delayTime": 1, "executionTime": 2, "id": "job", "output": handler({"id": "job", **sent})}
    (tmp_path / "answer.json").write_text(json.dumps({**answer, "status": "COMPLETED"}))
    _, *words = shlex.split(INTO_A_FILE)
    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True)
    with Image.open(tmp_path / "picture.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (128, 128))


def test_the_volume_holds_the_model_that_is_shown_on_it(capsys: pytest.CaptureFixture[str]) -> None:
    (volume,) = (command for command in commands() if "network-volumes" in command)
    (deployed,) = (command for command in commands() if "--network-volume " in command)
    assert main(shlex.split(deployed.replace("--apply", ""))[3:]) == 0
    (least,) = re.findall(r"volume +at least (\d+) GB", capsys.readouterr().out)
    body = json.loads(shlex.split(volume)[-1])
    assert body["size"] >= int(least)
    assert set(body) == {"name", "size", "dataCenter"}, "as CreateNetworkVolumeRequest has them"


def test_it_says_whether_somebody_measured_the_cards() -> None:
    assert (", measured" in cards()) != ("Nobody has measured these cards yet" in " ".join(PAGE.read_text().split()))


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
