"""The memory of the machine that this process may really use: a container's limit is below its host's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

# A container's limit, what it uses of it, and what of that are files that the kernel drops when it wants the room, in
# bytes: cgroups of version 2 and 1 (https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files).
_LIMITS = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)


@dataclass(frozen=True)
class HostMemory:
    """Bytes; `total` with swap, where there is no container."""

    total: int
    free: int


def host_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> HostMemory:
    """What there is and what is free, within the container's limit where there is one."""
    machine = psutil.virtual_memory()
    total, free = machine.total + psutil.swap_memory().total, machine.available
    for limit_file, used_file, stat_file, cached in _LIMITS:
        try:
            limit, used = int((cgroups / limit_file).read_text()), int((cgroups / used_file).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
        droppable = sum(_stat(cgroups / stat_file).get(name, 0) for name in cached)
        total, free = min(total, limit), min(free, max(limit - max(used - droppable, 0), 0))
    return HostMemory(total, free)


def _stat(file: Path) -> dict[str, int]:
    """A line each, "name bytes"; nothing where it cannot be read."""
    try:
        return {name: int(value) for name, value in (line.split() for line in file.read_text().splitlines())}
    except (OSError, ValueError):
        return {}
