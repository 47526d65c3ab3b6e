"""What a figure was measured on."""

from __future__ import annotations

import platform
from importlib.metadata import version

import psutil
import torch


def machine() -> dict[str, str | int]:
    """Cores, memory, card and the versions that matter."""
    return {
        "cores": psutil.cpu_count() or 0,
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "runpod")},
    }
