"""What lies at an address that a client sent, taken for hostile.

Nothing is fetched from private addresses, nothing larger than the caller's cap, and nothing past its deadline.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import brotli
from backports import zstd

from src import __version__
from src.errors import Refused
from src.wording import show

if TYPE_CHECKING:
    import requests

_CHUNK = 65_536  # bytes
_TIMEOUT = 10  # seconds without a word from the server
_BUSY = (429, 500, 502, 503, 504)  # asked once more
_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds before that: where the server names none, and the most that it may name
_REDIRECTS = 5
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": f"flux-worker/{__version__}"}
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
    return text.lstrip().lower().startswith("https://")


def open_url(
    url: str,
    max_bytes: int,
    seconds: float,
    check: Callable[[], None],
    headers: Headers | None = None,
) -> Iterator[bytes]:
    """What lies at `url`, piece by piece and decompressed, by the SDK's protection against private addresses.

    A busy server, or one that hangs up before it sent anything, is asked once more. `check` may raise to end it.

    Raises Refused where it may not be asked, is too large or takes too long, Unreachable or HttpError where no good
    answer came, and NotModified where `headers` asked for no more than that.
    """
    deadline = time.monotonic() + seconds
    headers = headers or Headers()
    for last in (False, True):
        size = 0
        try:
            with _explained(), _get(url, max_bytes, headers.sent) as answer:
                if answer.status_code == 200:
                    headers.answer = answer.headers
                    for piece in _decompressed(answer):
                        check()
                        size += len(piece)
                        if size > max_bytes:
                            raise Refused(f"is larger than {max_bytes:,} bytes")
                        if time.monotonic() > deadline:
                            raise Refused(f"could not be fetched within {seconds:g} seconds")
                        if piece:
                            yield piece
                    return
                if answer.status_code == 304:
                    raise NotModified
                raise _refused(answer)
        except Unreachable as error:
            if last or size or error.pause > min(_LONGEST_PAUSE, deadline - time.monotonic()):
                raise
            pause = error.pause
        _wait(pause, check)


def _get(url: str, max_bytes: int, headers: Mapping[str, str]) -> requests.Response:
    """The answer to a GET of `url`, which leads to no private address, also by way of redirects."""
    import requests
    from runpod.serverless.utils.rp_ssrf import safe_get
    from urllib3.util import parse_url  # as it is dialled; urllib.parse reads some addresses otherwise

    sent = {**_HEADERS, **headers}
    host = parse_url(url).host
    for _ in range(_REDIRECTS if "Authorization" in headers else 0):
        # The SDK would hand the token on to wherever it is led. Who sends one has chosen the host.
        answer = requests.get(url, headers=sent, allow_redirects=False, stream=True, timeout=_TIMEOUT)
        if not answer.is_redirect:
            return answer
        answer.close()
        url = urljoin(url, answer.headers["Location"])
        if not is_url(url) or parse_url(url).host != host:
            break
    sent.pop("Authorization", None)
    return safe_get(url, timeout=_TIMEOUT, max_bytes=max_bytes, headers=sent)  # type: ignore[no-any-return]


def check_public(url: str) -> None:
    """Raise Refused where the host of `url` is in a private network, or is none."""
    from runpod.serverless.utils.rp_ssrf import SSRFError, resolve_and_validate
    from urllib3.util import parse_url

    parts = parse_url(url)
    try:
        resolve_and_validate(parts.host or "", parts.port or 443)
    except SSRFError as error:
        raise Refused(f"may not be used: {error}") from None


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Errors of the libraries as sentences."""
    import requests
    import urllib3
    from runpod.serverless.utils.rp_ssrf import SSRFError

    try:
        yield
    except SSRFError as error:
        if isinstance(error.__cause__, OSError):  # of the resolver
            raise Unreachable(f"could not be fetched: {error}") from error
        raise Refused(f"may not be fetched: {error}") from error
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, ValueError) as error:
        raise Refused(f"could not be fetched: it is no valid address ({type(error).__name__})") from error
    except requests.exceptions.SSLError as error:
        raise Refused("could not be fetched: the server's certificate is not valid (SSLError)") from error
    except (requests.exceptions.Timeout, TimeoutError, urllib3.exceptions.TimeoutError) as error:
        raise Unreachable(f"could not be fetched: the server said nothing for {_TIMEOUT} seconds") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        kind = type(error).__name__
        raise Unreachable(f"could not be fetched: the server cannot be reached, or hung up ({kind})") from error


def _refused(answer: requests.Response) -> Refused:
    """What the server said instead of sending something."""
    status, asked = answer.status_code, answer.headers.get("Retry-After", "")
    message = f"could not be fetched: the server answered HTTP {status}"
    if status not in _BUSY:
        return HttpError(message, status)
    return Unreachable(f"{message} and Retry-After: {show(asked)}" if asked else message, _retry_after(asked))


def _retry_after(value: str) -> float:
    """Seconds that `value`, seconds or a date, asks to wait."""
    value = value.strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return _PAUSE
    return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _wait(seconds: float, check: Callable[[], None]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        check()
        time.sleep(min(left, 0.1))
    check()


def _decompressed(answer: requests.Response) -> Iterator[bytes]:
    """The body as it was before the server compressed it, at most _CHUNK at a time; some pieces are empty."""
    # What has come, and no more: a dripping server must not outlast the deadline.
    chunks = iter(lambda: answer.raw.read1(_CHUNK, decode_content=False), b"")
    coding = answer.headers.get("Content-Encoding", "").strip().lower()
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
