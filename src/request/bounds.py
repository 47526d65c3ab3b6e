"""What a picture's file says that it holds, counted before a decoder runs.

Decoders do what a file asks for: a file of 100 kB may ask for thousands of passes over a large picture, or hold a
million parts. Here each format's parts are counted by their headers alone, with limits far above what programs write.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from src.errors import Refused

_FILL = 4_096  # bytes between the parts of a JPEG; each is allowed, none is needed
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a JPEG, but for those that stand alone
_SECONDS = 0.5  # of the processor that decoding the smallest picture may take
_SLICE = 2**20  # bytes that are searched at once: the interpreter's lock is held meanwhile
_INTEGERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q"}  # types of a TIFF's tag
# Boxes of boxes in an AVIF or HEIC, and the bytes before the first.
_CONTAINERS = {b"meta": 4, b"iprp": 0, b"ipco": 0, b"iref": 4, b"iinf": 6}
_MAX_EXIF = 262_144  # bytes: four segments of a JPEG

# How many of its parts a file may hold.
MAX_SCANS = 64  # of a JPEG: progressive ones of cameras and of the web have 6 to 14
MAX_SEGMENTS = 2_000  # of a JPEG: 20 MB of metadata are 305
MAX_CHUNKS = 65_536  # of a PNG: 20 MB in pieces of 8 kB are 2,500
MAX_METADATA = 1_000  # chunks of a PNG that are no pixels
MAX_COMPRESSED = 100  # of these, those that are to be unpacked
MAX_DIRECTORIES = 1_000  # of a TIFF: its pages
MAX_TAGS = 20_000  # of all pages of a TIFF
MAX_STRIPS = 65_536  # of a TIFF, or tiles
MAX_RUN_LENGTH_PIXELS = 8_000_000  # of a BMP: Pillow unpacks their runs in Python
MAX_BOXES = 10_000  # of an AVIF or HEIC: one each for the 250 tiles of 64 megapixels


Size = tuple[int, int]


class Kind(NamedTuple):
    """Files that begin alike, and what their decoders are like."""

    formats: tuple[str, ...]
    begins: re.Pattern[bytes]
    measure: Callable[[bytes], Size]
    whole: bool  # its decoder takes the file whole, and cannot be stopped from within
    seconds: float  # that decoding a megapixel may take


class Claim(NamedTuple):
    """What a file says it is: the formats that it may be of, by Pillow's names, and the size of its picture."""

    kind: Kind
    width: int
    height: int

    @property
    def pixels(self) -> int:
        """Width times height."""
        return self.width * self.height

    @property
    def seconds(self) -> float:
        """Of the processor, that decoding it may take."""
        return _SECONDS + self.kind.seconds * self.pixels / 1e6


def measure(file: bytes) -> Claim | None:
    """What `file` says it is; None where it is of no format that is read.

    Raises Refused where it holds more parts than any program writes. A file that says nothing of its size, or nonsense,
    claims 0x0.
    """
    for kind in _KINDS:
        if kind.begins.match(file):
            try:
                return Claim(kind, *(max(0, side) for side in kind.measure(file)))
            except (struct.error, IndexError, OverflowError):
                return Claim(kind, 0, 0)
    return None


def _at_most(count: int, most: int, parts: str) -> None:
    if count > most:
        raise Refused(f"holds more than {most:,} {parts}: save it anew")


def _jpeg(file: bytes) -> Size:
    if b"\xff" * _FILL in file:
        raise Refused(f"holds more than {_FILL:,} fill bytes in a row: save it anew")
    size, scans, exif, fill, end = (0, 0), 0, 0, 0, 2
    for segments, (code, start, length) in enumerate(_markers(file), 1):
        fill += 0 if scans else start - 4 - end
        end = start + length
        _at_most(fill, _FILL, "bytes between its segments")
        scans += code == 0xDA
        exif += length if file.startswith(b"Exif\0\0", start) else 0
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC) and size == (0, 0):
            height, width = struct.unpack_from(">HH", file, start + 1)
            size = width, height
        _at_most(scans, MAX_SCANS, "scans")
        _at_most(segments, MAX_SEGMENTS, "segments")
        _at_most(exif, _MAX_EXIF, "bytes of EXIF")
    return size


