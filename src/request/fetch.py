"""What lies at an address that a client sent, taken for hostile.

Nothing is fetched from private addresses, nothing larger than the caller's cap, and nothing past its deadline.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import math
import os
import re
import ssl
import time
import zlib
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import urljoin

import brotli
from backports import zstd

from src import __version__
from src.errors import Refused
from src.request.connection import SILENCE, Clock, Connection, TooLate, connect, resolve
from src.wording import show

if TYPE_CHECKING:
    import socket

    import requests

_CHUNK = 65_536  # bytes
_LONGEST_ADDRESS = 16_384  # characters
_LONGEST_TEXT = 300  # characters of what a library or a server says
_BUSY = (429, 500, 502, 503, 504)  # asked once more
_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds before that: where the server names none, and the most that it may name
_REDIRECTED, _REDIRECTS = (301, 302, 303, 307, 308), 5
_PORTS = MappingProxyType({"https": 443, "http": 80})
_HEADERS = {
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "Connection": "close",
    "User-Agent": f"flux-worker/{__version__}",
}
_GZIP = 0x1F  # what each member of a gzip file begins with
_Pieces = Generator[bytes, None, bool]  # and whether they were all


class HttpError(Refused):
    """The server's answer was an error; `status` is its code."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Unreachable(Refused):
    """No answer came that says anything of what lies there; it may be another in `pause` seconds."""

    def __init__(self, message: str, pause: float = _PAUSE) -> None:
        super().__init__(message)
        self.pause = pause


@dataclass
class Headers:
    """What goes with a request, Authorization to no other host than the one that is asked, and what came back."""

    sent: Mapping[str, str] = field(default_factory=dict)
    answer: Mapping[str, str] = field(default_factory=dict)


class NotModified(Exception):
    """What lies there is what it was: the answer to If-None-Match or If-Modified-Since."""


def is_url(text: str) -> bool:
    """Whether it is an address that may be asked."""
    return text.lstrip()[:8].lower() == "https://"


def open_url(
    url: str,
    max_bytes: int,
    seconds: float,
    check: Callable[[], None],
    headers: Headers | None = None,
) -> Iterator[bytes]:
    """What lies at `url`, piece by piece and decompressed, by the SDK's protection against private addresses.

    A busy server, or one that hangs up before it sent anything, is asked once more, all within `seconds`. `check` is
    called four times a second and more, and may raise to end it. Where `headers` ask for a Range, the answer's
    Content-Range says whether that is what comes.

    Raises Refused where it may not be asked, is too large or takes too long, Unreachable or HttpError where no good
    answer came, and NotModified where `headers` asked for no more than that.
    """
    clock = Clock(time.monotonic() + seconds, check)
    headers = headers or Headers()
    pause = 0.0
    for last in (False, True):
        size, answered = 0, False
        try:
            clock.pause(pause)
            with _explained(), _get(url, headers.sent, clock) as (answer, connection):
                if answer.status == 304:
                    raise NotModified
                if answer.status != 200 and not (answer.status == 206 and "Range" in headers.sent):
                    raise _refused(answer)
                answered = True
                headers.answer = _headers(answer)
                if answer.length is not None and answer.length > max_bytes:
                    raise Refused(f"is larger than {max_bytes:,} bytes, the size cap: {answer.length:,} bytes")
                for piece in _decompressed(answer, headers.answer.get("Content-Encoding", "")):
                    clock.look()
                    size += len(piece)
                    if size > max_bytes:
                        raise Refused(f"is larger than {max_bytes:,} bytes")
                    connection.make_room(len(piece))
                    if piece:
                        yield piece
                return
        except TooLate:
            kind = Refused if answered else Unreachable
            raise kind(f"could not be fetched within {seconds:g} seconds") from None
        except Unreachable as error:
            if last or size or error.pause > min(_LONGEST_PAUSE, clock.left()):
                raise
            pause = error.pause


def length_of(headers: Mapping[str, str]) -> int | None:
    """How many bytes a server says that it sends; None where it does not, or compresses them."""
    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and len(length) < 20 and not headers.get("Content-Encoding") else None


def check_public(url: str) -> None:
    """Raise Refused where the host of `url` is in a private network, or is none."""
    from runpod.serverless.utils.rp_ssrf import SSRFError
    from urllib3.util import parse_url

    parts = parse_url(url)
    clock = Clock(math.inf, lambda: None)
    try:
        resolve((parts.host or "").strip("[]"), parts.port or 443, clock)
    except SSRFError as error:
        raise Refused(f"may not be used: {_cut(error)}") from None


