"""The memory that a container leaves us."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from src.weights.host import host_memory


def test_without_a_container_it_is_the_machines(tmp_path: Path) -> None:
    found = host_memory(tmp_path)
    assert found.total == psutil.virtual_memory().total + psutil.swap_memory().total
    assert 0 < found.free <= found.total
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("5\n")
    assert host_memory(tmp_path).total == found.total


@pytest.mark.parametrize(
    ("limit", "used"),
    [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, limit: str, used: str) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text("1000000\n")
    (tmp_path / used).write_text("400000\n")
    found = host_memory(tmp_path)
    assert (found.total, found.free) == (1_000_000, 600_000)
