"""The memory of the machine that this process may really use: a container's limit is below its host's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

# A container's limit and what it uses of it, in bytes: cgroups of version 2 and 1.
_LIMITS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
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
    for limit_file, used_file in _LIMITS:
        try:
            limit, used = int((cgroups / limit_file).read_text()), int((cgroups / used_file).read_text())
        except (OSError, ValueError):  # not there, or "max"
            continue
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return HostMemory(total, free)
