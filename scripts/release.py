"""`make release VERSION=1.2.3`: what is unreleased becomes that version, as a commit and a tag; nothing is pushed.

`python -m scripts.release --notes v1.2.3` prints the changelog's section, which .github/workflows/release.yml makes the
release's text. Imports nothing of the worker: the workflow runs it without any package.
"""

from __future__ import annotations

import argparse
import datetime as dt
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BRANCH = "main"
_CHANGELOG, _VERSION = "CHANGELOG.md", "src/__init__.py"  # which pyproject.toml takes it from
_UNRELEASED = "## [Unreleased]"
_NUMBERS = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
# Where the version stands: the first is what the worker says, the others repeat it where they have such a line.
_STANDS: Mapping[str, re.Pattern[str]] = {
    _VERSION: re.compile(r'(?<=^__version__ = ").+(?="$)', re.MULTILINE),
    "Dockerfile": re.compile(r"(?<=^ARG VERSION=).+$", re.MULTILINE),
}


class NotReleased(Exception):
    """All that stands in the way, a sentence a line."""


def section(changelog: str, name: str) -> str:
    """What the changelog says of a version, or of "Unreleased"; empty where it says nothing."""
    found = re.search(rf"^## \[{re.escape(name)}\].*?$(.*?)(?=^## \[|\Z)", changelog, re.MULTILINE | re.DOTALL)
    return found[1].strip() if found else ""


def version_of(root: Path) -> str:
    """The version that the worker says it has."""
    if held := _held(root).get(_VERSION):
        return held
    raise NotReleased(f'{_VERSION} has no line __version__ = "..."')


def _held(root: Path) -> dict[str, str]:
    """The version in each file that has one."""
    found = {name: pattern.search((root / name).read_text()) for name, pattern in _STANDS.items()}
    return {name: match[0] for name, match in found.items() if match}


def notes(root: Path, tag: str) -> str:
    """The changelog's section of the version that `tag` names. Raises NotReleased where code and tag disagree."""
    version, held = tag.removeprefix("v"), version_of(root)
    if version != held:
        raise NotReleased(f"the tag {tag} says {version}, and {_VERSION} says {held}: tag with make release")
    text = section((root / _CHANGELOG).read_text(), version)
    if not text:
        raise NotReleased(f"{_CHANGELOG} says nothing of {version}: tag with make release")
    return text


def hindrances(root: Path, version: str) -> list[str]:
    """Why `version` cannot be released from the repository at `root` as it is now."""
    changelog, held = (root / _CHANGELOG).read_text(), version_of(root)
    numbers, before = (_NUMBERS.fullmatch(text) for text in (version, held))
    found = []
    if numbers is None:
        found.append(f"VERSION={version} is not a version: it must be three numbers such as 1.2.3")
    elif before and tuple(map(int, numbers.groups())) <= tuple(map(int, before.groups())):
        found.append(f"VERSION={version} is not above {held}, which {_VERSION} has")
    found += [f"{name} says {said}, and {_VERSION} says {held}" for name, said in _held(root).items() if said != held]
    if not section(changelog, "Unreleased"):
        found.append(f"{_CHANGELOG} has nothing under {_UNRELEASED}: write what a user will notice")
    if section(changelog, version):
        found.append(f"{_CHANGELOG} has a section for {version} already")
    if (branch := _git(root, "branch", "--show-current")) != BRANCH:
        found.append(f"the branch is {branch or 'none'}: switch to {BRANCH}")
    if changed := _git(root, "status", "--porcelain").splitlines():
        found.append(f"{len(changed)} files are not committed: commit them or put them away")
    if _git(root, "tag", "--list", f"v{version}"):
        found.append(f"the tag v{version} is there already")
    return found


def release(root: Path, version: str, day: dt.date) -> str:
    """Commit and tag `version`; what is to be done then. Raises NotReleased, and has changed nothing then."""
    if found := hindrances(root, version):
        raise NotReleased("\n".join(found))
    changelog = root / _CHANGELOG
    text = changelog.read_text()
    changelog.write_text(text.replace(_UNRELEASED, f"{_UNRELEASED}\n\n## [{version}] - {day.isoformat()}", 1))
    for name in (repeats := _held(root)):
        (root / name).write_text(_STANDS[name].sub(version, (root / name).read_text()))
    _git(root, "add", _CHANGELOG, *repeats)
    _git(root, "commit", "--quiet", "--message", f"Release {version}")
    said = f"{version}\n\n{notes(root, version)}"
    _git(root, "tag", "--annotate", "--cleanup=verbatim", "--message", said, f"v{version}")  # or git drops the headings
    return (
        f"{version} is committed and tagged, and nothing is pushed. This releases it:\n"
        f"    git push --atomic origin {BRANCH} v{version}\n"
        f"and this takes it back:\n"
        f"    git tag --delete v{version} && git reset --hard HEAD~1"
    )


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=root, check=True, stdout=subprocess.PIPE, text=True)  # noqa: S603, S607
    return done.stdout.strip()


def main(arguments: list[str], root: Path = ROOT) -> str:
    """What is printed. Raises NotReleased."""
    parser = argparse.ArgumentParser(prog="python -m scripts.release", description="Tags a version of the worker.")
    parser.add_argument("version", help="the version to release, 1.2.3 say")
    parser.add_argument("--notes", action="store_true", help="print what the changelog says of it, and change nothing")
    options = parser.parse_args(arguments)
    if options.notes:
        return notes(root, options.version)
    return release(root, options.version, dt.datetime.now(dt.UTC).date())


if __name__ == "__main__":
    try:
        print(main(sys.argv[1:]))
    except NotReleased as error:
        sys.exit(str(error))
