"""The README says what was measured."""

from __future__ import annotations

import json

from benchmarks.readme import README, RESULTS, TABLES, filled
from src.settings import ROOT


def test_the_tables_are_those_of_the_results() -> None:
    text = README.read_text()
    assert all(f"<!-- benchmarks/results/{name}.json -->" in text for name in TABLES)
    assert filled(text) == text, "run python -m benchmarks.readme"


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
