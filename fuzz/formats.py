"""Formats that most mutations would only break, by a length or a sum that fits no more: taken apart, and put together
with lengths and sums that fit.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class Format(NamedTuple):
    """`take_apart` gives no pieces where the bytes are not of the format."""

    take_apart: Callable[[bytes], list[bytes]]
    put_together: Callable[[Sequence[bytes]], bytes]


def _fields(data: bytes) -> list[bytes]:
    try:
        event = json.loads(data)
        return [f"{json.dumps(name)}: {json.dumps(value)}".encode() for name, value in event["input"].items()]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return []


def _parts(data: bytes) -> list[bytes]:
    """A PNG's signature and chunks, each a type and a body; a JPEG's segments."""
    if data.startswith(b"\xff\xd8"):
        return re.split(rb"(?=\xff[\xc0-\xcf\xd8-\xfe])", data)[1:]
    if not data.startswith(_SIGNATURE):
        return []
    found, at = [_SIGNATURE], len(_SIGNATURE)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        found.append(data[at + 4 : at + 8 + length])
        at += 12 + length
    return found


def _picture(parts: Sequence[bytes]) -> bytes:
    if parts[0] != _SIGNATURE:
        return b"".join(parts)
    whole = [struct.pack(">I", max(0, len(c) - 4)) + c + struct.pack(">I", zlib.crc32(c)) for c in parts[1:]]
    return _SIGNATURE + b"".join(whole)


def _header_and_numbers(data: bytes) -> list[bytes]:
    length = int.from_bytes(data[:8], "little")
    return [data[8 : 8 + length], data[8 + length :]] if 8 + length <= len(data) else []


def _safetensors(pieces: Sequence[bytes]) -> bytes:
    header, *numbers = pieces
    return len(header).to_bytes(8, "little") + header + b"".join(numbers)


PLAIN = Format(lambda data: [data], b"".join)
REQUEST = Format(_fields, lambda fields: b'{"input": {' + b", ".join(fields) + b"}}")
PICTURE = Format(_parts, _picture)
SAFETENSORS = Format(_header_and_numbers, _safetensors)
