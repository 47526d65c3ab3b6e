"""The file of benchmarks/gpu.py: a row for each way of each model, written after every row. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_ways import WAYS

_SAME = ("card", "torch", "diffusers")  # what figures of one file have in common
Row = dict[str, Any]


class OtherMachine(Exception):
    """Says whose figures a file holds, and what to do."""


class Results:
    """The rows of `file`, those of earlier runs among them; what a way gave last counts.

    A row holds "seconds" and all that was measured, or "error", or "left_out" with why.

    Raises OtherMachine where the file holds a card's figures and this is another, or has another torch or diffusers.
    Figures without a card give way to any.
    """

    def __init__(self, file: Path, machine: Mapping[str, Any], *, full_size: bool) -> None:
        self.file = file
        self.found: dict[str, Any] = {"machine": dict(machine), "full_size": full_size, "models": {}}
        if not file.is_file():
            return
        before = json.loads(file.read_text())
        there, here = ({name: of.get(name) for name in _SAME} for of in (before["machine"], machine))
        if before["full_size"] and there != here:
            raise OtherMachine(
                f"--output: {file} holds figures of {_words(there)}, and this is {_words(here)}: name another file, "
                "or move that one away"
            )
        if before["full_size"] == full_size and there == here:
            self.found["models"] = before["models"]

    def rows(self, model: str) -> list[Row]:
        """All of `model`, in the order of WAYS."""
        rows: list[Row] = self.found["models"].get(model, {}).get("ways", [])
        return rows

    def row(self, model: str, way: str) -> Row | None:
        """What `way` gave the last time that it was tried."""
        return next((row for row in self.rows(model) if row["way"] == way), None)

    def describe(self, model: str, facts: Mapping[str, Any]) -> None:
        """What holds for all of a model's rows."""
        self.found["models"][model] = {**facts, "ways": self.rows(model)}

    def keep(self, model: str, row: Row) -> None:
        """Take `row` in the place of the way's last one, and write the file, whole or not at all.

        What was left out takes no measured row's place.
        """
        before = self.row(model, row["way"])
        if "left_out" not in row or before is None or "seconds" not in before:
            order = {way.name: place for place, way in enumerate(WAYS)}
            rows = [other for other in self.rows(model) if other["way"] != row["way"]] + [row]
            rows.sort(key=lambda each: order.get(each["way"], len(order)))
            self.found["models"].setdefault(model, {})["ways"] = rows
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(self.found, indent=2) + "\n")
        unfinished.replace(self.file)


def _words(machine: Mapping[str, Any]) -> str:
    card = "no card" if machine["card"] == "none" else machine["card"]
    return f"{card} with torch {machine['torch']} and diffusers {machine['diffusers']}"


def words(error: BaseException) -> str:
    """One line of at most 300 letters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
