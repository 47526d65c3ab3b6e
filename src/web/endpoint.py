"""What stands behind the routes: RunPod's verbs for one endpoint, wherever its jobs are done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, Self

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")  # RunPod's states of a job that is over


class UnknownJob(Exception):
    """There is no job of this id, or its result is not kept any more."""


class NotAnswered(Exception):
    """Why there is no answer of the endpoint's: `status` of HTTP, and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RunPodEndpoint(Protocol):
    """RunPod's verbs; bodies are as its API answers them."""

    name: str  # in the routes
    poll_seconds: float  # between two looks at a job that somebody waits for

    async def run(self, event: Mapping[str, Any], size: int, /) -> str:
        """Take a job, of `size` bytes as it came; its id. Raises NotAnswered."""

    async def status(self, id: str) -> bytes:
        """JSON of `{"id", "status"}` and, by the status, `output` or `error`. Raises UnknownJob."""

    async def wait(self, id: str, seconds: float) -> bytes:
        """As `status`, once the job is over or `seconds` are. Raises UnknownJob."""

    async def cancel(self, id: str) -> bytes:
        """Stop the job; its status then. Raises UnknownJob."""

    async def health(self) -> dict[str, Any]:
        """`{"jobs": {...}, "workers": {...}}`, counted by their states."""

    def close(self) -> None:
        """Take no more jobs; called in the event loop, while others may still wait."""

    async def __aenter__(self) -> Self:
        """Before the first request."""

    async def __aexit__(self, *_: object) -> None:
        """After the last."""
