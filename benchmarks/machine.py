"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch


def machine() -> dict[str, str | int]:
    """Cores, memory, card and the versions that matter."""
    return {
        "cores": os.cpu_count() or 0,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "diffusers", "runpod")},
    }


def version_of(package: str) -> str:
    """Of what is installed; "none" of what is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
