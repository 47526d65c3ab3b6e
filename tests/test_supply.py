"""What the worker is built of: every package by its hashes, its licence, and as few rights as the checks need."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from scripts.licences import IMAGE, licence, locked, plain, text_of
from scripts.lock import FILES, split_cuda
from src.settings import ROOT

LOCKED = sorted(file.stem for file in (ROOT / "locked").glob("*.txt"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def wanted(file: str) -> list[Requirement]:
    """The requirements of a file."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


def test_each_file_of_requirements_has_its_locked_one() -> None:
    sources = {source for source, _ in FILES.values()}
    assert sources == {file.name for file in ROOT.glob("requirements*.txt")}
    assert set(LOCKED) == {*FILES, "torch", "cuda"}


@pytest.mark.parametrize("name", FILES)
def test_what_is_wanted_is_locked(name: str) -> None:
    source, apart = FILES[name]
    pins = locked("torch", name, *apart)
    stale = [r for r in wanted(source) if not r.specifier.contains(pins.get(plain(r.name), "0"), prereleases=True)]
    assert stale == [], "run make lock"


@pytest.mark.parametrize("name", LOCKED)
def test_each_package_is_held_by_its_hashes_and_comes_from_nowhere_else(name: str) -> None:
    """Nothing but pins, hashes and comments: no option, no address, no folder of a machine."""
    pin, digest = r"[a-z0-9.-]+==[\w.+-]+( ; [\w.<>=!' ()]+)? \\", r"    --hash=sha256:[0-9a-f]{64}( \\)?"
    comment = r"# Made by `make lock` from [\w.-]+\.|    #( via)?(   ?(-r )?[\w.-]+)?"
    before = ""
    for line in text_of(name).splitlines():
        assert re.fullmatch(f"{pin}|{digest}|{comment}", line), line
        assert not before.endswith("\\") or line.startswith("    --hash"), line
        before = line


def test_cudas_libraries_are_apart() -> None:
    assert {"nvidia-cublas", "triton"} <= set(locked("cuda"))
    assert not [name for name in locked("runtime", "quantization", "development") if name.startswith("nvidia")]
    blocks = [
        "torch==1 \\\n    # via -r x",
        "a==1 ; sys_platform == 'linux' \\\n    # via\n    #   torch",
        "b==1 ; sys_platform == 'linux' \\\n    # via\n    #   a\n    #   torch",
        "c==1 ; sys_platform == 'linux' \\\n    # via\n    #   a\n    #   d",
        "d==1 \\\n    # via torch",
    ]
    cuda, others = split_cuda(blocks)
    assert [block[0] for block in cuda] == ["a", "b"]
    assert [block[0] for block in others] == ["t", "c", "d"]


def test_what_is_installed_is_what_is_locked() -> None:
    """Of the packages that every platform has."""
    everywhere = re.findall(r"^([\w.-]+)==(\S+) \\$", text_of("runtime") + text_of("torch"), re.MULTILINE)
    assert len(everywhere) > 50
    wrong = {}
    for name, pin in everywhere:
        try:
            found = version(name).partition("+")[0]
        except PackageNotFoundError:
            found = "none"
        if found != pin:
            wrong[name] = (found, pin)
    assert wrong.keys() <= {"setuptools"}, wrong  # which the virtual environment may have had before


def test_every_licence_is_listed_and_none_asks_for_the_workers_source() -> None:
    rows = re.findall(r"^\| ([\w.-]+) \| (\S+) \| (.+) \|$", (ROOT / "LICENCES.md").read_text(), re.MULTILINE)
    listed = {name: version for name, version, _ in rows if name not in ("package", "---")}
    assert listed == locked(*IMAGE), "run make licences"
    strict = {name: says for name, _, says in rows if asks_for_source(says)}
    assert strict == {}


def asks_for_source(licence: str) -> bool:
    """Whether every licence that may be chosen is the GPL or the AGPL; the LGPL asks for less."""
    return all(
        re.search(r"(?<![A-Z])A?GPL|GNU (Affero )?General Public", way, re.IGNORECASE) for way in licence.split(" OR ")
    )


def test_licences_as_packages_write_them() -> None:
    assert [asks_for_source(text) for text in ("GPL-3.0", "AGPL-3.0-only", "GPLv2+", "MIT AND GPL-2.0")] == [True] * 4
    assert [asks_for_source(text) for text in ("LGPL-2.1", "MIT", "MIT OR GPL-2.0")] == [False] * 3
    assert licence("x", {"license": "MIT", "license_expression": "0BSD"}) == "0BSD"
    assert licence("x", {"license": "a\nlong\ntext", "classifier": ["License :: OSI Approved :: MIT License"]}) == (
        "MIT License"
    )
    with pytest.raises(LookupError, match="x says nothing of its licence"):
        licence("x", {"license": None})


# What a job may do beside reading the code.
RIGHTS: dict[tuple[str, str], dict[str, str]] = {
    ("release", "image"): {"contents": "read", "packages": "write"},
    ("release", "scan"): {"packages": "read"},
    ("release", "publish"): {"packages": "write", "id-token": "write", "attestations": "write"},
    ("release", "release"): {"contents": "write"},
}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflows_may_do_what_they_must_and_no_more(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    for name, job in workflow["jobs"].items():
        assert job.get("permissions") == RIGHTS.get((file.stem, name)), name
        assert 0 < job["timeout-minutes"] <= 60, name
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            assert "${{" not in step.get("run", ""), "a name of a branch or a tag would be run as a command: use env"


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_every_action_is_a_commit_that_names_its_version(file: Path) -> None:
    """A tag can be moved to other code; Dependabot reads the version in the comment and keeps both."""
    used = [line.strip().removeprefix("- ") for line in file.read_text().splitlines() if "uses:" in line]
    assert used
    for line in used:
        assert re.fullmatch(r"uses: [\w-]+(/[\w-]+)+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_one_action_is_one_commit_everywhere() -> None:
    found: dict[str, set[str]] = {}
    for file in WORKFLOWS:
        for action, commit in re.findall(r"uses: (\S+)@(.+)", file.read_text()):
            found.setdefault(action, set()).add(commit)
    assert {action: commits for action, commits in found.items() if len(commits) > 1} == {}


def test_a_release_is_named_only_once_its_image_is_scanned() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())
    jobs = workflow["jobs"]
    assert {name: job.get("needs") for name, job in jobs.items()} == {
        "test": None, "image": "test", "scan": "image", "publish": ["image", "scan"], "release": ["image", "publish"],
    }  # fmt: skip
    (build,) = [step["with"] for step in jobs["image"]["steps"] if "build-push-action" in step.get("uses", "")]
    assert "push-by-digest=true" in build["outputs"]
    assert "tags" not in build
    assert (build["sbom"], build["provenance"]) == (True, "mode=max")
    digest = "needs.image.outputs.digest"
    (scan,) = jobs["scan"]["steps"]
    assert digest in scan["with"]["image-ref"]
    assert scan["with"]["exit-code"] == "1"
    assert any(digest in str(step.get("with")) for step in jobs["publish"]["steps"] if "attest" in step.get("uses", ""))


def test_the_workflows_audit_what_is_locked_and_dependabot_sees_to_all_of_it() -> None:
    assert any("make audit" in file.read_text() for file in WORKFLOWS)
    assert all(f"locked/{name}.txt" in (ROOT / "Dockerfile").read_text() for name in IMAGE)
    config = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())
    assert {update["package-ecosystem"] for update in config["updates"]} == {"pip", "docker", "github-actions"}
