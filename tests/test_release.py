"""A version is made of a clean tree: real git, in a repository of its own."""

from __future__ import annotations

import datetime as dt
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts.release import NotReleased, hindrances, main, notes, release, section, version_of
from src import __version__
from src.settings import ROOT

DAY = dt.date(2026, 12, 1)
CHANGES = """# Changelog

## [Unreleased]

### Added
- Pictures.

## [1.0.0] - 2026-11-25

### Added
- Everything else.
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "__init__.py").write_text('"""The worker."""\n\n__version__ = "1.0.0"\n')
    (tmp_path / "Dockerfile").write_text("FROM scratch\nARG VERSION=1.0.0\nARG REVISION=unknown\n")
    (tmp_path / "CHANGELOG.md").write_text(CHANGES)
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    git(tmp_path, "config", "user.name", "somebody")
    git(tmp_path, "config", "user.email", "somebody@example.com")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "all of it")
    return tmp_path


def git(folder: Path, *words: str) -> str:
    plain = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    command = ["git", *words]
    return subprocess.run(command, cwd=folder, env=plain, check=True, capture_output=True, text=True).stdout.strip()


def test_what_was_unreleased_becomes_the_version_in_a_commit_and_a_tag(project: Path) -> None:
    before = git(project, "rev-parse", "HEAD")
    said = release(project, "1.1.0", DAY)
    assert "git push --atomic origin main v1.1.0" in said
    assert version_of(project) == "1.1.0"
    assert "\nARG VERSION=1.1.0\n" in (project / "Dockerfile").read_text()
    text = (project / "CHANGELOG.md").read_text()
    assert "## [Unreleased]\n\n## [1.1.0] - 2026-12-01\n\n### Added\n- Pictures.\n\n## [1.0.0]" in text
    assert git(project, "status", "--porcelain") == ""
    assert git(project, "rev-parse", "HEAD~1") == before
    assert git(project, "log", "-1", "--format=%s") == "Release 1.1.0"
    assert git(project, "cat-file", "-t", "v1.1.0") == "tag"
    assert git(project, "rev-parse", "v1.1.0^{commit}") == git(project, "rev-parse", "HEAD")
    assert "### Added\n- Pictures." in git(project, "tag", "--list", "--format=%(contents)", "v1.1.0")
    assert notes(project, "v1.1.0") == "### Added\n- Pictures."


def test_what_it_says_to_do_pushes_it_and_takes_it_back(
    project: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    remote = tmp_path_factory.mktemp("remote")
    git(remote, "init", "--quiet", "--bare")
    git(project, "remote", "add", "origin", str(remote))
    before = git(project, "rev-parse", "HEAD")
    commands = re.findall(r"^ +(git .+)$", release(project, "1.1.0", DAY), re.MULTILINE)
    assert git(remote, "tag") == "", "it pushed by itself"
    push, back = commands
    for command in (push, *back.split(" && ")):
        git(project, *command.split()[1:])
    assert (git(remote, "tag"), git(remote, "branch", "--format=%(refname:short)")) == ("v1.1.0", "main")
    assert (git(project, "tag"), git(project, "rev-parse", "HEAD")) == ("", before)


def untracked(project: Path) -> None:
    (project / "notes.txt").write_text("half done")


def changed(project: Path) -> None:
    (project / "src" / "__init__.py").write_text('__version__ = "1.0.1"\n')


def another_version(project: Path) -> None:
    (project / "Dockerfile").write_text("FROM scratch\nARG VERSION=0.9.0\n")
    git(project, "commit", "--quiet", "--all", "--message", "forgotten")


def elsewhere(project: Path) -> None:
    git(project, "switch", "--quiet", "--create", "idea")


def detached(project: Path) -> None:
    git(project, "switch", "--quiet", "--detach")


def tagged(project: Path) -> None:
    git(project, "tag", "v1.1.0")


def nothing_new(project: Path) -> None:
    changelog = project / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("### Added\n- Pictures.\n", ""))
    git(project, "commit", "--quiet", "--all", "--message", "nothing to say")


def written_already(project: Path) -> None:
    changelog = project / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace("[1.0.0]", "[1.1.0]"))
    git(project, "commit", "--quiet", "--all", "--message", "too early")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (untracked, "1 files are not committed"),
        (changed, "1 files are not committed"),
        (another_version, "Dockerfile says 0.9.0, and src/__init__.py says 1.0.0"),
        (elsewhere, "the branch is idea: switch to main"),
        (detached, "the branch is none: switch to main"),
        (tagged, "the tag v1.1.0 is there already"),
        (nothing_new, "CHANGELOG.md has nothing under ## [Unreleased]"),
        (written_already, "CHANGELOG.md has a section for 1.1.0 already"),
    ],
)
def test_what_is_in_the_way_is_named_and_nothing_is_changed(
    project: Path, spoil: Callable[[Path], None], said: str
) -> None:
    spoil(project)
    before = git(project, "log", "--all", "--format=%H"), (project / "CHANGELOG.md").read_text()
    with pytest.raises(NotReleased, match=re.escape(said)):
        release(project, "1.1.0", DAY)
    assert (git(project, "log", "--all", "--format=%H"), (project / "CHANGELOG.md").read_text()) == before


@pytest.mark.parametrize("version", ["", "1.1", "v1.1.0", "1.1.0-rc.1", "01.1.0", "1.0.0", "0.9.9"])
def test_a_version_that_is_none_or_not_above_the_last_is_refused(project: Path, version: str) -> None:
    assert any(f"VERSION={version} is not" in line for line in hindrances(project, version))


def test_all_that_is_in_the_way_is_said_at_once(project: Path) -> None:
    untracked(project)
    elsewhere(project)
    assert len(hindrances(project, "1.0")) == 3


def test_a_tag_that_the_code_does_not_have_has_no_notes(project: Path) -> None:
    with pytest.raises(NotReleased, match=r"the tag v2.0.0 says 2.0.0, and src/__init__.py says 1.0.0"):
        main(["--notes", "v2.0.0"], project)
    assert main(["--notes", "v1.0.0"], project) == "### Added\n- Everything else."


def test_this_project_can_be_read_so() -> None:
    """As it is: the section of its version, and the version that the worker says."""
    assert version_of(ROOT) == __version__
    assert section((ROOT / "CHANGELOG.md").read_text(), __version__)
    assert 'version = { attr = "src.__version__" }' in (ROOT / "pyproject.toml").read_text()
