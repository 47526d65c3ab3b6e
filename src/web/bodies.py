"""What comes with a request, within bounds: of bytes, of seconds, and of all requests together."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

SECONDS = 60.0  # for a body to arrive
MOST_TOGETHER = 200_000_000  # bytes of bodies that are on their way


class BadBody(Exception):
    """What is wrong with a request's body: `status` of HTTP, and a sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Bodies:
    """Reads them, and counts what is on its way."""

    def __init__(self, seconds: float = SECONDS, most_together: int = MOST_TOGETHER) -> None:
        self._seconds = seconds
        self._most_together = most_together
        self._held = 0

    async def read(self, request: HttpRequest, most: int) -> bytes:
        """The body, of `most` bytes at most. Raises BadBody.

        A larger one is read to its end, or its sender would see a broken connection and not the reason.
        """
        pieces, kept, size = list[bytes](), 0, 0
        try:
            async with asyncio.timeout(self._seconds):
                async for piece in request.stream():
                    size += len(piece)
                    if size > MOST_TOGETHER:
                        break
                    if size > most:
                        pieces.clear()
                        continue
                    kept += len(piece)
                    self._held += len(piece)
                    if self._held > self._most_together:
                        raise BadBody(503, "too many bodies are on their way; send the request again later")
                    pieces.append(piece)
        except ClientDisconnect:  # nobody reads this
            raise BadBody(400, "the connection was closed before the body had arrived") from None
        except TimeoutError:
            raise BadBody(408, f"the body did not arrive within {self._seconds:g} seconds") from None
        finally:
            self._held -= kept
        if size > most:
            raise BadBody(413, f"the body has more than {most:,} bytes")
        return b"".join(pieces)

    async def read_json(self, request: HttpRequest, most: int) -> tuple[dict[str, Any], int]:
        """The object in the body, and its bytes. Raises BadBody."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise BadBody(415, "the header Content-Type must be application/json")
        body = await self.read(request, most)
        return parse(body), len(body)


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`; raises BadBody."""
    try:
        value = json.loads(body, parse_constant=_no_number)
    except RecursionError:
        raise BadBody(400, "the body is nested too deeply to be a request") from None
    except ValueError as error:  # also numbers of thousands of digits, and bytes of no encoding
        raise BadBody(400, f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, Mapping):
        raise BadBody(400, f"the body must be a JSON object, and is a {type(value).__name__}")
    return dict(value)


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")