def _markers(file: bytes) -> Iterator[tuple[int, int, int]]:
    """The segments of a JPEG: code, where its content starts, how long that is."""
    at, scanned = 2, False
    while at < len(file):
        found = _MARKER.search(file, at, at + _SLICE)
        if found is None:
            at += _SLICE - 1
            continue
        at = found.end()
        code = found[0][1]
        if code == 0xD9:  # the end, behind which cameras put more pictures
            if scanned:
                return
            continue
        scanned |= code == 0xDA
        length = int.from_bytes(file[at : at + 2])
        yield code, at + 2, length - 2
        at += max(2, length)


def _png(file: bytes) -> Size:
    size, at, chunks, metadata, compressed = (0, 0), 8, 0, 0, 0
    while at + 8 <= len(file):
        length, kind = struct.unpack_from(">I4s", file, at)
        if kind == b"IEND":
            break
        if kind == b"IHDR" and chunks == metadata:  # before the pixels
            width, height = struct.unpack_from(">II", file, at + 8)
            size = width, height
        chunks += 1
        metadata += kind != b"IDAT"
        compressed += kind in (b"iCCP", b"zTXt", b"iTXt")
        if kind == b"acTL" and length >= 8 and int.from_bytes(file[at + 8 : at + 12]) > 1:
            raise Refused("is animated: send one of its frames")
        if kind == b"eXIf" or file.startswith(b"Raw profile type exif", at + 8):
            _at_most(length, _MAX_EXIF, "bytes of EXIF")
        _at_most(chunks, MAX_CHUNKS, "chunks")
        _at_most(metadata, MAX_METADATA, "chunks of metadata")
        _at_most(compressed, MAX_COMPRESSED, "chunks of compressed metadata")
        at += 12 + length
    return size


def _webp(file: bytes) -> Size:
    size, at, chunks = (0, 0), 12, 0
    while at + 8 <= len(file):
        kind, length = struct.unpack_from("<4sI", file, at)
        chunks += 1
        _at_most(chunks, MAX_METADATA, "chunks")
        if chunks == 1:
            size = _webp_size(kind, file[at + 8 : at + 18])
        at += 8 + length + length % 2
    return size


def _webp_size(kind: bytes, start: bytes) -> Size:
    """The size that the first chunk of a WEBP says, by how its content starts."""
    if kind == b"VP8X":
        return int.from_bytes(start[4:7], "little") + 1, int.from_bytes(start[7:10], "little") + 1
    if kind == b"VP8L":
        sides = int.from_bytes(start[1:5], "little")
        return sides % 2**14 + 1, (sides >> 14) % 2**14 + 1
    width, height = struct.unpack_from("<HH", start, 6)
    return width % 2**14, height % 2**14


def _tiff(file: bytes) -> Size:
    order = "<" if file[:2] == b"II" else ">"
    wide = file[2] == 43  # BigTIFF: numbers of 8 bytes
    counted, entry, pointer = ("Q", "HHQ", "Q") if wide else ("H", "HHI", "I")
    head, step, after = (struct.calcsize("=" + kind) for kind in (counted, entry + pointer, pointer))
    sides: dict[int, int] = {}
    seen: set[int] = set()
    tags = 0
    (at,) = struct.unpack_from(order + pointer, file, 8 if wide else 4)
    while 0 < at <= len(file) - head and at not in seen:
        seen.add(at)
        (count,) = struct.unpack_from(order + counted, file, at)
        at += head
        end = at + count * step
        entries = range(at, min(end, len(file) - step + 1), step)
        tags += len(entries)
        _at_most(len(seen), MAX_DIRECTORIES, "pages")
        _at_most(tags, MAX_TAGS, "tags")
        for place in entries if len(seen) == 1 else ():
            tag, kind, parts = struct.unpack_from(order + entry, file, place)
            if tag in (256, 257) and kind in _INTEGERS:  # width and height
                value = place + step - after
                if parts * struct.calcsize("=" + _INTEGERS[kind]) > after:  # it lies elsewhere, and the first counts
                    (value,) = struct.unpack_from(order + pointer, file, value)
                (side,) = struct.unpack_from(order + _INTEGERS[kind], file, value)
                sides.setdefault(tag, side)
            if tag in (273, 324):  # where each strip or tile lies
                _at_most(parts, MAX_STRIPS, "strips or tiles")
        at = int.from_bytes(file[end : end + after], "little" if order == "<" else "big")
    return sides.get(256, 0), sides.get(257, 0)


