"""What benchmarks/cold_start.py compares, at a small size."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cold_start import make_model, measure, plot
from benchmarks.cold_start_worker import AFTER, AHEAD, FAULT, STREAMED, WAYS, Volume
from benchmarks.readme import cold_start
from src.engine.staging import CHUNK, THREADS


class Counted(Volume):
    """Does not sleep."""

    def __init__(self) -> None:
        super().__init__(0, 1e12)
        self.requests = 0

    def answer(self, size: int) -> None:
        self.requests += 1
        super().answer(size)


def test_page_faults_ask_for_little_at_a_time_and_whole_files_are_few_requests(tmp_path: Path) -> None:
    size = make_model(tmp_path, 16 << 20)
    asked = {}
    for way, read in AFTER.items():
        volume = Counted()
        read(volume, tmp_path)
        asked[way] = volume.requests
        assert volume.most_held == size
    faults, *others = asked.values()
    assert others == [8, 8], "a file each"
    assert size / FAULT <= faults <= size / FAULT + 8


@pytest.mark.slow
def test_every_way_starts_and_has_its_row() -> None:
    results = measure(4, rounds=1, latency=0.01, rate=1e9)
    assert tuple(results["ways"]) == WAYS
    for found in results["ways"].values():
        assert 0 < found["wait_seconds"] < found["seconds"]
    assert results["ways"][STREAMED]["most_in_cache"] <= THREADS * CHUNK
    assert plot(results).axes
    assert f"| {AHEAD} |" in cold_start(results)
