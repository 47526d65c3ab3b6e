"""README and docs/ say what the code does and what was measured, and lead where they say."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.readme import RESULTS, TABLES
from deploy.endpoint import OTHER_VARIABLES
from scripts.docs import BLOCKS, filled
from scripts.examples import EXAMPLES, FOLDER, draw, drawn_modes, with_pictures
from src import __version__
from src.catalog import FAMILIES, FORMATS, MEMORY_MODES, MODELS, SPEEDS, get_model
from src.engine import load_engine
from src.errors import WorkerError
from src.job import Job
from src.request.schema import Request
from src.settings import ROOT, SET_BY_RUNPOD, Settings
from tests.small_models import small

SCREENSHOTS = {
    "page-light.png",
    "page-dark.png",
    "page-phone.png",
    "batch.png",
    "openai.png",
}  # by scripts/screenshots.py
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("models/*/*.md")])


def rows(page: str, header: str) -> Iterator[list[str]]:
    """The cells of each table below `header`, row by row."""
    lines = (ROOT / page).read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line == header]
    assert starts, header
    for start in starts:
        for line in lines[start + 2 :]:
            if not line.startswith("|"):
                break
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


FIELDS = ("docs/api.md", "| field | what it may be | default | taken by |")
SETTINGS = ("docs/settings.md", "| variable | default | what it is | what it may be |")
CODES = ("docs/troubleshooting.md", "| `error_code` | what happened | what to do | the worker |")
LINES = ("docs/troubleshooting.md", "| the line | why | what to do |")


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("page", BLOCKS)
def test_a_page_repeats_the_code_and_the_results_as_they_are(page: str) -> None:
    text = (ROOT / page).read_text()
    assert filled(page, text) == text, "run make docs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_mark_is_one_that_is_filled(page: Path) -> None:
    marks = re.findall(r"^<!-- (.+) -->$", page.read_text(), re.MULTILINE)
    begun = marks[::2]
    assert begun == [mark for mark in marks if mark != "end"]
    assert marks[1::2] == ["end"] * len(begun)
    assert set(begun) == set(BLOCKS.get(str(page.relative_to(ROOT)), {}))


def test_every_table_of_results_is_on_a_page() -> None:
    marks = {mark for blocks in BLOCKS.values() for mark in blocks}
    assert {f"benchmarks/results/{name}.json" for name in TABLES} <= marks


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 200
    assert [page.name for page in ROOT.glob("docs/*.md") if f"(docs/{page.name})" not in text] == []


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_within_the_project_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_command_that_the_pages_name_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"`make ([a-z-]+)", text):
            assert f"\n{target}:" in makefile, (page.name, target)
        for module in re.findall(r"`python -m ((?:src|benchmarks|scripts|training|fuzz|deploy)(?:\.\w+)*)[ `]", text):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), (page.name, module)


# The tables of the code


def test_every_setting_has_its_row_with_its_default_and_its_line_in_the_example() -> None:
    shown = {names(variable)[0]: default for variable, default, *_ in rows(*SETTINGS)}
    fields = {name.upper(): field for name, field in Settings.model_fields.items() if name not in SET_BY_RUNPOD}
    assert set(shown) == set(fields)
    for name, field in fields.items():
        assert field.description, name
        if field.default not in (None, "", (), False):
            default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else str(field.default)
            assert default.removesuffix(".0").lower() in shown[name].lower(), name
    others = {name for row in rows("docs/settings.md", "| variable | default | what it is |") for name in names(row[0])}
    assert others == set(OTHER_VARIABLES)
    example = re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert set(example) <= set(shown) | set(OTHER_VARIABLES)
    assert set(fields) - set(example) == {"RUNPOD_MODEL_CACHE"}


@pytest.mark.parametrize(("field", "table"), [("output_format", FORMATS), ("speed", SPEEDS)])
def test_a_field_that_takes_a_row_of_a_table_names_them_all(field: str, table: dict[str, object]) -> None:
    (allowed,) = [row[1] for row in rows(*FIELDS) if row[0] == f"`{field}`"]
    assert all(re.search(rf"\b{name}\b", allowed) for name in table)


def test_every_way_to_save_memory_has_its_row() -> None:
    header = "| `MEMORY_MODE` | what it does | the picture |"
    shown = [name for way, *_ in rows("docs/performance.md", header) for name in names(way)]
    assert set(shown) - {"QUANTIZATION"} == set(MEMORY_MODES)


def section(page: str, heading: str) -> str:
    return (ROOT / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_what_an_answer_and_a_description_say_of_the_worker_stands_on_the_page() -> None:
    from handler import respond

    engine = load_engine(Settings(model_name="flux-shapes"))
    response = respond({"input": {"prompt": "a red star", "seed": 1}}, Job(), Settings, lambda: engine)
    assert set(response["metadata"]) - set(Request.model_fields) <= set(names(section("docs/api.md", "The answer")))
    of_itself = set(names(section("docs/api.md", "What the worker tells of itself")))
    assert {*engine.loaded().acceleration, "devices"} <= of_itself


# Troubles


def test_every_error_has_its_row_and_what_becomes_of_the_worker() -> None:
    shown = {names(code)[0]: after for code, _, _, after in rows(*CODES)}
    assert set(shown) == {error.code for error in WorkerError.__subclasses__()}
    for error in WorkerError.__subclasses__():
        assert ("is replaced" in shown[error.code]) == error.refresh_worker


# What ends a start, and where that is raised before the worker takes jobs.
ENDS_A_START = {"InvalidSettings", "ModelUnavailable", "DeviceFailed", "DoesNotFit", "Refused"}
START = (
    "src/settings.py", "src/serving/*.py", "src/weights/*.py", "src/response/storage.py", "src/response/endpoints.py",
    *(
        f"src/engine/{name}.py"
        for name in (
            "acceleration", "components", "controlnets", "loading", "machine", "quantization", "redux", "upsampling"
        )
    ),
)  # fmt: skip
WORD_OTHERS = {"explain", "_too_little"}  # functions that word what was raised elsewhere
OF_NO_START = {"runpod_api_key", "web_token", "_key"}  # but of `python -m deploy` and web.py
LEAST_WORDING = 12  # characters of a message's longest part: with less it is a frame around another message


def written(node: ast.AST) -> str | None:
    """A string as the code has it, with … for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def said_at_the_start() -> set[str]:
    """Every message that may end a start."""
    found = set[str]()
    for file in {path for pattern in START for path in ROOT.glob(pattern)}:
        tree = ast.parse(file.read_text())
        others = [f for f in tree.body if isinstance(f, ast.FunctionDef) and f.name in OF_NO_START]
        for node in set(ast.walk(tree)) - {inner for function in others for inner in ast.walk(function)}:
            said: list[ast.AST | None] = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ENDS_A_START:
                said = [*node.args[:1]]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "WorkerFault":
                said = [*node.args[1:2]]
            elif isinstance(node, ast.FunctionDef) and node.name in WORD_OTHERS:
                said = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return)]
            found |= {text for part in said if part is not None and (text := written(part))}
    return {text for text in found if max(map(len, text.split("…"))) >= LEAST_WORDING}