def _bmp(file: bytes) -> Size:
    if file[14] == 12:  # of OS/2
        width, height = struct.unpack_from("<HH", file, 18)
    else:
        width, height = struct.unpack_from("<II", file, 18)
    return width, height if height < 0xFF000000 else 2**32 - height  # rows from the top down


def _run_length_bmp(file: bytes) -> Size:
    width, height = _bmp(file)
    if width * height > MAX_RUN_LENGTH_PIXELS:
        raise Refused(
            f"is a run-length encoded BMP of {width}x{height} pixels, and such may have {MAX_RUN_LENGTH_PIXELS:,} at "
            "most: save it as PNG"
        )
    return width, height


def _boxes(file: bytes) -> Size:
    """The largest picture of an AVIF or HEIC: the whole one, where it is put together of tiles."""
    size, boxes = (0, 0), 0
    parts = [(0, len(file))]
    while parts:
        at, end = parts.pop()
        while at + 8 <= end:
            length, kind = struct.unpack_from(">I4s", file, at)
            start = at + 8
            if length == 1:
                (length,) = struct.unpack_from(">Q", file, start)
                start += 8
            length = length or end - at
            boxes += 1
            _at_most(boxes, MAX_BOXES, "boxes")
            if kind == b"ispe":
                width, height = struct.unpack_from(">II", file, start + 4)
                size = max(size, (width, height), key=lambda sides: sides[0] * sides[1])
            if kind in _CONTAINERS:
                head = _CONTAINERS[kind] + 2 * (kind == b"iinf" and file[start] > 0)  # a count of 4 bytes, not of 2
                parts.append((start + head, min(at + length, end)))
            at += max(8, length)
    return size


# Seconds are four to five times what a megapixel takes on a processor of 2020.
_KINDS = (
    Kind(("JPEG",), re.compile(rb"\xff\xd8\xff"), _jpeg, whole=False, seconds=0.05),
    Kind(("PNG",), re.compile(rb"\x89PNG\r\n\x1a\n"), _png, whole=False, seconds=0.05),
    Kind(("WEBP",), re.compile(rb"RIFF....WEBPVP8[ LX]", re.DOTALL), _webp, whole=True, seconds=0.1),
    Kind(("AVIF",), re.compile(rb"....ftypavi[fs]", re.DOTALL), _boxes, whole=True, seconds=0.1),
    Kind(
        ("AVIF", "HEIF"), re.compile(rb"....ftyp(he[iv][cmsx]|mif1|msf1)", re.DOTALL), _boxes, whole=True, seconds=0.2
    ),
    Kind(("TIFF",), re.compile(rb"MM(\0[*+]|\*\0)|II([*+]\0|\0\*)"), _tiff, whole=True, seconds=0.1),
    # Pillow unpacks these with the interpreter's lock.
    Kind(("BMP",), re.compile(rb"BM.{28}[\1\2]\0\0\0", re.DOTALL), _run_length_bmp, whole=True, seconds=0.06),
    Kind(("BMP",), re.compile(rb"BM"), _bmp, whole=False, seconds=0.05),
)
