"""Connections to servers that a client named: to public addresses alone, and whatever is waited for ends by a clock."""

from __future__ import annotations

import contextlib
import errno
import io
import ipaddress
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeVar

from src.errors import Refused
from src.wording import show

T = TypeVar("T")

SILENCE = 10  # seconds without a word: from a server, from all addresses of a name, from the resolver
OVERHEAD = 524_288  # bytes that may come beside those of a file: headers, certificates, sizes of chunks, trailers
_PIECE = 64  # bytes that each piece of a file counts beside it, however little it holds: to read one takes time
_CHUNK = 65_536  # bytes
_TICK = 0.25  # seconds after which whoever waits looks whether it is still wanted
_LOOK_UPS = 64  # names that are resolved at once, those included that nobody waits for any more
_looking_up = threading.BoundedSemaphore(_LOOK_UPS)

# What the SDK, by Python's tables, takes for public: IETF's own, 6to4's relays, examples, and what answers within each
# machine of Azure. Public IPv6 addresses lie in one block.
_PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "3fff::/20")))
_ISATAP = 0x5EFE  # the third quarter of an IPv6 address whose last is an IPv4 address, but for the bit that says public


class TooLate(Exception):
    """The deadline has passed."""


class Clock(NamedTuple):
    """By when all must be done, on time.monotonic(), and `check`, which may raise to end it before."""

    deadline: float
    check: Callable[[], None]

    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.monotonic()

    def look(self) -> None:
        """Raise TooLate past the deadline, and what `check` raises."""
        self.check()
        if self.left() <= 0:
            raise TooLate

    def wait(self, ready: Callable[[float], object], seconds: float = SILENCE) -> None:
        """Return once `ready` is true, which waits as long as it is told to; raises TimeoutError after `seconds`."""
        until = time.monotonic() + seconds
        while True:
            self.look()
            left = until - time.monotonic()
            if ready(max(0.0, min(_TICK, left, self.left()))):
                return
            if left <= 0:
                raise TimeoutError

    def pause(self, seconds: float) -> None:
        """Do nothing for `seconds`."""
        with contextlib.suppress(TimeoutError):
            self.wait(time.sleep, seconds)


def resolve(host: str, port: int, clock: Clock) -> list[str]:
    """The addresses of `host`, all of them public; raises the SDK's SSRFError, from an OSError where there are none.

    Nothing ends a look-up before it ends by itself: it has a thread, left behind where the clock ends the wait.
    """
    from runpod.serverless.utils.rp_ssrf import SSRFError, resolve_and_validate

    found: Future[list[str]] = Future()

    def look_up() -> None:
        try:
            found.set_result(resolve_and_validate(host, port))
        except Exception as error:  # noqa: BLE001 - for whoever waits
            found.set_exception(error)
        finally:
            _looking_up.release()

    thread = threading.Thread(target=look_up, name="look-up", daemon=True)

    def ended(seconds: float) -> bool:
        thread.join(seconds)
        return not thread.is_alive()

    try:
        clock.wait(lambda seconds: _looking_up.acquire(timeout=seconds))
        try:
            thread.start()
        except BaseException:
            _looking_up.release()
            raise
        clock.wait(ended)
    except TimeoutError as error:
        raise SSRFError(f"could not resolve host {show(host)} within {SILENCE} seconds") from error
    addresses = found.result()
    for address in addresses:
        if not _is_public(address) and _is_protected():
            raise SSRFError(f"host {show(host)} resolves to non-public address {address}")
    return addresses


def _is_public(text: str) -> bool:
    """Whether an address that the SDK takes for public leads to no private one by another way either."""
    from runpod.serverless.utils.rp_ssrf import is_safe_address

    address = ipaddress.ip_address(text)
    if any(address in network for network in _NOT_PUBLIC):
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return bool(is_safe_address(text))
    inner = address.ipv4_mapped or address.sixtofour
    if inner is None and int(address) >> 32 & 0xFDFF_FFFF == _ISATAP:
        inner = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return _is_public(str(inner)) if inner else address in _PUBLIC_IPV6


