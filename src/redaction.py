"""What must never leave the process, and text without it: known by its value, or by how such a thing is written.

Takes time in proportion to the text, whatever that is: a pattern that may run through a word begins where the word
does, and gives nothing back.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, quote_plus, urlsplit

T = TypeVar("T")

REDACTED = "[redacted]"
SHORTEST_SECRET = 8  # characters: what is shorter may be a word that messages are made of
MAX_REDACTED = 200_000  # characters; of a longer text the middle is left out
_LINE = 500  # characters

_SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:token|key|secret|signature|sig|password|passwd|passphrase|credentials?|apikey)(?:[_-]id)?$"
    r"|^runpod_secret_",
    re.IGNORECASE,
)
# A name that tells of a secret: loosely in an address, where all else is a name too, and strictly in other text.
_IN_ADDRESSES = r"token|key|secret|sig|pass|pwd|auth|credential|x-(?:amz|goog|oss)-|googleaccessid"
_IN_TEXT = r"token(?![is])|secret|passw|passphrase|signature|(?<![^\W_])sig(?![^\W_])|credential"
_IN_TEXT += "|(?:api|access|account|private)[_-]?key"
_LONG = "A-Za-z0-9+/=_-"  # what base64 is made of
_HEADER = (
    r"((?:authorization|cookie)['\"]?\s{0,3}[:=]\s{0,3})(?!b?['\"]?\[redacted)"
    r"(?:(b?')[^'\r\n]++|(b?\")[^\"\r\n]++|[^\s'\"][^\r\n]*+)"
)
_NAMED = (
    rf"((?<![\w.-])(?=[\w.-]*?(?:{_IN_TEXT}))[\w.-]++)"
    r"(?:(['\"]?\s{0,3}[:=]\s{0,3}b?['\"])(?!\[redacted)[^'\"\r\n]++"
    r"|([ \t]{0,3}=[ \t]{0,3})(?!\[redacted)[^\s'\"&,;)}\]]++"
    rf"|(['\"]?:\s{{0,3}})[.~%{_LONG}]{{16,}}+)"
)


def _without_password(match: re.Match[str]) -> str:
    """What follows `://`, where it is user:password@host; a password may hold slashes and at signs."""
    run = match[0]
    before, colon, behind = run.partition(":")
    if "@" not in behind or "/" in before or "@" in before or before.startswith("["):
        return run
    is_host = "." in before or before.lower() == "localhost"
    if not colon or (is_host and re.match(r"\d{1,5}(?:[/?#]|\Z)", behind)):  # a port
        return run
    return f"{REDACTED}@{behind.rpartition('@')[2]}"


_SHAPES: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE if loose else 0), instead)
    for loose, pattern, instead in (
        # Tokens that begin with what they are
        (False, r"(?:hf|rpa|api_org|gh[pousr]|r8)_[A-Za-z0-9]{8,}|github_pat_\w{8,}", REDACTED),
        (False, r"(?<![A-Za-z0-9])(?:sk-[\w-]{16,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[\w-]{30,})", REDACTED),
        (False, r"(?<![\w-])eyJ[\w-]{8,}+\.[\w-]++(?:\.[\w-]++)?", REDACTED),
        # Parameters of an address, also of one within another
        (
            True,
            rf"(?:(?<=[?&;])|(?<=%3F)|(?<=%26))(?=[\w.-]*?(?:{_IN_ADDRESSES}))[\w.-]++(?:=|%3D)[^&\s'\"]++",
            REDACTED,
        ),
        # user:password@host
        (False, r"(?<=://)(?:[^\s'\"<>:]|:(?!//))++", _without_password),
        # Headers
        (
            True,
            _HEADER,
            rf"\1\2\3{REDACTED}",
        ),
        (True, r"(?<=bearer )(?!\[redacted)[^\s'\"]++", REDACTED),
        (False, r"(\b[Bb]asic[ \t]{1,3})(?=[a-z]*+[A-Z0-9+/=])[A-Za-z0-9+/_-]{4,}+={0,2}", rf"\1{REDACTED}"),
        # "name": "secret", name=secret, name: a long word; and a long word right behind such a name
        (
            True,
            _NAMED,
            rf"\1\2\3\4{REDACTED}",
        ),
        (
            True,
            rf"((?:token|key|secret|password)[\s:='\"]{{1,5}})(?=[{_LONG}]{{0,40}}\d)[{_LONG}]{{20,}}+",
            rf"\1{REDACTED}",
        ),
        # What has no shape of its own, by the company that it keeps: AWS's secret keys, Civitai's keys
        (False, r"((?i:aws|secret)[^\r\n]{0,60}?)(?<![\w+/=])[A-Za-z0-9+/]{40}(?![\w+/=])", rf"\1{REDACTED}"),
        (False, r"((?i:civitai)[^\r\n]{0,60}?)(?<!\w)[0-9a-f]{32}(?!\w)", rf"\1{REDACTED}"),
        # Long base64: a picture
        (False, rf"(?<![{_LONG}])[{_LONG}]{{200,}}+", REDACTED),
    )
)

_known: list[str] = []  # in every spelling, the longest first
_adding = threading.Lock()


def keep_secret(*values: str) -> None:
    """From now on `values` leave the process nowhere, in whatever spelling; those of a few characters do."""
    with _adding:
        for value in values:
            if len(value) >= SHORTEST_SECRET and value not in _known:
                _known[:] = sorted({*_known, *_spellings(value)}, key=len, reverse=True)


def secrets_among(variables: Mapping[str, str]) -> Iterator[str]:
    """What is secret of an environment: what its names say, and passwords and keys in addresses."""
    for name, value in variables.items():
        if _SECRET_NAME.search(name):
            yield value.strip()
        elif "://" in value:
            try:
                address = urlsplit(value)
                yield address.password or ""
                yield from (part for name, part in parse_qsl(address.query) if _SECRET_NAME.search(name))
            except ValueError:  # no address
                continue


def _spellings(secret: str) -> set[str]:
    """`secret` as it is, as addresses, JSON and Python write it, and in base64, wherever it stands in there."""
    quoted = {quote(secret, safe=""), quote(secret), quote_plus(secret)}
    found = {secret, *quoted, *(re.sub("%..", lambda match: match[0].lower(), text) for text in quoted)}
    found |= {quote(text, safe="") for text in quoted} | {json.dumps(secret)[1:-1], repr(secret)[1:-1]}
    plain = secret.encode()
    for shift in range(3):  # bytes before it
        coded = base64.b64encode(bytes(shift) + plain).decode()
        own = coded[-(-8 * shift // 6) : 8 * (shift + len(plain)) // 6]  # without the bits of its neighbours
        found |= {own, own.translate({ord("+"): "-", ord("/"): "_"})}
    return found


def hide_known(text: str) -> str:
    """`text` without the secrets that are known by their values."""
    for secret in _known:
        if secret in text:
            text = text.replace(secret, REDACTED)
    return text


def hide_known_in(value: T) -> T:
    """The same for all texts of a JSON value."""
    return _hidden(value) if _known else value


def _hidden(value: Any) -> Any:
    if isinstance(value, str):
        return hide_known(value)
    if isinstance(value, dict):
        return {_hidden(name): _hidden(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_hidden(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(_hidden(inner) for inner in value)
    return value


def without_secrets(text: str) -> str:
    """`text` without tokens, credentials and pictures."""
    text = hide_known(without_middle(text, MAX_REDACTED))
    for shape, instead in _SHAPES:
        text = shape.sub(instead, text)
    return text


def redact(text: str) -> str:
    """The same, and such that UTF-8 has it: what may leave the process."""
    text = without_secrets(text)
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def cut(text: str, most: int) -> str:
    """The first `most` characters of a longer `text`, and how long it was; no known secret is cut in two."""
    if len(text) <= most:
        return text
    return f"{text[: _across(text, most)[0]]}... ({len(text):,} characters)"


def ends_of(text: str, most: int) -> str:
    """The first and the last `most` characters of a longer `text`; no known secret is cut in two."""
    if len(text) <= 2 * most:
        return text
    return text[: _across(text, most)[0]] + text[_across(text, len(text) - most)[1] :]


def without_middle(text: str, most: int) -> str:
    """A longer `text` without its middle, and how much that was; no known secret is cut in two."""
    if len(text) <= most:
        return text
    head, tail = _across(text, most // 2)[0], _across(text, len(text) - most // 2)[1]
    head = max(text.rfind("\n", head - _LINE, head), 0) or head  # where a line ends, and no word is cut either
    tail = max(text.find("\n", tail, tail + _LINE), 0) or tail
    return f"{text[:head]}\n... {tail - head:,} characters ...\n{text[tail:]}"


def _across(text: str, at: int) -> tuple[int, int]:
    """Where the known secret that stands across `at` begins and ends; `at` itself where there is none."""
    for secret in _known:
        begin = text.find(secret, max(0, at - len(secret) + 1), at + len(secret) - 1)
        if begin != -1:
            return begin, begin + len(secret)
    return at, at
