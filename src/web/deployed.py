"""RunPod's verbs, answered by a deployed endpoint: passed on by the client that keeps RunPod's limits.

The key is the client's; nobody who asks here gets to see it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any, Protocol, Self

from src.web.endpoint import FINAL, NotTaken, UnknownJob

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


class DeployedEndpoint:
    """`forgotten` is what `transport` raises for a job that RunPod does not know any more."""

    poll_seconds = 1.0

    def __init__(self, name: str, transport: Transport, forgotten: type[Exception]) -> None:
        self.name = name
        self._transport = transport
        self._forgotten = forgotten
        self._described: tuple[str, bytes | None, float] | None = None  # the job's id, its end, until when

    async def run(self, event: Mapping[str, Any], _size: int, /) -> str:
        """Pass a job on; one that asks for a description alone is the one that asked before."""
        if odd := sorted(event.keys() - {"input"}):
            raise NotTaken(400, f"{', '.join(odd)}: not passed on from here; send input alone")
        if event["input"] != DESCRIBE:
            return await self._transport.run(event["input"])
        if self._described is None or self._described[2] < time.monotonic():
            id = await self._transport.run(DESCRIBE)
            self._described = (id, None, time.monotonic() + DESCRIBED_SECONDS)
        return self._described[0]

    async def status(self, id: str) -> bytes:
        """RunPod's body."""
        described = self._described
        if described and described[0] == id and described[1]:
            return described[1]
        try:
            found = await self._transport.status(id)
        except self._forgotten:
            found = {"status": "FORGOTTEN"}
        body = json.dumps(found).encode()
        if described and described[0] == id and found.get("status") in (*FINAL, "FORGOTTEN"):
            self._described = (id, body, described[2]) if found["status"] == "COMPLETED" else None
        if found["status"] == "FORGOTTEN":
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
        try:
            return json.dumps(await self._transport.cancel(id)).encode()
        except self._forgotten:
            raise UnknownJob from None

    async def health(self) -> dict[str, Any]:
        """RunPod's body."""
        return await self._transport.health()

    def close(self) -> None:
        """Its jobs go on: whoever sent them may ask elsewhere."""

    async def __aenter__(self) -> Self:
        """Open its connections."""
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        """Close its connections."""
        await self._transport.__aexit__(*error)
