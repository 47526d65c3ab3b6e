"""How the project is built: its words, its names, what its image is made of."""

from __future__ import annotations

import ast
import fnmatch
import io
import re
import shlex
import tokenize
from collections import Counter
from pathlib import Path

from src.settings import ROOT

PARTS = ("src", "client", "deploy", "tests", "benchmarks", "training", "fuzz")
CODE = [
    ROOT / "handler.py",
    ROOT / "local_test.py",
    ROOT / "web.py",
    *(file for part in PARTS for file in (ROOT / part).rglob("*.py")),
]
# Words of our own for what the field has words for, and those.
RETIRED = {
    "told": "summary", "heard": "adapter_weights", "hears": "reads", "hearing": "ControlDefaults", "beside": "outside",
    "parked": "offloaded", "park": "offload", "readers": "text_encoders", "placed": "placed_pipeline",
}  # fmt: skip
PHRASES = {"placed_pipeline", "_placed_pipeline", "PlacedPipeline"}
CLASSES = {"Device": "JobQueue", "Place": "Ticket"}


def test_no_name_is_one_of_the_retired_words() -> None:
    found = []
    for file in CODE:
        for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
            if token.type == tokenize.NAME and token.string not in PHRASES:
                words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", token.string).lower().split("_")
                if RETIRED.keys() & set(words) or token.string in CLASSES:
                    found.append(f"{file.name}:{token.start[0]} {token.string}")
    assert found == []


def test_no_two_classes_of_the_worker_have_one_name() -> None:
    classes = Counter(
        node.name
        for file in CODE
        if "src" in file.relative_to(ROOT).parts
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in classes.items() if count > 1] == []


def test_the_map_names_every_file_of_the_worker_and_of_the_benchmarks() -> None:
    text = (ROOT / "CLAUDE.md").read_text()
    commands = set(re.findall(r"python -m benchmarks\.(\w+)", text))
    files = [file.relative_to(ROOT) for part in ("src", "benchmarks") for file in (ROOT / part).rglob("*.py")]
    unnamed = [
        str(file)
        for file in files
        if f"{file.name}`" not in text
        and f"`{file.parent.name}/`" not in text  # a folder that is one idea
        and not (file.parts[0] == "benchmarks" and file.stem.removesuffix("_worker") in commands)
        and file.name != "__init__.py"
    ]
    assert unnamed == []


def sources(dockerfile: str) -> list[str]:
    """What COPY takes from the folder that the image is built in."""
    commands = re.sub(r"\\\n", " ", dockerfile)
    copies = [shlex.split(line)[1:] for line in commands.splitlines() if re.match(r"(COPY|ADD) ", line)]
    local = [words for words in copies if not any(word.startswith("--from=") for word in words)]
    return [word for words in local for word in words[:-1] if not word.startswith("--")]


def reaches_the_build(path: Path) -> bool:
    """Whether .dockerignore lets `path` through: of its patterns that fit, the last counts (Docker's rule)."""
    sent = True
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        wanted = pattern.strip().removeprefix("!").strip("/")
        if wanted and not pattern.startswith("#"):
            parts = [path.relative_to(ROOT), *path.relative_to(ROOT).parents][:-1]
            names = [str(part) for part in parts]
            if any(fnmatch.fnmatch(name, wanted.removeprefix("**/")) for name in names):
                sent = pattern.startswith("!")
    return sent


def test_what_the_image_copies_is_there_and_reaches_the_build() -> None:
    copied = sources((ROOT / "Dockerfile").read_text())
    assert {"locked/runtime.txt", "locked/quantization.txt", "src", "handler.py"} <= set(copied)
    for name in copied:
        assert list(ROOT.glob(name)), name
        for file in ROOT.glob(name):
            assert reaches_the_build(file), f"{name}: .dockerignore does not let it through"
    assert not reaches_the_build(ROOT / "tests")
    assert not reaches_the_build(ROOT / "scripts" / "image.sh")
    assert not reaches_the_build(ROOT / ".env")
