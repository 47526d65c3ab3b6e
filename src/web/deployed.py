"""RunPod's verbs, answered by a deployed endpoint: passed on by the client that keeps RunPod's limits.

The key is the client's; nobody who asks here gets to see it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from src.web.endpoint import FINAL, NotAnswered, UnknownJob

T = TypeVar("T")

DESCRIBE = {"describe": True}
DESCRIBED_SECONDS = 600.0  # how long what a worker says of itself is taken for true


class Transport(Protocol):
    """What is used of client/transport.py."""

    async def run(self, input: Mapping[str, Any]) -> str:
        """The job's id."""

    async def status(self, id: str) -> dict[str, Any]:
        """RunPod's body."""

    async def cancel(self, id: str) -> dict[str, Any]:
        """RunPod's body."""

    async def health(self) -> dict[str, Any]:
        """RunPod's body."""

    async def __aenter__(self) -> Self:
        """Open its connections."""

    async def __aexit__(self, *error: Any) -> None:
        """Close them."""


class _Described(NamedTuple):
    """The job that asked the worker what it can do."""

    id: str
    body: bytes | None  # its good end
    until: float  # by time.monotonic


class DeployedEndpoint:
    """`explain` makes UnknownJob or NotAnswered of what `transport` raises; what it does not know it gives back."""

    poll_seconds = 1.0

    def __init__(self, name: str, transport: Transport, explain: Callable[[Exception], Exception]) -> None:
        self.name = name
        self._transport = transport
        self._explain = explain
        self._described: _Described | None = None

    async def _ask(self, asked: Awaitable[T]) -> T:
        try:
            return await asked
        except Exception as error:
            raise self._explain(error) from error

    async def run(self, event: Mapping[str, Any], _size: int, /) -> str:
        """Pass a job on; one that asks for a description alone is the one that asked before."""
        if odd := sorted(event.keys() - {"input"}):
            raise NotAnswered(400, f"{', '.join(odd)}: not passed on from here; send input alone")
        if event["input"] != DESCRIBE:
            return await self._ask(self._transport.run(event["input"]))
        if self._described is None or self._described.until < time.monotonic():
            id = await self._ask(self._transport.run(DESCRIBE))
            self._described = _Described(id, None, time.monotonic() + DESCRIBED_SECONDS)
        return self._described.id

    async def status(self, id: str) -> bytes:
        """RunPod's body."""
        described = self._described if self._described and self._described.id == id else None
        if described and described.body:
            return described.body
        try:
            found = await self._ask(self._transport.status(id))
        except UnknownJob:
            found = {}
        body = json.dumps(found).encode()
        if described and found.get("status") in (*FINAL, None):
            self._described = described._replace(body=body) if found.get("status") == "COMPLETED" else None
        if not found:
            raise UnknownJob
        return body

    async def wait(self, id: str, seconds: float) -> bytes:
        """As `status`, asked again until the job is over or `seconds` are."""
        until, pause = time.monotonic() + seconds, self.poll_seconds / 4
        while True:
            body = await self.status(id)
            if json.loads(body).get("status") in FINAL or time.monotonic() + pause > until:
                return body
            await asyncio.sleep(pause)
            pause = min(2 * pause, 4 * self.poll_seconds)

    async def cancel(self, id: str) -> bytes:
        """RunPod's body."""
        return json.dumps(await self._ask(self._transport.cancel(id))).encode()

    async def health(self) -> dict[str, Any]:
        """RunPod's body."""
        return await self._ask(self._transport.health())

    def close(self) -> None:
        """Its jobs go on: whoever sent them may ask elsewhere."""

    async def __aenter__(self) -> Self:
        """Open its connections."""
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        """Close its connections."""
        await self._transport.__aexit__(*error)
