"""What lies at an address that a client sent, taken for hostile.

Nothing is fetched from private addresses, nothing larger than the caller's cap, and nothing past its deadline.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from src import __version__
from src.errors import Refused

_CHUNK = 65_536  # bytes
_HEADERS = {"Accept-Encoding": "identity", "User-Agent": f"flux-worker/{__version__}"}


def is_url(text: str) -> bool:
    """Whether it is an address that may be asked."""
    return text.lstrip().lower().startswith("https://")


def open_url(url: str, max_bytes: int, seconds: float, check: Callable[[], None]) -> Iterator[bytes]:
    """What lies at `url`, piece by piece, by the SDK's protection against private addresses.

    `check` may raise to end it. Raises Refused where it may not be asked, is too large or takes too long.
    """
    import requests
    import urllib3
    from runpod.serverless.utils.rp_ssrf import SSRFError, safe_get

    size, deadline = 0, time.monotonic() + seconds
    try:
        with safe_get(url, timeout=10, max_bytes=max_bytes, headers=_HEADERS) as answer:
            if answer.status_code != 200:
                raise Refused(f"could not be fetched: HTTP {answer.status_code}")
            while chunk := answer.raw.read1(_CHUNK):  # what has come: a dripping server must not outlast the deadline
                check()
                size += len(chunk)
                if size > max_bytes:
                    raise Refused(f"is larger than {max_bytes:,} bytes")
                if time.monotonic() > deadline:
                    raise Refused(f"could not be fetched within {seconds:g} seconds")
                yield chunk
    except SSRFError as error:
        raise Refused(f"may not be fetched: {error}") from error
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise Refused(f"could not be fetched: {type(error).__name__}") from error