def _is_protected() -> bool:
    """Whether private addresses are refused: RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS, the SDK's own, allows them."""
    from runpod.serverless.utils.rp_ssrf import SSRFError, resolve_and_validate

    try:
        resolve_and_validate("127.0.0.1", 0)
    except SSRFError:
        return True
    return False


def connect(addresses: Sequence[str], port: int, clock: Clock) -> socket.socket:
    """A socket to the first of `addresses` that can be reached; raises OSError where none can.

    Those that are left share the seconds that are left, so that many dead ones take no longer than one.
    """
    until, failure = time.monotonic() + SILENCE, OSError()
    for i, address in enumerate(addresses):
        try:
            with contextlib.ExitStack() as stack:
                line = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET))
                line.setblocking(False)
                code = line.connect_ex((address, port))
                if code == errno.EINPROGRESS:
                    share = (until - time.monotonic()) / (len(addresses) - i)
                    _wait_for(line, select.POLLOUT, clock, share)
                    code = line.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, os.strerror(code))
                stack.pop_all()
                return line
        except OSError as error:
            failure = error
    raise failure


class Connection(io.RawIOBase):
    """What a server sends, by TLS once it is encrypted.

    TLS reads from memory here, which holds no more than what came: nothing that a server sends keeps it from the clock.
    """

    def __init__(self, line: socket.socket, clock: Clock) -> None:
        self._socket, self._clock = line, clock
        self._room = OVERHEAD
        self._tls: ssl.SSLObject | None = None
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()

    def encrypt(self, authorities: str, host: str) -> None:
        """Speak TLS from now on, and with `host` alone, as `authorities`, a file or a folder, have it."""
        self._tls = _tls(authorities).wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        try:
            self._by_tls(self._tls.do_handshake)
        except ssl.SSLEOFError:
            raise ConnectionResetError from None

    def make_room(self, size: int) -> None:
        """A piece of the file came, of `size` bytes: they do not count, and as many more may come beside it."""
        self._room = min(OVERHEAD, self._room + 2 * size - _PIECE)

    def sendall(self, data: bytes) -> None:
        """Send it; named as a socket's, for http.client."""
        if self._tls:
            self._by_tls(partial(self._tls.write, data))
        else:
            self._send(data)

    def makefile(self, *_: object) -> io.BufferedReader:
        """What http.client reads from."""
        return io.BufferedReader(self, _CHUNK)

    def readable(self) -> bool:
        """It is, for BufferedReader."""
        return True

    def readinto(self, buffer: Any) -> int:
        """How many bytes came, into `buffer`; none at the end."""
        if self._tls is None:
            data = self._receive(len(buffer))
        else:
            try:
                data = self._by_tls(partial(self._tls.read, len(buffer)))
            except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
                data = b""
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
        super().close()

    def _by_tls(self, work: Callable[[], T]) -> T:
        """What `work` returns once all has come that it needs; what it has to say is sent."""
        while True:
            try:
                done = work()
            except ssl.SSLWantReadError:
                self._send(self._outgoing.read())
                if data := self._receive(_CHUNK):
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            else:
                self._send(self._outgoing.read())
                return done

    def _receive(self, most: int) -> bytes:
        self._clock.look()
        while True:
            try:
                data = self._socket.recv(most)
                break
            except BlockingIOError:
                _wait_for(self._socket, select.POLLIN, self._clock)
        self._room -= len(data)
        if self._room < 0:
            raise Refused(
                f"could not be fetched: beside the file itself the server sends more than {OVERHEAD:,} bytes (headers, "
                "chunks of next to nothing)"
            )
        return data

    def _send(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except BlockingIOError:
                _wait_for(self._socket, select.POLLOUT, self._clock)


def _wait_for(line: socket.socket, event: int, clock: Clock, seconds: float = SILENCE) -> None:
    poll = select.poll()
    poll.register(line, event)
    clock.wait(lambda left: poll.poll(left * 1_000), seconds)


@lru_cache(maxsize=4)
def _tls(authorities: str) -> ssl.SSLContext:
    folder = authorities if os.path.isdir(authorities) else None
    context = ssl.create_default_context(cafile=None if folder else authorities, capath=folder)
    context.set_alpn_protocols(["http/1.1"])
    return context
