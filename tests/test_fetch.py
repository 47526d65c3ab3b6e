"""What lies at an address: compressed, from busy servers, by way of others; over real HTTPS."""

from __future__ import annotations

import errno
import gzip
import os
import random
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from typing import Any

import brotli
import pytest
from backports import zstd

from src.errors import Cancelled, Refused
from src.request import connection
from src.request.fetch import Headers, HttpError, NotModified, Unreachable, check_public, open_url
from tests.web import Behaviour, Page, Web, open_web

BODY = bytes(range(256)) * 1_000
BUSY = Page(status=503, headers={"Retry-After": "0"})


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with open_web(tmp_path, monkeypatch, "files.test", "others.test") as web:
        yield web


def get_within(seconds: float, url: str, check: Callable[[], None] = lambda: None) -> bytes:
    return b"".join(open_url(url, 1_000_000, seconds, check))


def get(url: str, most: int = 1_000_000, headers: Headers | None = None) -> bytes:
    return b"".join(open_url(url, most, 30, lambda: None, headers))


def bare(data: bytes) -> bytes:
    return zlib.compress(data)[2:-4]


def halves(data: bytes) -> bytes:
    """As two members, and padding behind them."""
    return gzip.compress(data[:1_000]) + gzip.compress(data[1_000:]) + bytes(64)


CODINGS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress), ("X-GZIP", gzip.compress), ("gzip", halves), ("deflate", zlib.compress),
    ("deflate", bare), ("br", brotli.compress), ("zstd", zstd.compress),
]  # fmt: skip


