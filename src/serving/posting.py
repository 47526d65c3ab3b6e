"""How a job's result gets to RunPod: posted again until it is taken.

What the SDK sees of it is an aiohttp session that always succeeds in the end. No address is written into the log: its
query holds a key.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

import aiohttp

from src.serving import sdk
from src.wording import show

log = logging.getLogger("worker")

PATIENCE_SECONDS = 3_600.0  # how long a result is posted again: RunPod keeps one for half an hour once it has it
REFUSAL_SECONDS = 300.0  # how long it may be refused all the time, as by a gateway that has lost its keys
LEAVING_SECONDS = 180.0  # how long a worker that was told to end goes on trying
_RETRY_SECONDS = (0.2, 0.5, 1, 2, 4, 5)  # between two tries; the last goes on
_QUIET_SECONDS = 60.0  # between two lines of the log on one result
_LARGE = 5_000_000  # bytes from which HTTP 400 may mean "too large", as 413 does: RunPod takes 10 or 20 MB
_BELIEVED = 4  # times in a row that it says so before it is believed
_FOR_LATER = (408, 425, 429)  # of the statuses from 400 to 499
_PAGE = 512  # bytes of an answer that tell whether it is a page of somebody in between


class Results:
    """The results on their way to RunPod, and how many bytes they hold; `trip` is told how long an answer took."""

    def __init__(self, trip: Callable[[float], None]) -> None:
        self.bytes = 0
        self.trip = trip
        self._leaving: float | None = None

    def leave(self) -> None:
        """The worker is to end: patience too."""
        self._leaving = self._leaving or time.monotonic()

    @property
    def out_of_time(self) -> bool:
        """Whether a worker that was told to end should go."""
        return self._leaving is not None and time.monotonic() - self._leaving > LEAVING_SECONDS

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Count `size` bytes while one is posted."""
        self.bytes += size
        try:
            yield
        finally:
            self.bytes -= size


@dataclass(frozen=True)
class Taken:
    """What the SDK looks at of an answer: RunPod has the result."""

    status: int = 200
    method: str = "POST"
    closed: bool = True

    def raise_for_status(self) -> None:
        """It is no error."""

    async def text(self) -> str:
        """Nobody reads it, and whoever sends much keeps it."""
        return ""


@dataclass(frozen=True)
class _Failure:
    """Why a try failed."""

    reason: str
    status: int | None = None  # None where there was no answer

    @property
    def refused(self) -> bool:
        """Whether there is no hope that RunPod or somebody in between will soon answer otherwise."""
        return self.status is not None and self.status < 500 and self.status not in _FOR_LATER


class PatientSession:
    """What the SDK needs of an aiohttp session to post one job's result.

    A body that RunPod refuses for its size is replaced by an error: the SDK would leave the client without a word.
    """

    def __init__(self, session: aiohttp.ClientSession, results: Results) -> None:
        self.headers: dict[str, str] = {}  # the SDK writes X-Request-ID here, which the jobs must not share
        self._session = session
        self._results = results

    async def request(self, method: str, url: str, *, headers: dict[str, str], data: str, **options: Any) -> Taken:
        """RunPod's word that it has the result.

        Raises aiohttp.ClientError, which the SDK writes down and does not retry, when PATIENCE_SECONDS are over, or
        REFUSAL_SECONDS of nothing but refusals.
        """
        id = self.headers["X-Request-ID"]
        body = data.encode(errors="replace")
        if url.startswith(raw := sdk.done_url(id)):
            url = sdk.done_url(quote(id, safe="")) + url.removeprefix(raw)  # one piece of the path, whatever it is
        headers = {**self.headers, **headers, "X-Request-ID": quote(id)}
        post = partial(self._post, method, url, headers=headers, **options)
        with self._results.holding(len(body)):
            return await self._post_until_taken(id, body, post)

    async def _post_until_taken(self, id: str, body: bytes, post: Callable[..., Awaitable[_Failure | None]]) -> Taken:
        began = time.monotonic()
        tries = too_large = 0
        refused_since = logged_at = None
        answered = True  # otherwise a try may have arrived, and a later refusal means that
        while True:
            tries += 1
            timeout = aiohttp.ClientTimeout(total=30 + len(body) / 1e6)
            failure = await post(data=body, timeout=timeout)
            now = time.monotonic()
            if failure is None:
                if tries == 1:
                    self._results.trip(now - began)
                else:
                    log.info("job %s: its result was taken at try %d", show(id), tries, extra=_facts(id))
                return Taken()
            answered = answered and failure.status is not None
            says_so = failure.status == 413 or (failure.status == 400 and len(body) >= _LARGE and answered)
            too_large = too_large + 1 if says_so else 0
            if too_large == _BELIEVED:
                log.error("job %s: RunPod refused a result of %d bytes", show(id), len(body), extra=_facts(id))
                body = _too_large(body)
            refused_since = refused_since or now if failure.refused else None
            wait = _RETRY_SECONDS[min(tries, len(_RETRY_SECONDS)) - 1]
            if (
                now - began + wait > PATIENCE_SECONDS
                or (refused_since and now - refused_since > REFUSAL_SECONDS)
                or self._results.out_of_time
            ):
                raise aiohttp.ClientError(
                    f"given up after {tries} tries in {now - began:.0f} s, the last: {failure.reason}"
                )
            if logged_at is None or now - logged_at > _QUIET_SECONDS:
                logged_at = now
                log.warning("job %s: posting its result again after %s", show(id), failure.reason, extra=_facts(id))
            await asyncio.sleep(wait)

    async def _post(self, method: str, url: str, **options: Any) -> _Failure | None:
        try:
            # A redirected POST is asked again as a GET, and arrives as nothing.
            async with self._session.request(method, url, allow_redirects=False, **options) as answer:
                status = answer.status
                page = (await answer.content.read(_PAGE)).lstrip()[:1] == b"<" if status < 300 else False
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            return _Failure(type(error).__name__)
        if status < 300 and not page:
            return None
        return _Failure(f"HTTP {status}{' with a page' if page else ''}", status)


def _facts(id: str) -> dict[str, Any]:
    return {"facts": {"job": id}}


def _too_large(body: bytes) -> bytes:
    posted = json.loads(body)
    size = f"{len(body) / 1e6:.1f} MB" if len(body) >= 1e5 else f"{len(body):,} bytes"
    error = (
        f"response_too_large: RunPod refused the result of {size}; ask for fewer or smaller pictures or for "
        "JPEG, or set MAX_RESPONSE_MB or a bucket on the worker"
    )
    return json.dumps({"error": error, **({"stopPod": True} if posted.get("stopPod") else {})}).encode()
