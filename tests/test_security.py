"""SECURITY.md names what there is."""

from __future__ import annotations

import re

from src.settings import ROOT, Settings

TEXT = (ROOT / "SECURITY.md").read_text()
# What is not yet as it says: a row of "(TODO: check)" may name what is not there.
LINES = [line for line in TEXT.splitlines() if "(TODO: check)" not in line]
OF_OTHERS = {"HOME", "RUNPOD_API_KEY", "WEB_TOKEN"}  # variables that are not settings of the worker


def test_every_setting_that_it_names_is_one() -> None:
    named = {name for line in LINES for name in re.findall(r"`([A-Z][A-Z_]{3,})(?:=[^`]*)?`", line)}
    assert len(named) > 15
    assert named <= {name.upper() for name in Settings.model_fields} | OF_OTHERS


def test_every_file_and_target_that_it_names_is_there() -> None:
    files = {name for line in LINES for name in re.findall(r"`?((?:tests|benchmarks|locked)/[\w.]*)`", line)}
    files |= set(re.findall(r"\]\(([^)\s]+)\)", TEXT))
    assert len([name for name in files if name.startswith("tests/")]) > 10
    assert [name for name in files if not (ROOT / name).exists()] == []
    targets = re.findall(r"`make (\w+)`", TEXT)
    assert targets
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text() for target in targets)
    modules = re.findall(r"`python -m ([\w.]+)`", TEXT)
    assert all((ROOT / f"{module.replace('.', '/')}.py").exists() for module in modules)


def test_each_surface_says_what_bounds_it_and_which_test_holds_that() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ")]
    header = "| surface | who sends it | what bounds it | setting | tests |"
    surfaces = [re.split(r"\s*\|\s*", row)[1:-1] for row in rows[rows.index(header) + 2 :]]
    assert len(surfaces) >= 18
    for name, who, bound, _, tests in surfaces:
        assert who, name
        assert bound, name
        assert re.search(r"`tests/test_\w+\.py`", tests), name


def test_the_readme_leads_there() -> None:
    assert "(SECURITY.md)" in (ROOT / "README.md").read_text()