def test_every_line_that_ends_a_start_has_its_row() -> None:
    shown = [names(line)[0] for line, *_ in rows(*LINES)]
    said = said_at_the_start()
    assert len(said) > 40
    assert [text for text in sorted(said) if not any(line in text for line in shown)] == []


def test_every_line_that_it_shows_is_one_of_the_codes() -> None:
    said = {
        text
        for file in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if (text := written(node))
    }
    assert [line for line in (names(row[0])[0] for row in rows(*LINES)) if not any(line in text for text in said)] == []


# The examples


def test_every_mode_has_an_example() -> None:
    modes = {mode: None for model in MODELS for mode in model.modes}
    assert set(EXAMPLES) == set(modes)
    assert all(mode in get_model(example.model).modes for mode, example in EXAMPLES.items())
    assert set(drawn_modes()) == set(get_model("flux-shapes").modes), "it draws those that it has"
    kept = {file.name: file.stat().st_size for file in FOLDER.iterdir()}
    assert {"mask.png", *(f"{mode}.png" for mode in drawn_modes())} == set(kept) - SCREENSHOTS
    assert sum(size for name, size in kept.items() if name not in SCREENSHOTS) < 100_000
    assert all(kept.get(name, 0) < 200_000 for name in SCREENSHOTS)


def test_the_pictures_are_what_the_shipped_model_draws(tmp_path: Path) -> None:
    from handler import handler

    draw(handler, tmp_path)
    for file in (file for file in FOLDER.iterdir() if file.name not in SCREENSHOTS):
        kept, drawn = (np.asarray(Image.open(path).convert("RGB"), float) for path in (file, tmp_path / file.name))
        assert np.abs(kept - drawn).mean() < 3, f"{file.name}: run make pictures"


@pytest.mark.parametrize("family", ["kontext", "control"])
def test_an_example_that_the_shipped_model_cannot_draw_is_one_that_its_family_can(family: str, tmp_path: Path) -> None:
    from handler import respond

    engine = load_engine(Settings(model_name=str(small(family, tmp_path / FAMILIES[family].model))))
    for mode, example in EXAMPLES.items():
        if get_model(example.model).family == family:
            asked: dict[str, Any] = {**with_pictures(example), "num_inference_steps": 1, "max_sequence_length": 16}
            response = respond({"input": asked}, Job(), Settings, lambda: engine)
            assert response["status"] == "success", response
            assert response["metadata"]["mode"] == mode


def test_the_changelog_begins_with_this_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[(.+?)\]", changes, re.MULTILINE)[:2] in (["Unreleased", __version__], [__version__])


def test_the_cards_say_what_was_measured() -> None:
    figures = json.loads((RESULTS / "accuracy.json").read_text())
    shapes, outline = (
        (ROOT / "models" / name / "README.md").read_text() for name in ("flux-shapes", "flux-shapes-outline")
    )
    pairs = figures["pairs"]
    shares = [part[name] for part in (figures, figures["wordings"]) for name in ("centre", "background", "shape")]
    shares += [pairs[name] for name in ("background", "colour", "shape", "both_right")]
    assert [float(line.split("|")[2].strip(" %")) for line in shapes.splitlines() if line.endswith("% |")] == [
        round(100 * share, 1) for share in shares
    ]
    assert f"{100 * figures['outline']['hollow_at_1']:.1f}% of the pictures" in outline
    assert f"{100 * figures['outline']['hollow_at_0']:.1f}% at" in outline
    canny, edges = (ROOT / "models" / "flux-shapes-canny" / "README.md").read_text(), figures["edges"]
    assert f"share {edges['iou_at_1']:.2f} of" in canny
    assert f"mean); {edges['iou_at_0']:.2f} at scale" in canny
    assert f"In {100 * edges['at_least_0.7']:.0f}% of the pictures" in canny
