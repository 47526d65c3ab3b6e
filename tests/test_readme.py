"""The README says what was measured."""

from __future__ import annotations

from benchmarks.readme import README, TABLES, filled


def test_the_tables_are_those_of_the_results() -> None:
    text = README.read_text()
    assert all(f"<!-- benchmarks/results/{name}.json -->" in text for name in TABLES)
    assert filled(text) == text, "run python -m benchmarks.readme"
