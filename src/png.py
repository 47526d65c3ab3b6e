"""PNG at the speed of the hardware: one row filter, and zlib by ISA-L.

Pillow's default takes 30 times as long for a photograph of the same size; see benchmarks/serving.py.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np
from isal import isal_zlib
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_UP = 2  # PNG specification, 9.2: each byte less the one above it


def encode_png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """`image` (RGB) as a PNG file that carries `texts`, each under its keyword of Latin letters."""
    pixels = np.asarray(image)
    height, width, channels = pixels.shape
    rows = pixels.reshape(height, width * channels)
    filtered = np.empty((height, 1 + width * channels), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    return b"".join((
        _SIGNATURE,
        _chunk(b"IHDR", header),
        *(_chunk(b"iTXt", _text(keyword, text)) for keyword, text in texts.items()),
        _chunk(b"IDAT", isal_zlib.compress(filtered, 1)),
        _chunk(b"IEND", b""),
    ))  # fmt: skip


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def _text(keyword: str, text: str) -> bytes:
    """11.3.4.5: keyword, neither compressed nor translated, UTF-8."""
    return keyword.encode("latin-1") + b"\0\0\0\0\0" + text.encode()
