"""`make licences`: LICENCES.md, the packages that a worker runs with and their licences, as they say themselves.

Asks pip, since CUDA's libraries and other platforms' packages are not installed everywhere.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
IMAGE = ("torch", "cuda", "runtime", "quantization")  # of locked/
# What metadata leaves open, as the files of the package say it.
KNOWN: Mapping[str, str] = {
    "cuda-toolkit": "none stated: it names NVIDIA's other packages and holds no code",
    "python-dateutil": "Apache-2.0 OR BSD-3-Clause",
    "torchao": "BSD-3-Clause",
}


def locked(*names: str) -> dict[str, str]:
    """Each package of the files `names` of locked/, and its version; the first where it depends on the Python."""
    pins = re.findall(r"^([\w.-]+)==([^\s;\\]+)", "\n".join(text_of(name) for name in names), re.MULTILINE)
    return dict(reversed(pins))


def text_of(name: str) -> str:
    """A file of locked/."""
    return (ROOT / "locked" / f"{name}.txt").read_text()


def licence(name: str, metadata: Mapping[str, Any]) -> str:
    """The licence that a package's metadata names."""
    said = str(metadata.get("license_expression") or metadata.get("license") or "")
    if name in KNOWN:
        return KNOWN[name]
    if said and "\n" not in said and len(said) <= 100:
        return said
    classifiers = [line for line in metadata.get("classifier", ()) if line.startswith("License")]
    if not classifiers:
        raise LookupError(f"{name} says nothing of its licence: read it and add a row to KNOWN")
    return ", ".join(line.rpartition(" :: ")[2] for line in classifiers)


def plain(name: str) -> str:
    """A package's name as files of locked/ write it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Write LICENCES.md."""
    pins = locked(*IMAGE)
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--ignore-requires-python"]
    command += ["--no-deps", "--quiet", "--report", "-", *(f"{name}=={version}" for name, version in pins.items())]
    report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)  # noqa: S603 - pip, of this environment
    found = {plain(package["metadata"]["name"]): package["metadata"] for package in report["install"]}
    lines = [
        "# Licences",
        "",
        "What a worker runs with, and under which licence, as each package says itself. Made by `make licences`; the",
        "weights of models have licences of their own.",
        "",
        "| package | version | licence |",
        "| --- | --- | --- |",
        *(f"| {name} | {pins[name]} | {licence(name, found[name])} |" for name in sorted(pins)),
    ]
    (ROOT / "LICENCES.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
