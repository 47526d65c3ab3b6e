"""What lies at an address: compressed, from busy servers, by way of others; over real HTTPS."""

from __future__ import annotations

import gzip
import time
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import brotli
import pytest
from backports import zstd

from src.errors import Cancelled, Refused
from src.request.fetch import Headers, HttpError, NotModified, Unreachable, open_url
from tests.web import Page, Web, open_web

BODY = bytes(range(256)) * 1_000
BUSY = Page(status=503, headers={"Retry-After": "0"})


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    with open_web(tmp_path, monkeypatch, "files.test", "others.test") as web:
        yield web


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
