"""RunPod's loop around `handler(event)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import runpod

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def serve(handler: Handler) -> None:
    """Take jobs until the process is told to stop; RunPod's own arguments (--rp_serve_api, --test_input) work."""
    runpod.serverless.start({"handler": handler})
