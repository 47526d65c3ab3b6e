"""RunPod's routes of one endpoint, within its limits, asked again where an answer is missing.

Knows nothing of pictures, rows or files.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType, TracebackType
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from aiolimiter import AsyncLimiter

from client.errors import EndpointUnusable, Forgotten, JobFailed, Unreachable
from src.redaction import cut, keep_secret, redact
from src.wording import show

T = TypeVar("T")

URL = "https://api.runpod.ai/v2"


class Limit(NamedTuple):
    """What RunPod takes of one route."""

    per_10_seconds: int
    at_once: int


# https://docs.runpod.io/serverless/endpoints/operation-reference#rate-limits; of /health nothing is said.
LIMITS: Mapping[str, Limit] = MappingProxyType(
    {
        "run": Limit(1000, 200),
        "status": Limit(2000, 400),
        "cancel": Limit(100, 20),
        "health": Limit(100, 20),
    }
)
# A leaky bucket lets its size through at once and then its rate: within any 10 seconds that is 11 times the size of
# one that leaks within a second. A tenth is left, since on their way requests close up.
_OF_A_LIMIT = 0.9 / 11

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds; before the first retry at most, and before any
_FIRST_CONTACT = 20.0  # seconds for which an address is tried that never answered
_TIMEOUT = aiohttp.ClientTimeout(total=300, sock_connect=20, sock_read=60)
_MOST_BYTES = 64_000_000  # of an answer: three times what RunPod carries
_MOST_SHOWN = 300  # characters of an answer that are repeated
_CONSOLE = "https://console.runpod.io"
# What an HTTP status means that no retry mends.
_MEANINGS: Mapping[int, str] = MappingProxyType(
    {
        401: f"does not know the API key: make one at {_CONSOLE}/user/settings and put it into RUNPOD_API_KEY",
        402: f"has too little credit on this account: add some at {_CONSOLE}/user/billing",
        403: f"does not let this API key use the endpoint: give the key that right at {_CONSOLE}/user/settings",
        404: f"has no such endpoint: its id is on its page, under {_CONSOLE}/serverless",
    }
)


class _Trouble(Exception):
    """Why one try brought nothing, in how many seconds the next is wanted, and whether what was asked may be done."""

    def __init__(self, why: str, *, retry_after: float = 0.0, perhaps_done: bool = False) -> None:
        super().__init__(why)
        self.retry_after, self.perhaps_done = retry_after, perhaps_done


class _Route:
    """The limits of one route, kept by all its requests together."""

    def __init__(self, limit: Limit) -> None:
        self._at_once = asyncio.Semaphore(limit.at_once)
        self._rate = AsyncLimiter(limit.per_10_seconds * _OF_A_LIMIT, 1)
        self._not_before = 0.0  # by time.monotonic

    async def __aenter__(self) -> None:
        await self._at_once.acquire()
        try:
            while (wait := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait + random.uniform(0, 0.1 * wait))  # noqa: S311 - so that not all come at once
            await self._rate.acquire()
        except BaseException:
            self._at_once.release()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._at_once.release()

    def rest(self, seconds: float) -> None:
        """Let no request begin for so long: RunPod had too many."""
        self._not_before = max(self._not_before, time.monotonic() + seconds)


class Transport:
    """The routes of `endpoint` at `url`, an async context manager.

    Where RunPod answers 429, 5xx or nothing usable, it is asked again: after what Retry-After says, else after a random
    time that grows (exponential backoff with full jitter), for `patience` seconds in all.

    Raises EndpointUnusable where no try would help, Unreachable where all of them failed. The API key is sent in a
    header to `url` alone, and stands in no error.
    """

    def __init__(self, endpoint: str, api_key: str, url: str = URL, *, patience: float = 300.0) -> None:
        keep_secret(api_key)
        if not all("!" <= character <= "~" for character in api_key):
            raise EndpointUnusable("the API key holds a character that no HTTP header can carry: copy it anew")
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise EndpointUnusable(f"{show(url)} is no address: it must be as {URL}")
        self._url = f"{url.rstrip('/')}/{quote(endpoint, safe='')}"
        self._host = urlsplit(url).netloc
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._patience = patience
        self._answered = False
        self._session: aiohttp.ClientSession | None = None
        self._routes: dict[str, _Route] = {}
        self.calls: Counter[str] = Counter()  # by route, retries among them
        self.sent_again = 0  # jobs that were sent once more, though RunPod may have taken them the first time

    async def __aenter__(self) -> Self:
        # Not trust_env, which would let ~/.netrc speak for another user.
        proxy = None if proxy_bypass(self._host) else getproxies().get(urlsplit(self._url).scheme)
        self._session = aiohttp.ClientSession(timeout=_TIMEOUT, proxy=proxy)
        self._routes = {name: _Route(limit) for name, limit in LIMITS.items()}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._session is not None  # noqa: S101
        await self._session.close()

    async def run(self, input: Mapping[str, Any]) -> str:
        """The id of a new job of this input.

        RunPod cannot be told that two requests mean the same job: where the connection broke before the id came, there
        may be a job already that nobody knows, and `sent_again` counts the second. Raises JobFailed("rejected") where
        RunPod does not take the request (it carries 10 MB).
        """
        answer = await self._ask("run", "POST", "run", {"input": input}, needs="id")
        return str(answer["id"])

    async def status(self, id: str) -> dict[str, Any]:
        """RunPod's status of a job, `{"id", "status", "output"?, "error"?, ...}`. Raises Forgotten."""
        return await self._ask("status", "GET", f"status/{quote(id, safe='')}", needs="status")

    async def cancel(self, id: str) -> dict[str, Any]:
        """The status of a job that is told to stop; one that was done stays so. Raises Forgotten."""
        return await self._ask("cancel", "POST", f"cancel/{quote(id, safe='')}", needs="status")

    async def health(self) -> dict[str, Any]:
        """How many jobs and workers the endpoint has, by what they do."""
        return await self._ask("health", "GET", "health")

    async def fetch(self, url: str) -> bytes:
        """The file at `url`, of a bucket say; the key is not sent there. Raises JobFailed("gone")."""
        try:
            return await self._patiently(lambda: self._once("GET", url, None, headers={}), urlsplit(url).netloc)
        except _Refusal as refusal:
            raise JobFailed("gone", f"a picture is not to be had at {_plain(url)}: {refusal}") from None

    async def _ask(
        self, route: str, method: str, path: str, body: Mapping[str, Any] | None = None, needs: str | None = None
    ) -> dict[str, Any]:
        """The answer's object, which has `needs`."""

        async def once() -> dict[str, Any]:
            async with self._routes[route]:
                self.calls[route] += 1
                try:
                    return _object(await self._once(method, f"{self._url}/{path}", body, self._headers), needs)
                except _Trouble as trouble:
                    if trouble.retry_after:
                        self._routes[route].rest(trouble.retry_after)
                    raise

        try:
            return await self._patiently(once, self._host, count=route == "run")
        except _Refusal as refusal:
            by_id = route in ("status", "cancel")
            if by_id and refusal.status == 404:
                raise Forgotten("RunPod does not know the job; it keeps results for 30 minutes") from None
            if refusal.status in _MEANINGS:
                meaning = f"{_MEANINGS[refusal.status]} (HTTP {refusal.status})"
                raise EndpointUnusable(f"{self._host} {meaning}; asked was {self._url}") from None
            if 300 <= refusal.status < 400:
                raise EndpointUnusable(f"{self._url} leads elsewhere ({refusal}): give --url the right one") from None
            raise JobFailed("rejected", f"RunPod did not take the request: {refusal}") from None

    async def _patiently(self, once: Callable[[], Awaitable[T]], host: str, *, count: bool = False) -> T:
        """What `once` returns; after a _Trouble it is called again, until the patience is over."""
        began, tries = time.monotonic(), 0
        while True:
            try:
                answer = await once()
            except _Trouble as trouble:
                if "certificate" in str(trouble).lower():
                    raise EndpointUnusable(f"{host} cannot be trusted: {trouble}") from None
                jitter = random.uniform(0, min(_LONGEST_WAIT, _FIRST_WAIT * 2**tries))  # noqa: S311
                wait = max(trouble.retry_after, jitter)
                tries += 1
                patience = self._patience if self._answered else min(self._patience, _FIRST_CONTACT)
                if time.monotonic() + wait - began > patience:
                    raise Unreachable(f"{host} gave no usable answer in {tries} tries: {trouble}") from None
                self.sent_again += count and trouble.perhaps_done
                await asyncio.sleep(wait)
            else:
                return answer

    async def _once(self, method: str, url: str, body: Mapping[str, Any] | None, headers: Mapping[str, str]) -> bytes:
        """The body of one answer with HTTP 200. Raises _Trouble or _Refusal."""
        assert self._session is not None, "use `async with Transport(...)`"  # noqa: S101
        sent = None if body is None else json.dumps(body).encode()
        more = {} if sent is None else {"Content-Type": "application/json"}
        try:
            async with self._session.request(
                method, url, data=sent, headers={**headers, **more}, allow_redirects=not headers
            ) as answer:
                self._answered = True
                if answer.status == 429 or answer.status >= 500 or answer.status == 408:
                    raise _Trouble(
                        f"HTTP {answer.status}",
                        retry_after=_seconds(answer.headers.get("Retry-After", "")),
                        perhaps_done=answer.status in (502, 504),  # a gateway's, which had asked
                    )
                received = await _read(answer)
                if answer.status != 200:
                    raise _Refusal(answer.status, received)
                return received
        except aiohttp.ClientConnectorError as error:  # nothing was sent
            raise _Trouble(_first_line(error)) from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _Trouble(_first_line(error), perhaps_done=True) from None


