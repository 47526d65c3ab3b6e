"""The soak: what it sends, and what it finds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks import soak
from benchmarks.digests import requests
from benchmarks.readme import soak as table
from benchmarks.soak import ENDLESS, FIRST, PLAIN, WAVE, Kind, Soak, mix, plot
from tests.runpod_stand_in import JobRecord, StandIn, worker


def test_it_sends_everything_and_every_fiftieth_job_is_the_plain_one() -> None:
    jobs = mix(2_000)
    assert len(jobs) == 2_000
    assert [i for i, kind in enumerate(jobs) if kind.name == PLAIN] == list(range(0, 2_000, WAVE))
    counts = Counter(kind.name for kind in jobs)
    assert set(requests()) <= set(counts)
    assert min(counts.values()) >= 5
    ends = Counter(kind.ends for kind in jobs)
    assert ends["success"] > 1_300
    assert ends["invalid_request"] > 300
    assert ends["cancelled"] > 60
    assert jobs == mix(2_000)


def job(status: str, *results: dict[str, Any]) -> JobRecord:
    return JobRecord("id", {}, status, results=[(0.0, result) for result in results])


@pytest.mark.parametrize(
    ("record", "ends"),
    [
        (job("COMPLETED", {"output": {}}), "success"),
        (job("FAILED", {"error": "invalid_request: width: must be ..."}), "invalid_request"),
        (job("COMPLETED", {"output": {}}, {"output": {}}), "2 answers"),
        (job("CANCELLED"), "cancelled"),
        (job("CANCELLED", {"output": {}}), "cancelled"),
        (job("CANCELLED", {"error": ""}, {"error": ""}), "2 answers"),
    ],
)
def test_how_a_job_ended(record: JobRecord, ends: str) -> None:
    assert soak._ended(record) == ends


def wave(jobs: int, megabytes: float = 700, handles: int = 30, threads: int = 8) -> dict[str, Any]:
    held = {"megabytes": megabytes, "megabytes_before_trim": megabytes, "handles": handles, "threads": threads}
    return {"jobs": jobs, **held, "median_seconds": 1.0, "p95_seconds": 2.0, "most_seconds": 3.0}


def seen(*waves: dict[str, Any]) -> Soak:
    found = Soak(cast(Any, None), cast(Any, None), Path())
    found.waves = list(waves)
    found.ends = {"a": Counter({"success": 3}), "b": Counter({"invalid_request": 1})}
    found.files = {"a": {"1"}}
    return found


EXPECTED = {"a": "success", "b": "invalid_request"}


def failed(found: Soak, status: int = 0) -> list[str]:
    return [name.split()[0] for name, what in soak._checks(found, EXPECTED, status).items() if what]


def test_what_must_not_be_is_found() -> None:
    first = wave(FIRST)
    assert failed(seen(wave(50, 600, 20, 4), first, wave(2_000, 720))) == []
    assert failed(seen(first, wave(2_000, 722))) == ["megabytes"]
    assert failed(seen(first, wave(2_000, 600, 31, 9))) == ["handles", "threads"]
    assert failed(seen(wave(FIRST, 999, 99, 99))) == [], "too few jobs to say"
    assert failed(seen(first), status=1) == ["SIGTERM"]
    other, twice = seen(first), seen(first)
    other.files["a"].add("2")
    twice.ends["b"]["2 answers"] = 1
    assert failed(other) == ["the"]
    assert failed(twice) == ["each"]


def test_the_table_says_what_held_and_what_did_not() -> None:
    results = {"machine": {"cores": 2}, "jobs": 2_000, "seconds": 600, "ends": {"a": {}}}
    waves = [wave(50 * i) for i in range(1, 41)]
    text = table({**results, "waves": waves, "checks": {"one": "", "other": "why"}})
    assert "| 2,000 | 700 MB | 30 | 8 | 1.00 s | 2.00 s |" in text
    assert "Held: one." in text
    assert "Failed: other." in text
    assert len(plot(waves).axes) == 3


@pytest.mark.slow
def test_a_wave_on_a_real_worker(tmp_path: Path) -> None:
    bad, honest = soak._bad()[:5], soak._honest()[:5]
    kinds = [Kind(PLAIN, {"prompt": "a red circle", "seed": 1}), *honest, *bad, ENDLESS]
    stand_in, measured = StandIn(poll_seconds=0.5), tmp_path / "held"
    with worker(stand_in, tmp_path / "log", "-m", "benchmarks.soak_worker", str(measured)) as process:
        found = Soak(stand_in, process, measured)
        found.run(kinds)
        found.run(kinds)
        status = process.terminate()
    stand_in.close()
    assert {
        name for name, what in soak._checks(found, {k.name: k.ends for k in kinds}, status).items() if what
    } == set()
    assert [wave["jobs"] for wave in found.waves] == [12, 24]
    assert all(wave["handles"] > 5 and wave["threads"] > 1 and wave["megabytes"] > 100 for wave in found.waves)