class _Address(NamedTuple):
    """An address, read once for all: what is checked is what is dialled and what is asked for."""

    scheme: str
    host: str
    port: int
    request: requests.PreparedRequest

    @classmethod
    def read(cls, url: str, schemes: Collection[str] = _PORTS) -> _Address:
        """Raises Refused where `url` is none, is too long or has another scheme."""
        import requests
        from urllib3.util import parse_url

        if len(url) > _LONGEST_ADDRESS:
            raise Refused(f"could not be fetched: its address has {len(url):,} characters, over {_LONGEST_ADDRESS:,}")
        scheme = url.lstrip().partition(":")[0].lower()
        if scheme not in schemes:
            raise Refused(f"may not be fetched: it leads to the blocked URL scheme {show(scheme)}; https is allowed")
        request = requests.Request("GET", url).prepare()
        parts = parse_url(request.url or "")
        request.headers["Host"] = parts.netloc or ""
        port = _PORTS[scheme] if parts.port is None else parts.port
        return cls(scheme, (parts.host or "").strip("[]"), port, request)

    def ask(self, connection: Connection, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        """The server's answer as far as its headers."""
        if self.scheme == "https":
            connection.encrypt(_authorities(), self.host.rstrip("."))
        line = cast("socket.socket", connection)  # as much of one as http.client needs
        asking = http.client.HTTPConnection(self.host)
        asking.sock = line
        asking.request("GET", self.request.path_url, headers={**_HEADERS, **headers, **self.request.headers})
        answer = http.client.HTTPResponse(line)
        answer.begin()
        return answer

    def redirected(self, location: str) -> _Address:
        """Where `location` leads from here; never from https to http."""
        return _Address.read(urljoin(self.request.url or "", location), ["https"] if self.scheme == "https" else _PORTS)


@contextlib.contextmanager
def _get(url: str, headers: Mapping[str, str], clock: Clock) -> Iterator[tuple[http.client.HTTPResponse, Connection]]:
    """The answer to a GET of `url`, which leads to no private address, also by way of redirects."""
    address = _Address.read(url)
    for _ in range(_REDIRECTS + 1):
        _check_no_proxy(address.request.url or "")
        line = connect(resolve(address.host, address.port, clock), address.port, clock)
        with contextlib.closing(Connection(line, clock)) as connection:
            answer = address.ask(connection, headers)
            if answer.status not in _REDIRECTED:
                yield answer, connection
                return
            location = _headers(answer).get("Location")
        if not location:
            raise Refused("may not be fetched: it leads to a redirect without Location")
        before, address = address, address.redirected(location)
        if address[:3] != before[:3]:  # whoever sends a token has chosen the host
            headers = {name: value for name, value in headers.items() if name != "Authorization"}
    raise Refused(f"may not be fetched: it leads to more than {_REDIRECTS} redirects")


def _check_no_proxy(url: str) -> None:
    """Raise Refused where the environment has a proxy for `url`, which would choose the address that is asked."""
    from requests.utils import get_environ_proxies, select_proxy

    if select_proxy(url, get_environ_proxies(url)):
        raise Refused(
            "may not be fetched: this worker's environment names a proxy for it, and behind one no address is checked; "
            "its operator can name the host in NO_PROXY"
        )


def _authorities() -> str:
    """The file, or the folder, of the certificates that are trusted, as requests finds it."""
    import requests

    verify = requests.Session().merge_environment_settings("", {}, None, None, None)["verify"]
    return verify if isinstance(verify, str) else requests.utils.DEFAULT_CA_BUNDLE_PATH


def _headers(answer: http.client.HTTPResponse) -> Mapping[str, str]:
    """Those of the answer by name in any case; what came more than once, or in several lines, is one value."""
    from urllib3 import HTTPHeaderDict

    return HTTPHeaderDict((name, re.sub(r"[\r\n]+[ \t]*", " ", value)) for name, value in answer.getheaders())


def _cut(error: Exception) -> str:
    return str(error)[:_LONGEST_TEXT]


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Errors of the libraries as sentences."""
    from runpod.serverless.utils.rp_ssrf import SSRFError

    try:
        yield
    except SSRFError as error:
        if isinstance(error.__cause__, OSError):  # of the resolver
            raise Unreachable(f"could not be fetched: {_cut(error)}") from error
        raise Refused(f"may not be fetched: {_cut(error)}") from error
    except ssl.SSLCertVerificationError as error:
        raise Refused("could not be fetched: the server's certificate is not valid (SSLError)") from error
    except ssl.SSLError as error:
        raise Refused("could not be fetched: the server speaks no TLS that is understood here (SSLError)") from error
    except (http.client.InvalidURL, ValueError) as error:
        raise Refused(f"could not be fetched: it is no valid address ({type(error).__name__})") from error
    except TimeoutError as error:
        raise Unreachable(f"could not be fetched: the server said nothing for {SILENCE} seconds") from error
    except (http.client.HTTPException, OSError) as error:
        why = "ConnectionError" if isinstance(error, ConnectionError) else type(error).__name__
        if type(error) is OSError and error.errno:
            why = os.strerror(error.errno)
        raise Unreachable(f"could not be fetched: the server cannot be reached, or hung up ({why})") from error


def _refused(answer: http.client.HTTPResponse) -> Refused:
    """What the server said instead of sending something."""
    status, asked = answer.status, _headers(answer).get("Retry-After", "")
    message = f"could not be fetched: the server answered HTTP {status}"
    if status not in _BUSY:
        return HttpError(message, status)
    return Unreachable(f"{message} and Retry-After: {show(asked)}" if asked else message, _retry_after(asked))


def _retry_after(value: str) -> float:
    """Seconds that `value`, seconds or a date, asks to wait."""
    value = value[:_LONGEST_TEXT].strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):  # years and zones that there are not
        return _PAUSE


def _chunks(answer: http.client.HTTPResponse) -> Iterator[bytes]:
    """The body as it comes; raises IncompleteRead where it ends early."""
    while chunk := answer.read1(_CHUNK):
        yield chunk
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)


def _decompressed(answer: http.client.HTTPResponse, coding: str) -> Iterator[bytes]:
    """The body as it was before the server compressed it, at most _CHUNK at a time; some pieces are empty."""
    chunks = _chunks(answer)
    coding = coding.strip().lower()
    if coding in ("", "identity"):
        yield from chunks
    elif coding in _CODINGS:
        try:
            whole = yield from _CODINGS[coding](chunks)
        except (zlib.error, brotli.error, zstd.ZstdError) as error:
            raise Refused(f"could not be fetched: its bytes are not the {coding} that they are said to be") from error
        if not whole:
            raise Unreachable(f"could not be fetched: it came as {coding} and ended before all of it had come")
    else:
        raise Refused(
            f"could not be fetched: the server sends it with Content-Encoding {show(coding)}, although it was asked "
            f"for it as it is; read is one of {', '.join(_CODINGS)}"
        )


def _gzip(chunks: Iterator[bytes]) -> _Pieces:
    """One member after another; what follows the last and is none, padding say, does not count."""
    unpacker = zlib.decompressobj(31)
    for chunk in chunks:
        left = chunk
        while left:
            if unpacker.eof:
                if left[0] != _GZIP:
                    return True
                unpacker = zlib.decompressobj(31)
            yield unpacker.decompress(left, _CHUNK)
            left = unpacker.unconsumed_tail or unpacker.unused_data
    return (yield from _rest(unpacker))


def _deflate(chunks: Iterator[bytes]) -> _Pieces:
    """A zlib stream, as HTTP has it, or a bare one, as some servers have."""
    start = b""
    for chunk in chunks:
        start += chunk
        if len(start) > 1:
            break
    headed = start[:1] and start[0] & 15 == 8 and int.from_bytes(start[:2]) % 31 == 0
    unpacker = zlib.decompressobj(15 if headed else -15)
    for chunk in itertools.chain([start], chunks):
        left = chunk
        while left and not unpacker.eof:
            yield unpacker.decompress(left, _CHUNK)
            left = unpacker.unconsumed_tail
    return (yield from _rest(unpacker))


def _rest(unpacker: Any) -> _Pieces:
    """What zlib still holds after the last byte came."""
    while piece := unpacker.decompress(b"", _CHUNK):
        yield piece
    return bool(unpacker.eof)


def _brotli(chunks: Iterator[bytes]) -> _Pieces:
    unpacker = brotli.Decompressor()
    for chunk in chunks:
        piece = unpacker.process(chunk, output_buffer_limit=_CHUNK)
        yield piece
        while not unpacker.is_finished() and (piece or not unpacker.can_accept_more_data()):
            piece = unpacker.process(b"", output_buffer_limit=_CHUNK)
            yield piece
    return bool(unpacker.is_finished())


def _zstd(chunks: Iterator[bytes]) -> _Pieces:
    unpacker = zstd.ZstdDecompressor()
    for chunk in chunks:
        left = chunk
        while left or not (unpacker.needs_input or unpacker.eof):
            if unpacker.eof:
                unpacker = zstd.ZstdDecompressor()
            yield unpacker.decompress(left, _CHUNK)
            left = unpacker.unused_data
    return bool(unpacker.eof)


# Content-Encoding, and what reads it; the last two by libraries that the SDK brings.
_CODINGS: Mapping[str, Callable[[Iterator[bytes]], _Pieces]] = MappingProxyType(
    {"gzip": _gzip, "x-gzip": _gzip, "deflate": _deflate, "br": _brotli, "zstd": _zstd}
)
