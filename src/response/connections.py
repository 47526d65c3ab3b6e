"""The connections of uploads, which end when they are told to: boto3's own end when its store lets them.

A store that drips byte after byte, or says nothing, is waited for by a thread of its own, which others may cut off.
Imports botocore, which takes a while: only who has a bucket should.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import suppress
from typing import Any, TypeVar

from botocore.awsrequest import (
    AWSHTTPConnection,
    AWSHTTPConnectionPool,
    AWSHTTPSConnection,
    AWSHTTPSConnectionPool,
)

from src.errors import Refused
from src.request.fetch import check_public

T = TypeVar("T")

_LOOK = 0.1  # seconds between two looks at whether to go on
_MOST_ANSWERED = 1_000_000  # bytes; a store answers an upload with a few hundred

_of_thread = threading.local()


def in_time(
    works: Mapping[int, Callable[[], T]], seconds: float, check: Callable[[], None] = lambda: None
) -> dict[int, T | Exception]:
    """What each of `works` returns or raises, each on a thread of its own; those that took too long a TimeoutError.

    After `seconds` their connections are cut and nobody waits for them any more, and so where `check` raises.
    """
    outcomes: dict[int, T | Exception] = {}
    done: queue.SimpleQueue[tuple[int, T | Exception]] = queue.SimpleQueue()
    line = _Line()

    def run(i: int, work: Callable[[], T]) -> None:
        _of_thread.line = line
        try:
            outcome: T | Exception = work()
        except Exception as error:  # noqa: BLE001 - whoever asked gets it
            outcome = error
        done.put((i, outcome))

    for i, work in works.items():
        try:
            threading.Thread(target=run, args=(i, work), name="upload", daemon=True).start()
        except RuntimeError as error:  # no more threads
            outcomes[i] = error
    deadline = time.monotonic() + seconds
    try:
        while len(outcomes) < len(works) and time.monotonic() < deadline:
            check()
            with suppress(queue.Empty):
                i, outcome = done.get(timeout=_LOOK)
                outcomes[i] = outcome
    finally:
        if len(outcomes) < len(works):
            line.cut()
    late = TimeoutError(f"not done within {seconds:g} seconds")
    return {i: outcomes.get(i, late) for i in works}


class _Line:
    """The connections that are in use for some uploads."""

    def __init__(self) -> None:
        self._connections: list[_Connection] = []
        self._lock = threading.Lock()
        self._is_cut = False

    def use(self, connection: _Connection) -> None:
        """Let `connection` be cut with the others; raises CancelledError where they are."""
        with self._lock:
            if self._is_cut:
                raise CancelledError(
                    "the upload was given up"
                )  # the one error that botocore passes on and never retries
            if connection not in self._connections:
                self._connections.append(connection)

    def cut(self) -> None:
        """End all that is under way on them, and whatever would be begun."""
        with self._lock:
            self._is_cut = True
            for connection in self._connections:
                connection.cut()


class _Connection:
    """Mixed into botocore's connections."""

    only_public = False
    _handle: socket.socket | None = None  # the connection's own socket goes through many hands

    def _new_conn(self) -> socket.socket:
        self._use()
        made: socket.socket = super()._new_conn()  # type: ignore[misc]
        try:
            self._handle = made.dup()
            if self.only_public:  # the name may lead elsewhere than when it was looked at
                address = made.getpeername()[0]
                check_public(f"https://[{address}]" if ":" in address else f"https://{address}")
            self._use()
        except BaseException:
            made.close()
            self._drop()
            raise
        return made

    def request(self, *arguments: Any, **options: Any) -> Any:
        """As http.client's; it may be a connection that was used before."""
        self._use()
        return super().request(*arguments, **options)  # type: ignore[misc]

    def getresponse(self, *arguments: Any, **options: Any) -> Any:
        """As http.client's; an answer that is too long ends with an error."""
        answer = super().getresponse(*arguments, **options)  # type: ignore[misc]
        answer.stream = _bounded(weakref.WeakMethod(answer.stream))  # or it would hold itself, and its connection open
        return answer

    def _consume_headers(self, received: Any) -> None:
        """Those after "100 Continue": botocore's own goes on for ever where the store hangs up there."""
        for line in iter(received.readline, b"\r\n"):
            if not line:
                raise ConnectionAbortedError("the store hung up after 100 Continue")

    def close(self) -> None:
        """As http.client's."""
        self._drop()
        super().close()  # type: ignore[misc]

    def cut(self) -> None:
        """Whoever sends or receives on it gets an error now."""
        if handle := self._handle:
            with suppress(OSError):
                handle.shutdown(socket.SHUT_RDWR)

    def _use(self) -> None:
        if line := getattr(_of_thread, "line", None):
            line.use(self)

    def _drop(self) -> None:
        handle, self._handle = self._handle, None
        if handle:
            handle.close()


def _bounded(stream: weakref.WeakMethod[Callable[..., Iterator[bytes]]]) -> Callable[..., Iterator[bytes]]:
    def pieces(*arguments: Any, **options: Any) -> Iterator[bytes]:
        size = 0
        whole = stream()
        for piece in whole(*arguments, **options) if whole else ():
            size += len(piece)
            if size > _MOST_ANSWERED:
                raise Refused(f"answers an upload with more than {_MOST_ANSWERED:,} bytes")
            yield piece

    return pieces


class _Http(_Connection, AWSHTTPConnection):  # type: ignore[misc]
    pass


class _Https(_Connection, AWSHTTPSConnection):  # type: ignore[misc]
    pass


class _PublicHttp(_Http):
    only_public = True


class _PublicHttps(_Https):
    only_public = True


def _pools(http: type, https: type) -> dict[str, type]:
    return {
        "http": type("_Pool", (AWSHTTPConnectionPool,), {"ConnectionCls": http}),
        "https": type("_Pool", (AWSHTTPSConnectionPool,), {"ConnectionCls": https}),
    }


_ANYWHERE, _PUBLIC = _pools(_Http, _Https), _pools(_PublicHttp, _PublicHttps)


def give_connections(client: Any, *, only_public: bool) -> None:
    """Let boto3's `client` use these connections, to public addresses alone where that is asked for."""
    session = client._endpoint.http_session  # botocore shows it nowhere else
    session._pool_classes_by_scheme = session._manager.pool_classes_by_scheme = _PUBLIC if only_public else _ANYWHERE
