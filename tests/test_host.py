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


@pytest.mark.parametrize(
    ("folder", "limit", "used", "prefix"),
    [
        ("", "memory.max", "memory.current", ""),
        ("memory", "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_"),
    ],
)
def test_files_in_the_cache_are_free(tmp_path: Path, folder: str, limit: str, used: str, prefix: str) -> None:
    """After a download or a read-ahead: the kernel counts them, and drops them when it wants the room."""
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text("1000000\n")
    (tmp_path / used).write_text("900000\n")
    stat = tmp_path / folder / "memory.stat"
    stat.write_text(f"anon 200000\n{prefix}inactive_file 400000\n{prefix}active_file 300000\nunevictable 0\n")
    assert host_memory(tmp_path).free == 800_000
    stat.write_text(f"{prefix}inactive_file 5000000\n")
    assert host_memory(tmp_path).free == 1_000_000, "never more than the limit"
    stat.write_text("garbage\n")
    assert host_memory(tmp_path).free == 100_000
