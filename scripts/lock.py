"""`make lock`: what requirements*.txt want, and all that this needs, into locked/*.txt: every package with its hashes.

One resolution for all of them, on every platform and from Python 3.11 on. Pins that are there stay unless they do not
fit any more; `make lock UPGRADE=--upgrade` takes the newest.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKED = ROOT / "locked"
PYTHON = "3.11"
# A file of locked/: what it is made from, and the files that it is installed with and leaves out.
IMAGE = ("torch", "cuda", "runtime")
FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "runtime": ("requirements.txt", ()),
    "quantization": ("requirements-quantization.txt", IMAGE),
    "development": ("requirements-dev.txt", (*IMAGE, "quantization")),
    "fuzz": ("requirements-fuzz.txt", ()),
    "client": ("requirements-client.txt", ()),
    "build": ("requirements-build.txt", ()),
    "supply": ("requirements-supply.txt", ()),
}


def compiled(*sources: Path, constraints: Sequence[Path] = (), output: Path, more: Sequence[str] = ()) -> list[str]:
    """One block for each package: its pin, its hashes, and in comments what needs it."""
    options = ["--universal", "--python-version", PYTHON, "--generate-hashes", "--no-emit-index-url", "--no-build"]
    options += ["--no-header", "--quiet", "--output-file", str(output), *more]
    options += [word for file in constraints for word in ("--constraint", str(file))]
    command = [sys.executable, "-m", "uv", "pip", "compile", *options, *map(str, sources)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)  # noqa: S603 - uv, of this environment
    return re.split(r"\n(?=[A-Za-z0-9])", output.read_text().rstrip("\n"))


def split_cuda(blocks: Sequence[str]) -> tuple[list[str], list[str]]:
    """CUDA's libraries, which only torch wants and only on Linux, where its build is one for CUDA; and the others."""
    cuda: dict[str, str] = {}
    while True:
        found = {
            name: block
            for block in blocks
            if (name := block.partition("==")[0]) not in cuda
            and "sys_platform == 'linux'" in block.partition("\n")[0]
            and _wanted_by(block) <= {"torch", *cuda}
        }
        if not found:
            return sorted(cuda.values()), [block for block in blocks if block not in cuda.values()]
        cuda |= found


def _wanted_by(block: str) -> set[str]:
    comments = re.findall(r"^ +# +(?:via)?(.*)$", block, re.MULTILINE)
    return {comment.strip() for comment in comments} - {""}


def main() -> None:
    """Write all of locked/."""
    written: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        everything, part = Path(folder) / "everything", Path(folder) / "part"
        everything.write_text("".join(file.read_text() for file in sorted(LOCKED.glob("*.txt"))))  # uv keeps those pins
        compiled(*(ROOT / source for source, _ in FILES.values()), output=everything, more=sys.argv[1:])
        for name, (source, apart) in FILES.items():
            part.unlink(missing_ok=True)
            blocks = compiled(ROOT / source, constraints=[everything], output=part)
            pins = {block.partition("\n")[0] for other in apart for block in written[other]}
            blocks = [
                re.sub(r"\n    #   -c \S+", "", block) for block in blocks if block.partition("\n")[0] not in pins
            ]
            if name == "runtime":
                written["cuda"], blocks = split_cuda(blocks)
                written["torch"] = [block for block in blocks if block.startswith("torch==")]
                blocks = [block for block in blocks if block not in written["torch"]]
            written[name] = blocks
    LOCKED.mkdir(exist_ok=True)
    for name, blocks in written.items():
        source, _ = FILES.get(name, FILES["runtime"])
        text = "\n".join([f"# Made by `make lock` from {source}.", *blocks]) + "\n"
        (LOCKED / f"{name}.txt").write_text(text)
        print(f"locked/{name}.txt: {len(blocks)} packages")


if __name__ == "__main__":
    main()
