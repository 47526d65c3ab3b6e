"""The README says what the code does and what was measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from benchmarks.readme import README, RESULTS, TABLES, filled
from src import __version__
from src.catalog import FORMATS, MEMORY_MODES, SPEEDS
from src.errors import WorkerError
from src.settings import ROOT, Settings

OF_BACKENDS = {"HF_HOME", "CUDA_VISIBLE_DEVICES"}  # variables that they read by themselves
SET_BY_RUNPOD = {"runpod_endpoint_id", "runpod_realtime_port"}


def rows(header: str) -> Iterator[list[str]]:
    """The cells of the table below `header`, row by row."""
    lines = README.read_text().splitlines()
    for line in lines[lines.index(header) + 2 :]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split(" | ")]


def row_of(field: str) -> list[str]:
    """A field's row of the table of requests."""
    return next(row for row in rows("| field | what it may be | default |") if f"`{field}`" in row[0])


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_tables_are_those_of_the_results() -> None:
    text = README.read_text()
    assert all(f"<!-- benchmarks/results/{name}.json -->" in text for name in TABLES)
    assert filled(text) == text, "run python -m benchmarks.readme"


def test_every_setting_has_its_row_with_its_default_and_its_line_in_the_example() -> None:
    shown: dict[str, str] = {}
    for variables, default, _ in rows("| variable | default | what it does |"):
        shown |= dict.fromkeys(names(variables), default)
    fields = {name.upper(): field for name, field in Settings.model_fields.items() if name not in SET_BY_RUNPOD}
    assert set(shown) == set(fields) | OF_BACKENDS
    for name, field in fields.items():
        if field.default not in (None, "", (), False):
            assert str(field.default).removesuffix(".0").lower() in shown[name].lower(), name
    example = (ROOT / ".env.example").read_text()
    assert set(re.findall(r"^(\w+)=", example, re.MULTILINE)) <= set(shown)
    assert set(fields) - set(re.findall(r"^(\w+)=", example, re.MULTILINE)) == {"RUNPOD_MODEL_CACHE"}


def test_every_error_has_its_row_and_what_becomes_of_the_worker() -> None:
    shown = {names(code)[0]: after for code, _, after in rows("| `error_code` | what happened | the worker |")}
    assert set(shown) == {error.code for error in WorkerError.__subclasses__()}
    for error in WorkerError.__subclasses__():
        assert ("is replaced" in shown[error.code]) == error.refresh_worker


@pytest.mark.parametrize(("field", "table"), [("output_format", FORMATS), ("speed", SPEEDS)])
def test_a_field_that_takes_a_row_of_a_table_names_them_all(field: str, table: dict[str, object]) -> None:
    allowed = row_of(field)[1]
    assert all(re.search(rf"\b{name}\b", allowed) for name in table)


def test_every_way_to_save_memory_has_its_row() -> None:
    shown = [name for way, *_ in rows("| `MEMORY_MODE` | what it does | the picture |") for name in names(way)]
    assert set(shown) - {"QUANTIZATION"} == set(MEMORY_MODES)


def test_the_changelog_begins_with_this_version() -> None:
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^## \[(.+?)\]", changes, re.MULTILINE)[:2] in (["Unreleased", __version__], [__version__])


def test_the_cards_say_what_was_measured() -> None:
    figures = json.loads((RESULTS / "accuracy.json").read_text())
    shapes, outline = (
        (ROOT / "models" / name / "README.md").read_text() for name in ("flux-shapes", "flux-shapes-outline")
    )
    pairs = figures["pairs"]
    shares = [figures[name] for name in ("centre", "background", "shape")]
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