class _Refusal(Exception):
    """An HTTP status that another try would not change."""

    def __init__(self, status: int, body: bytes) -> None:
        said = redact(cut(" ".join(body[:2_000].decode(errors="replace").split()), _MOST_SHOWN))
        super().__init__(f"HTTP {status}{f', {said}' if said else ''}")
        self.status = status


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    parts, size = [], 0
    async for part in answer.content.iter_chunked(1 << 16):
        parts.append(part)
        size += len(part)
        if size > _MOST_BYTES:
            raise _Trouble(f"an answer of more than {_MOST_BYTES / 1e6:g} MB", perhaps_done=True)
    return b"".join(parts)


def _object(body: bytes, needs: str | None) -> dict[str, Any]:
    """The JSON object of an answer; RunPod did something, whatever it says of it."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict) and (needs is None or (isinstance(found.get(needs), str) and found[needs])):
        return found
    said = redact(cut(" ".join(body[:2_000].decode(errors="replace").split()), _MOST_SHOWN))
    raise _Trouble(f"an answer without {needs or 'an object'}: {said!r}", perhaps_done=True)


def _seconds(retry_after: str) -> float:
    """Retry-After: seconds, or a date; 0 where it is neither."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        at = parsedate_to_datetime(retry_after)
    except (ValueError, TypeError):
        return 0.0
    at = at if at.tzinfo else at.replace(tzinfo=UTC)
    return max(0.0, (at - datetime.now(UTC)).total_seconds())


def _first_line(error: BaseException) -> str:
    said = str(error).strip().partition("\n")[0]
    return redact(cut(f"{type(error).__name__}: {said}" if said else type(error).__name__, _MOST_SHOWN))


def _plain(url: str) -> str:
    """An address without what signs it."""
    return url.partition("?")[0]