@pytest.mark.parametrize(("coding", "compress"), CODINGS)
def test_what_comes_compressed_is_read_within_the_cap(
    web: Web, coding: str, compress: Callable[[bytes], bytes]
) -> None:
    sent = {"Content-Encoding": coding}
    assert get(web.put("files.test/whole", Page(compress(BODY), headers=sent))) == BODY
    pieces: list[bytes] = []
    with pytest.raises(Refused, match=r"larger than 1,000,000 bytes"):
        pieces.extend(
            open_url(
                web.put("files.test/bomb", Page(compress(bytes(20_000_000)), headers=sent)), 10**6, 30, lambda: None
            )
        )
    assert max(map(len, pieces)) < 200_000, "in steps, not all of it before it is counted"
    for cut in (1, len(compress(BODY)) // 2) if compress is not halves else (len(compress(BODY)) // 2,):
        with pytest.raises(Unreachable, match="ended before all of it had come"):
            get(web.put("files.test/cut", Page(compress(BODY)[:cut], headers=sent)))
    with pytest.raises(Refused, match=f"not the {coding.lower()} that they are said to be"):
        get(web.put("files.test/wrong", Page(b"<!DOCTYPE html> \xff\xff" * 100, headers=sent)))


@pytest.mark.parametrize("coding", ["gzip, br", "compress", "gzip,gzip", "what" * 100])
def test_other_codings_are_refused_by_name(web: Web, coding: str) -> None:
    url = web.put("files.test/x", Page(BODY, headers={"Content-Encoding": coding}))
    with pytest.raises(Refused, match=f"Content-Encoding '{coding[:5]}.*read is one of gzip, x-gzip, deflate"):
        get(url)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_once_more(web: Web, status: int) -> None:
    soon = format_datetime(datetime.now(UTC) - timedelta(seconds=1), usegmt=True)
    for wait in ("0", soon, "soon", "", "0.1"):
        url = web.put("files.test/x", Page(status=status, headers={"Retry-After": wait}), Page(BODY))
        assert get(url) == BODY
    web.asked.clear()
    with pytest.raises(Unreachable, match=f"the server answered HTTP {status}"):
        get(web.put("files.test/x", Page(status=status)))
    assert len(web.asked) == 2


def test_a_server_that_wants_to_be_left_alone_for_long_is(web: Web) -> None:
    later = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    for wait in ("3600", "99999999", later):
        web.asked.clear()
        with pytest.raises(Unreachable, match=f"HTTP 503 and Retry-After: '{wait}'"):
            get(web.put("files.test/x", Page(status=503, headers={"Retry-After": wait}), Page(BODY)))
        assert len(web.asked) == 1


def test_a_job_that_is_cancelled_does_not_wait(web: Web) -> None:
    started = time.monotonic()

    def stop() -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        list(open_url(web.put("files.test/x", Page(status=503, headers={"Retry-After": "9"})), 99, 30, stop))
    assert time.monotonic() - started < 5


def test_a_connection_that_broke_is_tried_once_more_unless_something_came(web: Web) -> None:
    assert get(web.put("files.test/x", Page(hangs_up=True), Page(BODY))) == BODY
    with pytest.raises(Unreachable, match=r"cannot be reached, or hung up \(ConnectionError\)"):
        get(web.put("files.test/x", Page(hangs_up=True)))
    web.asked.clear()
    with pytest.raises(Unreachable, match="or hung up"):
        get(web.put("files.test/x", Page(BODY, headers={"Content-Length": "999999"}), Page(BODY)))
    assert len(web.asked) == 1
    with pytest.raises(Unreachable, match=r"could not resolve host 'nowhere\.invalid'"):
        get("https://nowhere.invalid/x")


def test_what_is_not_there_is_asked_for_once(web: Web) -> None:
    with pytest.raises(HttpError, match="the server answered HTTP 404") as caught:
        get(web.url("files.test/x"))
    assert (caught.value.status, len(web.asked)) == (404, 1)


def test_what_is_as_it_was_is_not_sent_again(web: Web) -> None:
    url = web.put("files.test/x", Page(BODY, headers={"ETag": '"1"'}))
    headers = Headers()
    assert get(url, headers=headers) == BODY
    with pytest.raises(NotModified):
        get(url, headers=Headers({"If-None-Match": headers.answer["etag"]}))


def test_a_token_is_for_the_host_that_is_asked_alone(web: Web) -> None:
    there = web.put("others.test/file", BODY)
    web.put("files.test/next", Page(status=302, headers={"Location": there}))
    url = web.put("files.test/x", Page(status=307, headers={"Location": "/next"}))
    assert get(url, headers=Headers({"Authorization": "Bearer secret"})) == BODY
    assert [(path, "Authorization" in headers) for path, headers in web.asked] == [
        ("files.test/x", True), ("files.test/next", True), ("others.test/file", False)
    ]  # fmt: skip


# Servers that never end

WITHOUT_TLS = {"no handshake", "handshake", "no TLS"}
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


def sends(data: bytes, then: bytes = b"", every: float = 0.05, step: int = 1) -> Behaviour:
    """`data` at once, and `then` over and over, `step` bytes at a time."""

    def behave(line: socket.socket) -> None:
        hear(line)
        line.sendall(data)
        while then:
            for i in range(0, len(then), step):
                line.sendall(then[i : i + step])
                time.sleep(every)
        line.recv(1)

    return behave


def floods(data: bytes, then: bytes) -> Behaviour:
    return sends(data, then * (100_000 // len(then) + 1), every=0, step=200_000)


def coded(coding: str) -> bytes:
    return OK + f"Content-Encoding: {coding}\r\n\r\n".encode()


def hear(line: socket.socket) -> None:
    """The question, as far as its headers."""
    question = b""
    while b"\r\n\r\n" not in question and (piece := line.recv(65_536)):
        question += piece


def answers(data: bytes) -> Behaviour:
    def behave(line: socket.socket) -> None:
        hear(line)
        line.sendall(data)

    return behave


def says_nothing(line: socket.socket) -> None:
    while line.recv(65_536):
        pass


def drips_a_handshake(line: socket.socket) -> None:
    line.recv(65_536)
    for byte in b"\x16\x03\x03\x40\x00" + bytes(16_384):
        line.sendall(bytes([byte]))
        time.sleep(0.05)


def by_hand(context: ssl.SSLContext, send: Callable[[socket.socket, bytes], None], answer: bytes) -> Behaviour:
    """A server whose TLS is made in memory: `send` has what it says, in the handshake (at once) and after it."""

    def behave(line: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)
        works: list[Callable[[], object]] = [tls.do_handshake, tls.read, partial(tls.write, answer)]
        while works:
            try:
                works[0]()
                works.pop(0)
            except ssl.SSLWantReadError:
                send(line, outgoing.read())
                if not (data := line.recv(65_536)):
                    return
                incoming.write(data)
        send(line, outgoing.read())

    return behave


def drips_records(context: ssl.SSLContext) -> Behaviour:
    """A good handshake; then what is within TLS comes in one record, byte by byte."""

    def send(line: socket.socket, data: bytes) -> None:
        step = len(data) if len(data) < 10_000 else 1
        for i in range(0, len(data), max(1, step)):
            line.sendall(data[i : i + step])
            time.sleep(0.05)

    return by_hand(context, send, OK + bytes(10_000))


def drips_blanks(line: socket.socket) -> None:
    while True:
        line.sendall(b" ")
        time.sleep(0.05)


# What lasts for ever, at few bytes a second.
DRIPPING: dict[str, Behaviour] = {
    "no handshake": says_nothing,
    "handshake": drips_a_handshake,
    "no answer": says_nothing,
    "status line": sends(b"HTTP/1.1 200 ", b"O"),
    "words before the status": sends(b"", b" "),
    "header": sends(OK + b"X-Slow: ", b"a"),
    "headers": sends(OK, b"a: b\r\n"),
    "folded header": sends(OK + b"X-Slow: a\r\n", b" b\r\n"),
    "100 Continue": sends(b"", b"HTTP/1.1 100 Continue\r\n\r\n", step=25),
    "headers of 100 Continue": sends(b"HTTP/1.1 100 Continue\r\n", b"a: b\r\n"),
    "body": sends(OK + b"Content-Length: 9999\r\n\r\n", b"."),
    "body without length": sends(OK + b"\r\n", b"."),
    "size of a chunk": sends(CHUNKED, b"0"),
    "extension of a chunk": sends(CHUNKED + b"5;", b"a"),
    "chunks": sends(CHUNKED, b"1\r\n.\r\n"),
    "end of a chunk": sends(CHUNKED + b"1\r\n."),
    "trailer": sends(CHUNKED + b"0\r\n", b"a"),
    "trailers": sends(CHUNKED + b"0\r\n", b"a: b\r\n"),
    "header of gzip": sends(coded("gzip") + b"\x1f\x8b\x08\x08" + bytes(6), b"a"),
    "members of gzip": sends(coded("gzip"), gzip.compress(b"")),
    "blocks of deflate": sends(coded("deflate"), b"\0\0\0\xff\xff"),
    "frames of zstd": sends(coded("zstd"), zstd.compress(b"")),
    "headers of a redirect": sends(b"HTTP/1.1 302 Found\r\n", b"a: b\r\n"),
    "headers of a busy server": sends(b"HTTP/1.1 503 Busy\r\n", b"a: b\r\n"),
    "no TLS": drips_blanks,
}  # fmt: skip
ANSWERED = {kind for kind in DRIPPING if re.search("body|chunk|trailer|gzip|deflate|zstd|no TLS", kind)}
# What never ends at full speed.
FLOODS: dict[str, Behaviour] = {
    "status line": floods(b"HTTP/1.1 200 ", b"O"),
    "header": floods(OK + b"X: ", b"a"),
    "headers": floods(OK, b"a: b\r\n"),
    "100 Continue": floods(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "size of a chunk": floods(CHUNKED, b"0"),
    "extensions of chunks": floods(CHUNKED, b"1;" + b"a" * 1_000 + b"\r\n.\r\n"),
    "chunks of a byte": floods(CHUNKED, b"1\r\n.\r\n"),
    "trailers": floods(CHUNKED + b"0\r\n", b"a: b\r\n"),
    "empty members of gzip": floods(coded("gzip"), gzip.compress(b"")),
    "name in gzip": floods(coded("gzip") + b"\x1f\x8b\x08\x08" + bytes(6), b"a"),
    "empty blocks of deflate": floods(coded("deflate"), b"\0\0\0\xff\xff"),
    "empty frames of zstd": floods(coded("zstd"), zstd.compress(b"")),
    "skipped frames of zstd": floods(coded("zstd"), b"\x50\x2a\x4d\x18\x04\0\0\0skip"),
    "empty blocks of brotli": floods(coded("br") + b"\x0b", b"\x06" * 100),
    "zeros in gzip": floods(coded("gzip"), gzip.compress(bytes(10_000_000))),
    "zeros in zstd": floods(coded("zstd"), zstd.compress(bytes(100_000_000))),
    "body": floods(OK + b"\r\n", b"." * 1_000),
    "redirects": floods(b"HTTP/1.1 302 Found\r\nLocation: /on\r\n\r\n", b"." * 1_000),
}


def left_behind() -> tuple[int, int]:
    """Threads that are not the servers', and open files."""
    return sum(thread.name != "web" for thread in threading.enumerate()), len(os.listdir("/proc/self/fd"))


@pytest.fixture
def nothing_is_left(web: Web) -> Iterator[None]:
    with suppress(Refused):
        get(web.url("files.test/warm"))
    wait_for(lambda: not any("process_request" in thread.name for thread in threading.enumerate()))
    before = left_behind()
    started = len(web.listeners)
    yield
    wait_for(lambda: left_behind() == (before[0], before[1] + len(web.listeners) - started))


def wait_for(done: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not done() and time.monotonic() < until:
        time.sleep(0.02)
    assert done()


def fetch_all(urls: dict[str, str], seconds: float, check: Callable[[], None]) -> dict[str, tuple[float, Exception]]:
    """All at once: after how long each ended, and by what."""

    def fetch(url: str) -> tuple[float, Exception]:
        started = time.monotonic()
        try:
            list(open_url(url, 10**9, seconds, check))
        except Exception as error:  # noqa: BLE001 - that is asked
            return time.monotonic() - started, error
        raise AssertionError(url)

    with ThreadPoolExecutor(len(urls)) as pool:
        return dict(zip(urls, pool.map(fetch, urls.values()), strict=True))


@pytest.fixture
def dripping(web: Web) -> dict[str, str]:
    urls = {kind: web.behave("files.test/x", how, kind not in WITHOUT_TLS) for kind, how in DRIPPING.items()}
    return {**urls, "TLS records": web.behave("files.test/x", drips_records(web.context), tls=False)}


@pytest.mark.usefixtures("nothing_is_left")
def test_servers_that_drip_are_left_at_the_deadline(dripping: dict[str, str]) -> None:
    for kind, (seconds, error) in fetch_all(dripping, 1, lambda: None).items():
        assert isinstance(error, Refused), kind
        assert seconds < 2, kind
        assert ("no TLS that is" if kind == "no TLS" else "within 1 seconds") in str(error), (kind, error)
        assert isinstance(error, Unreachable) == (kind not in ANSWERED), kind


@pytest.mark.usefixtures("nothing_is_left")
def test_servers_that_drip_are_left_when_the_job_ends(dripping: dict[str, str]) -> None:
    del dripping["no TLS"]
    until = time.monotonic() + 1

    def stop() -> None:
        if time.monotonic() > until:
            raise Cancelled("enough")

    for kind, (seconds, error) in fetch_all(dripping, 60, stop).items():
        assert isinstance(error, Cancelled), (kind, error)
        assert seconds < 2, kind


@pytest.mark.parametrize("kind", FLOODS)
@pytest.mark.usefixtures("nothing_is_left")
def test_a_flood_that_brings_no_file_is_refused(web: Web, kind: str) -> None:
    url = web.behave("files.test/x", FLOODS[kind])
    started = time.monotonic()
    with pytest.raises(Refused):
        list(open_url(url, 20_000_000, 60, lambda: None))
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("nothing_is_left")
def test_a_name_that_is_never_resolved_is_waited_for_by_nobody(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    answered, resolve = threading.Event(), socket.getaddrinfo
    count, most = [0, 0], threading.Lock()

    def hang(host: Any, *rest: Any, **options: Any) -> Any:
        if host != "hangs.test":
            return resolve(host, *rest, **options)
        with most:
            count[:] = [count[0] + 1, max(count[1], count[0] + 1)]
        answered.wait(30)
        with most:
            count[0] -= 1
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    monkeypatch.setattr(connection, "_looking_up", threading.BoundedSemaphore(4))
    urls = {str(i): f"https://hangs.test/{i}" for i in range(6)}
    try:
        for seconds, error in fetch_all(urls, 0.5, lambda: None).values():
            assert seconds < 1.5
            assert isinstance(error, Unreachable)
            assert "within 0.5 seconds" in str(error)
        started = time.monotonic()

        def stop() -> None:
            if time.monotonic() - started > 0.2:
                raise Cancelled("enough")

        with pytest.raises(Cancelled):
            get_within(30, "https://hangs.test/x", stop)
        assert time.monotonic() - started < 1.2
        assert count == [4, 4], "no more than may hang at once"
    finally:
        answered.set()
    wait_for(lambda: count[0] == 0)
    assert get(web.put("files.test/x", BODY)) == BODY


@pytest.fixture
def dead(web: Web) -> Iterator[int]:
    """The port at which 127.0.0.2 to 127.0.0.5 never answer: their queues are full. 127.0.0.6 has a good server."""
    with ExitStack() as stack:
        port = 0
        for last in range(2, 6):
            listener = stack.enter_context(socket.socket())
            listener.bind((f"127.0.0.{last}", port))
            listener.listen(0)
            port = listener.getsockname()[1]
            for _ in range(3):
                caller = stack.enter_context(socket.socket())
                caller.setblocking(False)
                caller.connect_ex((f"127.0.0.{last}", port))
        good = socket.create_server(("127.0.0.6", port))
        web.serve(good, answers(OK + b"\r\nhello"))
        yield port


@pytest.mark.usefixtures("nothing_is_left")
def test_dead_addresses_of_a_name_share_one_time_out(web: Web, dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    web.addresses["files.test"] = [f"127.0.0.{i}" for i in range(2, 6)]
    url = f"https://files.test:{dead}/x"
    ((seconds, error),) = fetch_all({"": url}, 1, lambda: None).values()
    assert seconds < 2
    assert isinstance(error, Unreachable)
    monkeypatch.setattr(connection, "SILENCE", 1)
    ((seconds, error),) = fetch_all({"": url}, 60, lambda: None).values()
    assert "said nothing" in str(error)
    assert seconds < 4, "asked twice"
    web.addresses["files.test"].append("127.0.0.6")
    assert get(url) == b"hello"


# Addresses that may not be asked

PRIVATE = [
    "127.0.0.1", "127.1.2.3", "0.0.0.0",  # noqa: S104
    "0.1.2.3", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1",
    "169.254.169.254", "169.254.0.1", "100.64.0.1", "100.100.100.200", "100.127.255.255", "192.0.0.1", "192.0.0.8",
    "192.0.0.9", "192.0.0.170", "192.0.2.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "192.88.99.1", "224.0.0.1",
    "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16",
    "::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:192.0.0.5",
    "::ffff:0:10.0.0.1", "64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b:1::1", "64:ff9b:1::10.0.0.1", "100::1",
    "2001::1", "2001:0:a9fe:a9fe::1", "2001:0:808:808::f5ff:fffe", "2001:db8::1", "2001:10::1", "2001:2::1",
    "2002:7f00:1::", "2002:a00:1::1", "2002:c0a8:101::1", "2002:a9fe:a9fe::1", "2002:6440:1::", "2002:c000:1::",
    "2002:e000:1::", "3fff::1", "3fff:fff::1", "4000::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%1",
    "febf::1", "fec0::1", "fec0::10.0.0.1", "feff::1", "ff02::1", "ff0e::1",
    "2606:4700::5efe:10.0.0.1", "2606:4700::200:5efe:127.0.0.1",
]  # fmt: skip
PUBLIC = [
    "1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.1", "172.32.0.1", "192.0.1.1", "192.167.1.1", "198.17.0.1",
    "2606:4700:4700::1111", "2001:4860:4860::8888", "2a00:1450::1", "2002:808:808::1", "::ffff:8.8.8.8",
    "2606:4700::5efe:8.8.8.8",
]  # fmt: skip
SPELLINGS = [
    "2130706433", "0x7f000001", "0x7F.1", "0177.0.0.1", "017700000001", "127.1", "0", "0x0", "3232235777", "0xa9fea9fe",
    "2852039166", "0251.0376.0251.0376", "10.1", "127.0.0.1.", "localhost", "LOCALHOST", "localhost.", "a.localhost",
    "\u2460\u2461\u2466.0.0.1", "\uff11\uff12\uff17.0.0.1", "127\u30020\u30020\u30021", "127\uff0e0\uff0e0\uff0e1",
    "[::ffff:7f00:1]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]", "[fe80::1%25lo]", "[fe80::1%lo]",
    "user@127.0.0.1", "user:password@127.0.0.1", "1.1.1.1@127.0.0.1", "1.1.1.1:443@127.0.0.1", "1.1.1.1%40127.0.0.1",
    "1.1.1.1\\@127.0.0.1", "127.0.0.1\\@1.1.1.1", "127.0.0.1#@1.1.1.1", "127.0.0.1?@1.1.1.1", "127.0.0.1%00.1.1.1.1",
    "1.1.1.1 @127.0.0.1", "1.1.1.1\t@127.0.0.1", "127.0.0.1:99999", "127.0.0.1:0x1", "-127.0.0.1", "[127.0.0.1]",
    "[::1", "::1", "%31%32%37.0.0.1", "127.0.0.1:\u0668", "\u00ad127.0.0.1", "127.0.0.1\u200b", "\u2025", "xn--",
    "a" * 64 + ".test", ".".join("a" * 9), "a." * 9_000, "\u00fc" * 9_000, "\u00fc" * 70, "a" * 20_000, "a..b", ".",
    "..", "*.test",
]  # fmt: skip


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[str]]]:
    """What names resolve to, one after the other; of others only numbers are read."""
    found: dict[str, list[list[str]]] = {}
    resolve = socket.getaddrinfo

    def local(host: Any, *rest: Any, **options: Any) -> Any:
        there = found.get(host, [[host]])
        addresses = there.pop(0) if len(there) > 1 else there[0]
        options["flags"] = socket.AI_NUMERICHOST
        return [info for address in addresses for info in resolve(address, *rest, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", local)
    return found


def refuses(code: int, asked: list[object]) -> type[socket.socket]:
    """Sockets whose connections fail by errno `code`."""

    def connect_ex(_: socket.socket, address: object) -> int:
        asked.append(address)
        return code

    return type("Line", (socket.socket,), {"connect_ex": connect_ex})


@pytest.fixture
def never_connects(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    asked: list[object] = []
    monkeypatch.setattr("src.request.connection.socket.socket", refuses(errno.ECONNREFUSED, asked))
    return asked


def as_host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused_by_number_and_by_name(
    address: str, names: dict[str, list[list[str]]], never_connects: list[object]
) -> None:
    names["inside.test"] = [[address]]
    names["mixed.test"] = [["8.8.8.8", address]]
    for host in (as_host(address), "inside.test", "mixed.test"):
        for port in ("", ":8443"):
            url = f"https://{host}{port}/x"
            with pytest.raises(Refused, match=r"may not be fetched: host '.*' resolves to non-public address"):
                get_within(5, url)
            with pytest.raises(Refused, match=r"may not be used: host '.*' resolves to non-public address"):
                check_public(url)
    assert not never_connects


@pytest.mark.parametrize("host", SPELLINGS)
def test_no_spelling_leads_to_a_private_address(
    host: str, names: dict[str, list[list[str]]], never_connects: list[tuple[str, int]]
) -> None:
    names.update({name: [["127.0.0.1"]] for name in ("localhost", "localhost.", "a.localhost")})
    started = time.monotonic()
    with pytest.raises(Refused) as caught:
        get_within(5, f"https://{host}/x")
    assert time.monotonic() - started < 2
    assert len(str(caught.value)) < 500
    assert all(address == "1.1.1.1" for address, _ in never_connects)


def test_any_text_is_a_public_address_or_refused(
    names: dict[str, list[list[str]]], never_connects: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.request.connection.Clock.pause", lambda *_: None)
    names["localhost"] = [["127.0.0.1"]]
    chance = random.Random(13)
    parts = [
        "https://", "127.0.0.1", "1.1.1.1", "[::1]", "@", ":", "/", "?", "#", "\\", "%", "[", "]", ".", "0x7f", "443",
        "user", "\u00fc", "\u3002", "\ud800", "\0", " ", "\t", "\r\n", "localhost", "xn--", "-", "a" * 70,
    ]  # fmt: skip
    for _ in range(2_000):
        url, said = "https://" + "".join(chance.choices(parts, k=chance.randrange(1, 9))), ""
        try:
            list(open_url(url, 10, 20, lambda: None))
        except Refused as error:
            said = str(error)
        except Exception as error:
            raise AssertionError(ascii(url)) from error
        assert 0 < len(said) < 500, ascii(url)
    assert {address for address, _ in never_connects} == {"1.1.1.1"}


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_asked(
    address: str, names: dict[str, list[list[str]]], never_connects: list[object]
) -> None:
    names["public.test"] = [[address]]
    for host in (as_host(address), "public.test"):
        with pytest.raises(Unreachable, match="cannot be reached"):
            get_within(0.2, f"https://{host}/x")
        check_public(f"https://{host}/x")
    assert never_connects


def test_a_name_that_changes_is_asked_where_it_was_looked_at(
    names: dict[str, list[list[str]]], never_connects: list[object]
) -> None:
    names["rebinds.test"] = [["8.8.8.8"], ["127.0.0.1"]]
    with pytest.raises(Refused, match="non-public"):
        get_within(5, "https://rebinds.test/x")
    assert never_connects == [("8.8.8.8", 443)]


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENETUNREACH, "hung up (Network is unreachable)"), (errno.ECONNREFUSED, "(ConnectionError)")],
)
def test_a_worker_without_a_way_out_says_so(code: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.request.connection.socket.socket", refuses(code, []))
    with pytest.raises(Unreachable, match=re.escape(message)):
        get_within(0.3, "https://1.1.1.1/x")


def test_a_worker_without_a_resolver_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(Unreachable, match=r"could not resolve host 'files\.test': .*Temporary failure"):
        get_within(0.3, "https://files.test/x")


# Redirects


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://files.test/x", "may not be fetched: it leads to the blocked URL scheme 'http'; https is allowed"),
        ("HTTP://files.test/x", "blocked URL scheme 'http'"), ("//127.0.0.1/x", "non-public address 127.0.0.1"),
        ("file:///etc/passwd", "blocked URL scheme 'file'"), ("ftp://files.test/x", "blocked URL scheme 'ftp'"),
        ("gopher://127.0.0.1:6379/_", "blocked URL scheme 'gopher'"), ("data:image/png;base64,AAAA", "scheme 'data'"),
        ("javascript:alert(1)", "blocked URL scheme 'javascript'"), ("unix:///run/docker.sock", "scheme 'unix'"),
        *((f"https://{host}/x", "non-public address") for host in (
            "127.0.0.1", "169.254.169.254", "2130706433", "0x7f.1", "0177.0.0.1", "localhost.", "u:p@10.0.0.1", "[::1]",
            "[fec0::1]", "[2002:7f00:1::]", "192.0.0.8", "[64:ff9b::10.0.0.1]", "[::ffff:10.0.0.1]", "100.64.0.1",
        )),
        ("https://[::1", "no valid address"), ("https://files.test:99999/", "no valid address"),
        ("https://%00/", "no valid address"), ("", "without Location"),
        ("/" + "x" * 20_000, "its address has 20,0.. characters"), ("/x", "more than 5 redirects"),
    ],
)  # fmt: skip
def test_a_redirect_leads_nowhere_that_may_not_be_asked(
    web: Web, monkeypatch: pytest.MonkeyPatch, location: str, reason: str
) -> None:
    def behave(line: socket.socket) -> None:
        hear(line)
        if location != "/x":  # this server was the last that is allowed
            monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "false")
        line.sendall(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\n\r\n".encode())

    with pytest.raises(Refused, match=reason) as caught:
        get_within(10, web.behave("files.test/x", behave))
    assert len(str(caught.value)) < 500


def test_redirects_within_https_are_followed(web: Web) -> None:
    web.put("others.test/file", BODY)
    web.put("files.test/a/c", Page(status=308, headers={"Location": web.url("others.test/file")}))
    web.put("files.test/a/b", Page(status=303, headers={"Location": "c"}))
    url = web.put("files.test/x", Page(status=301, headers={"Location": "//files.test:" + f"{web.port}/a/b"}))
    assert get(url) == BODY
    assert web.paths() == ["files.test/x", "files.test/a/b", "files.test/a/c", "others.test/file"]


def test_a_token_is_for_the_port_that_is_asked_alone(web: Web) -> None:
    question: list[bytes] = []

    def behave(line: socket.socket) -> None:
        question.append(line.recv(65_536))
        line.sendall(OK + b"\r\nhello")

    there = web.behave("files.test/x", behave)
    url = web.put("files.test/x", Page(status=302, headers={"Location": there}))
    assert get(url, headers=Headers({"Authorization": "Bearer secret", "If-None-Match": '"1"'})) == b"hello"
    assert b"secret" not in question[0]
    assert b'If-None-Match: "1"' in question[0]


def test_a_name_and_password_in_an_address_are_for_its_host_alone(web: Web) -> None:
    there = web.put("others.test/file", BODY)
    url = web.put("files.test/x", Page(status=302, headers={"Location": there}))
    assert get(url.replace("https://", "https://name:word@")) == BODY
    assert [headers.get("Authorization") for _, headers in web.asked] == ["Basic bmFtZTp3b3Jk", None]


def test_a_host_with_a_dot_at_its_end_is_the_same(web: Web) -> None:
    web.addresses["files.test."] = ["127.0.0.1"]
    url = web.put("files.test./x", BODY)
    assert get(url) == BODY


def test_an_address_of_another_name_is_refused_by_its_certificate(web: Web) -> None:
    web.addresses["wrong.test"] = ["127.0.0.1"]
    with pytest.raises(Refused, match="the server's certificate is not valid"):
        get(web.put("wrong.test/x", BODY))


def test_nothing_is_asked_by_a_proxy(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:word@10.0.0.1:3128")
    url = web.put("files.test/x", BODY)
    with pytest.raises(Refused, match="names a proxy for it") as caught:
        get(url)
    assert "word" not in str(caught.value)
    monkeypatch.setenv("NO_PROXY", "files.test")
    assert get(url) == BODY


# Anything at all as an answer

STATUS = [b"HTTP/1.1 200 OK", b"HTTP/1.0 200", b"HTTP/1.1 304 Same", b"HTTP/1.1 503 Busy", b"HTTP/1.1 302 Found",
          b"HTTP/1.1 100 Go on\r\n\r\nHTTP/1.1 200 OK", b"HTTP/1.1 204", b"HTTP/2 200", b"ICY 200 OK", b"HTTP/1.1 999",
          b"HTTP/1.1 \xb2\xb2\xb2", b""]  # fmt: skip
LINES = [
    b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: " + b"9" * 5_000, b"Content-Length: 1_0",
    b"Content-Length: \xb2", b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Location: /x",
    b"Location: https://[", b"Location: file:///x", b"Location: \xff\xfe", b"Location:", b"Retry-After: 0",
    b"Retry-After: Mon, 01 Jan 99999 00:00:00 GMT", b"Retry-After: Mon, 01 Jan 0001 00:00:00 +9999",
    b"Retry-After: Mon, 01 Jan 2001 00:00:00 +" + b"9" * 40, b"Retry-After: " + b"9" * 5_000, b"Retry-After: \xb2",
    b"Retry-After: -1", b"Retry-After: Mon, 99 Foo 20 99:99:99", b"ETag: a\r\n b", b"ETag: \0", b": nothing", b"x",
    b" folded", b"\0\0: \0", b"Content-Encoding: gzip", b"Content-Encoding: br", b"Content-Encoding: zstd",
    b"Content-Encoding: deflate", b"Content-Encoding: \xff", b"Content-Encoding: gzip\r\nContent-Encoding: gzip",
    b"Connection: keep-alive", b"Keep-Alive: x", b"a: b\r\n" * 120 + b"c: d", b"X: " + b"a" * 70_000,
]  # fmt: skip
BODIES = [
    b"", b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"-5\r\nhello", b"0x5\r\nhello\r\n0\r\n\r\n",
    b"f" * 5_000 + b"\r\nhello", b"5;a=b\r\nhello\r\n0\r\na: b\r\n\r\n", b"\r\n", b"5\r\nhel", b"0",
    gzip.compress(b"hello"), gzip.compress(b"hello") * 2, zlib.compress(b"hello"), brotli.compress(b"hello"),
    zstd.compress(b"hello"), zstd.compress(bytes(10**7)),
    b"%x\r\n%b\r\n0\r\n\r\n" % (len(gzip.compress(b"hello")), gzip.compress(b"hello")),
]  # fmt: skip


def any_answer(chance: random.Random) -> bytes:
    if chance.random() < 0.1:
        return chance.randbytes(chance.randrange(200))
    lines = chance.sample(LINES, chance.randrange(5))
    data = b"\r\n".join([chance.choice(STATUS), *lines, b"", chance.choice(BODIES)])
    for _ in range(chance.choice((0, 0, 1, 1, 2, 5))):
        at = chance.randrange(len(data) + 1)
        until = at + chance.randrange(9)
        data = data[:at] + chance.choice((b"", chance.randbytes(3), data[at:until] * 2, b"\r\n")) + data[until:]
    return data


def test_any_bytes_within_tls_are_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a good server says in its handshake and after it, with a few bytes changed."""
    monkeypatch.setattr("src.request.connection.Clock.pause", lambda *_: None)
    chance, ends = random.Random(13), set[str]()

    def mutated(data: bytes) -> bytes:
        if not data or chance.random() < 0.5:
            return data
        at = chance.randrange(len(data))
        return data[:at] + chance.choice((b"", chance.randbytes(1), chance.randbytes(9))) + data[at + 1 :]

    def send(line: socket.socket, data: bytes) -> None:
        line.settimeout(0.1)
        line.sendall(mutated(data))

    url = web.behave("files.test/x", by_hand(web.context, send, OK + b"Content-Length: 5\r\n\r\nhello"), tls=False)
    for _ in range(150):
        try:
            assert get_within(2, url) == b"hello"
        except Refused as error:
            ends.add(type(error).__name__)
    assert ends == {"Refused", "Unreachable"}


def test_any_bytes_are_an_answer_or_refused(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.request.connection.Clock.pause", lambda *_: None)
    data = b""

    def behave(line: socket.socket) -> None:
        hear(line)
        line.sendall(data)

    url = web.behave("files.test/x", behave, tls=False).replace("https", "http")
    chance, ends = random.Random(13), set[str]()
    for i in range(1_000):
        data = any_answer(chance)
        started, headers, said = time.monotonic(), Headers(), ""
        try:
            ends.add("bytes" if get(url, headers=headers) else "nothing")
        except (Refused, NotModified) as error:
            ends.add(type(error).__name__)
            said = str(error)
        except Exception as error:
            raise AssertionError((i, data)) from error
        assert len(said) < 500, data
        assert not re.search(r"[\r\n]", "".join(headers.answer.values())), data
        assert time.monotonic() - started < 5, data
    assert ends == {"bytes", "nothing", "Refused", "Unreachable", "HttpError", "NotModified"}
