"""Requests to pictures, for programs: AsyncClient for asyncio, Client for all others."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncGenerator, Coroutine, Generator, Iterable, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

from client.errors import EndpointUnusable, JobFailed
from client.pictures import Pictures, pictures_of
from client.queue import CONCURRENCY, Job, Queue
from client.transport import URL, Transport
from src.errors import InvalidRequest, InvalidSettings
from src.request.reading import read_request
from src.settings import runpod_api_key

T = TypeVar("T")
Request = Mapping[str, Any]


class AsyncClient:
    """Pictures from the `endpoint` on RunPod; an async context manager.

    `api_key` is RUNPOD_API_KEY of the environment where it is not given, `url` where RunPod's routes are, and
    `concurrency` how many jobs are open at a time. A job that fails for reasons of the worker is sent again, twice at
    most; its seed is picked before, so that it brings the same bytes.
    """

    def __init__(
        self, endpoint: str, api_key: str | None = None, *, url: str = URL, concurrency: int = CONCURRENCY
    ) -> None:
        try:
            key = runpod_api_key() if api_key is None else api_key
        except InvalidSettings as error:
            raise EndpointUnusable(str(error)) from None
        if not key and url == URL:
            raise EndpointUnusable("there is no API key: give api_key, or set RUNPOD_API_KEY")
        self._transport = Transport(endpoint, key or "", url)
        self._concurrency = concurrency

    async def __aenter__(self) -> Self:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._transport.__aexit__(kind, error, traceback)

    async def generate(self, request: Request) -> Pictures:
        """The pictures of one request, whose fields are those of docs/api.md.

        Raises JobFailed with `code` and text: invalid_request, before anything is sent, with all that is wrong with it,
        or why the job failed; EndpointUnusable and Unreachable where no job comes through. A task that is cancelled
        cancels the job.
        """
        found = self.map([request])
        try:
            return await anext(found)
        finally:
            await found.aclose()

    @overload
    def map(
        self, requests: Iterable[Request], *, return_exceptions: Literal[False] = False
    ) -> AsyncGenerator[Pictures, None]: ...
    @overload
    def map(
        self, requests: Iterable[Request], *, return_exceptions: bool
    ) -> AsyncGenerator[Pictures | JobFailed, None]: ...
    def map(self, requests: Iterable[Request], *, return_exceptions: bool = False) -> AsyncGenerator[Any, None]:
        """The pictures of each request, in their order; no more of them are in memory than jobs are open.

        The first that fails raises as `generate` does, and open jobs are cancelled; with `return_exceptions` its
        JobFailed comes in its place instead, and the others follow. `aclose` cancels what is open.
        """
        return self._map(requests, return_exceptions)

    async def _map(self, requests: Iterable[Request], return_exceptions: bool) -> AsyncGenerator[Any, None]:
        async def receive(_: Job, status: Mapping[str, Any]) -> Pictures:
            return await pictures_of(status, self._transport)

        queue = Queue(self._transport, receive, concurrency=self._concurrency)
        ended = queue.run((Job(None, partial(_input, request)) for request in requests), in_order=True)
        try:
            async for _, found in ended:
                if isinstance(found, JobFailed) and not return_exceptions:
                    raise found
                yield found
        finally:
            await ended.aclose()

    async def health(self) -> dict[str, Any]:
        """How many jobs and workers the endpoint has, as RunPod says it."""
        return await self._transport.health()


class Client:
    """AsyncClient for programs without asyncio, and for notebooks; a context manager, whose end `close` is."""

    def __init__(
        self, endpoint: str, api_key: str | None = None, *, url: str = URL, concurrency: int = CONCURRENCY
    ) -> None:
        self._client = AsyncClient(endpoint, api_key, url=url, concurrency=concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="client", daemon=True)
        self._thread.start()
        self._await(self._client.__aenter__())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; what is open is cancelled by its own iteration's end."""
        if not self._loop.is_closed():
            self._await(self._client.__aexit__(None, None, None))
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def generate(self, request: Request) -> Pictures:
        """As AsyncClient.generate; Ctrl-C cancels the job."""
        found = self.map([request])
        try:
            return next(found)
        finally:
            found.close()

    @overload
    def map(
        self, requests: Iterable[Request], *, return_exceptions: Literal[False] = False
    ) -> Generator[Pictures, None, None]: ...
    @overload
    def map(
        self, requests: Iterable[Request], *, return_exceptions: bool
    ) -> Generator[Pictures | JobFailed, None, None]: ...
    def map(self, requests: Iterable[Request], *, return_exceptions: bool = False) -> Generator[Any, None, None]:
        """As AsyncClient.map; jobs go on while the caller works on what came. `close` of it cancels what is open."""
        return self._map(requests, return_exceptions)

    def _map(self, requests: Iterable[Request], return_exceptions: bool) -> Generator[Any, None, None]:
        found = self._client.map(requests, return_exceptions=return_exceptions)
        waiting: Future[Any] | None = None
        try:
            while True:
                waiting = asyncio.run_coroutine_threadsafe(_next(found), self._loop)
                if (pictures := waiting.result()) is None:
                    return
                yield pictures
        finally:
            if waiting is not None and waiting.cancel():  # Ctrl-C came while it was waited for
                with suppress(CancelledError):
                    waiting.result()
            self._await(_closed(found))

    def health(self) -> dict[str, Any]:
        """As AsyncClient.health."""
        return self._await(self._client.health())

    def _await(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


async def _next(found: AsyncGenerator[Any, None]) -> Any:
    return await anext(found, None)


async def _closed(found: AsyncGenerator[Any, None]) -> None:
    while True:
        try:
            return await found.aclose()
        except RuntimeError:  # it is still being left
            await asyncio.sleep(0.05)


def _input(request: Request) -> dict[str, Any]:
    """The request with a seed, so that it brings the same bytes however often it is sent."""
    try:
        reading = read_request({"input": request})
    except InvalidRequest as error:
        raise JobFailed(error.code, str(error)) from None
    if reading.faults:
        raise JobFailed(InvalidRequest.code, str(InvalidRequest(reading.faults)))
    seed = random.randrange(2**32) if reading.request.seed is None else reading.request.seed  # noqa: S311
    return {**request, "seed": seed}
