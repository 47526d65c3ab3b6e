"""PNG at the speed of the hardware: the pixels by fpng, the text beside them.

Pillow's default takes a hundred times as long for a photograph; see benchmarks/encoding.py.
"""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Mapping
from types import ModuleType

import fpng
from PIL import Image

_HEADER_ENDS = 8 + 4 + 4 + 13 + 4  # signature; IHDR's length, name, data, checksum

if type(sys.modules.get("cv2", sys)) is not ModuleType:  # fpng leaves one that loads when first used:
    del sys.modules["cv2"]  # two threads that do so at once would fail


def encode_png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """`image` (RGB, sides below 2**16) as a PNG file that carries `texts`, each under its keyword of Latin letters.

    Any number of threads may; they take turns, since fpng holds the interpreter's lock.
    """
    file = memoryview(fpng.from_pil(image))
    chunks = (_chunk(b"iTXt", _text(keyword, text)) for keyword, text in texts.items())
    return b"".join((file[:_HEADER_ENDS], *chunks, file[_HEADER_ENDS:]))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def _text(keyword: str, text: str) -> bytes:
    """PNG specification, 11.3.4.5: keyword, neither compressed nor translated, UTF-8."""
    return keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode()
