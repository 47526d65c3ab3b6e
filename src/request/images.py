"""A client's pictures: base64, data URI or https URL -> upright RGB pictures, or the reason why not.

Everything that came over the wire is taken for hostile: nothing larger than the caps is read, and no pixel is decoded
before its file's parts are counted and there is room for it among the pictures of all jobs.
"""

from __future__ import annotations

import binascii
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from src.catalog import FORMATS
from src.errors import Fault, OutOfMemory, Refused
from src.job import Job
from src.redaction import redact
from src.request.bounds import Claim, measure
from src.request.decode_budget import DecodeBudget
from src.request.decoder import Bounds, Unknown, Unreadable, read, read_apart
from src.request.fetch import is_url, open_url
from src.request.schema import PICTURES, Request, unquoted
from src.wording import show

Fetch = Callable[[str], bytes]
Pictures = Mapping[str, tuple[Image.Image, ...]]  # by what they are for, a key of PICTURES, in the request's order

MAX_BYTES = 20_000_000  # what /runsync carries
MAX_INPUT_PIXELS = 64_000_000  # 8000 x 8000: more than cameras make, and 256 MB once decoded
MAX_PIXELS_TOGETHER = 2 * MAX_INPUT_PIXELS  # of a request
MAX_BYTES_TOGETHER = 10 * MAX_BYTES  # of a request's files
# Of all jobs together. Those with small pictures have a room of their own: they never wait for large ones.
_SMALL = MAX_INPUT_PIXELS // 4  # pixels of a job
_BUDGET, _SMALL_BUDGET = DecodeBudget(MAX_PIXELS_TOGETHER), DecodeBudget(MAX_INPUT_PIXELS)
READABLE = tuple(dict.fromkeys((*FORMATS, "BMP", "TIFF")))  # what is written can be sent again
_FORMATS_READ = ", ".join((*READABLE, "HEIC"))
ALLOWED = f"a still picture ({_FORMATS_READ}) as base64, a data URI or an https URL, at most {MAX_BYTES // 10**6} MB"
_FETCH_SECONDS = 30
_HEAD = 4_096  # characters of a source in which all is said of what follows
_DATA_URI = re.compile(r'(data\s*:)?((?:"[^"]*"|[^,"]){0,1000}),(\s*base64\s*,)?', re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
# A path that is base64 too, such as /etc/passwd; base64 of JPEG and JPEG XL begins with a slash as well.
_PATH = re.compile(
    r"(?:/(?!9j|w[o-r])|~|\.\.?[/\\]|[a-z]:[/\\]|\\).{0,260}|[^,:{<]{1,260}\.[a-z]\w{1,4}", re.IGNORECASE
)
_SHORTEST = 24  # characters of base64: what is shorter is a word such as null
_PIECE = 2**20  # characters, by four, that are decoded at once: the interpreter's lock is held meanwhile
_ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_STANDARD = bytes.maketrans(b"-_", b"+/")
_BLANKS = bytes(code for code in range(128) if chr(code).isspace())
_HEX = np.array([int(chr(code), 16) if chr(code) in "0123456789abcdefABCDEF" else 255 for code in range(256)], np.uint8)

_AS_JPEG, _AS_PNG = "send it as JPEG or PNG", "export it as PNG"
_ONE_FRAME, _NO_FILE = "send one of its frames as JPEG or PNG", "send the file of the picture itself"
# What is no picture that is read here, by how it begins: its name, and what to do.
_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (rb"....ftyp(hei[cmsx]|hev[cmsx]|mif[12]|msf1)", "HEIC", _AS_JPEG),
    (rb"....ftypcrx |II\*\0\x10\0\0\0CR|FUJIFILM", "a camera's raw file", "develop it as JPEG or PNG"),
    (rb"....ftyp(?!avi[fs])|....(moov|mdat|wide)|\x1aE\xdf\xa3|RIFF....AVI ", "video", _ONE_FRAME),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL (JXL)", _AS_JPEG),
    (rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  ", "JPEG 2000", _AS_JPEG),
    (rb"GIF8", "GIF", _ONE_FRAME),
    (rb"\s*%PDF", "PDF", "export the page as PNG"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript", _AS_PNG),
    (rb"8BP[SB]", "PSD", _AS_PNG),
    (rb"\0\0[\x01\x02]\0(?!\0)", "ICO", _AS_PNG),
    (rb"\0\0[\x02\x03\x0a\x0b]\0{5}", "TGA", _AS_PNG),
    (rb"P[1-7]\s", "PPM or PGM", _AS_PNG),
    (rb"v/1\x01|#\?RADIANCE", "a picture of high dynamic range (EXR or HDR)", _AS_PNG),
    (rb"(\xef\xbb\xbf)?\s*<.*<svg|(\xef\xbb\xbf)?\s*<svg", "SVG", _AS_PNG),
    (rb"(?i:(\xef\xbb\xbf)?\s*(<!doctype|<html|<head|<body|<!--))", "HTML", _NO_FILE),
    (rb"(\xef\xbb\xbf)?\s*<\?xml", "XML", _NO_FILE),
    (rb"(\xef\xbb\xbf)?\s*[{\[]", "JSON", _NO_FILE),
    (rb"PK\x03\x04", "ZIP", "send the picture that it holds"),
    (rb"\x1f\x8b", "gzip", "send the picture that it holds"),
    (rb"data:|iVBORw0KGgo|/9j/|UklGR", "base64 once more", "encode it once"),
)


class LoadedPictures(NamedTuple):
    """A request's pictures, the faults of those that cannot be used, and warnings of what was read otherwise."""

    pictures: Pictures
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]


class _Source(NamedTuple):
    """A picture that was sent, and what its file claims to be."""

    kind: str
    field: str
    file: bytes
    claim: Claim


def load_pictures(request: Request, job: Job, fetch: Fetch | None = None) -> LoadedPictures:
    """The request's pictures, masks as L and others as RGB.

    While they are read other jobs may pass `job`, and its end ends the reading. Raises OutOfMemory where the machine is
    short of what that takes.
    """
    if sources := request.sources():
        job.step_aside()
    files, faults, found = list[_Source](), list[Fault](), list[str]()

    # 1. Files, and what they claim to hold
    pixels, size = 0, 0
    for kind, field, source in sources:
        job.check()
        try:
            file = read_source(source, fetch or partial(fetch_url, check=job.check))
            claim = _claim(file, MAX_PIXELS_TOGETHER - pixels)
            if size + len(file) > MAX_BYTES_TOGETHER:
                raise Refused(f"makes this request's files together larger than {MAX_BYTES_TOGETHER:,} bytes")
        except Refused as error:
            faults.append(_fault(field, error))
        else:
            files.append(_Source(kind, field, file, claim))
            pixels, size = pixels + claim.pixels, size + len(file)

    # 2. Their pictures, once there is room for all of them
    pictures: dict[str, tuple[Image.Image, ...]] = {}
    with (_SMALL_BUDGET if pixels <= _SMALL else _BUDGET).taken(pixels, job.check) as keep:
        while files:
            kind, field, file, claim = files.pop(0)
            job.check()
            try:
                notes: list[str] = []
                by_alpha = request.mask_by_alpha
                picture = _decode(file, claim, PICTURES[kind], notes.append, by_alpha=by_alpha, check=job.check)
            except Refused as error:
                faults.append(_fault(field, error))
            else:
                keep(picture)
                found += [f"{field} {note}" for note in notes]
                pictures[kind] = (*pictures.get(kind, ()), picture)
    order = [field for _, field, _ in sources]
    return LoadedPictures(pictures, tuple(sorted(faults, key=lambda fault: order.index(fault.field))), tuple(found))


def _fault(field: str, error: Refused) -> Fault:
    return Fault(field, redact(f"{error}; allowed: {ALLOWED}"))


def read_source(source: str, fetch: Fetch) -> bytes:
    """The file that `source` holds or names; raises Refused where there is none to be had."""
    source = unquoted(source)
    if is_url(source[:_HEAD]):
        return fetch(source)
    if source[:7].lower() == "data%3a":
        source = _unescaped(source).decode(errors="replace")
    uri = _DATA_URI.match(source[:_HEAD])
    if uri and (uri[1] or uri[2].strip().lower().endswith("base64")):
        kind, *parameters = (part.strip().lower() for part in uri[2].split(";"))
        body = source[uri.end() :]
        if not ("base64" in (kind, *parameters) or uri[3]):
            if kind.startswith("text/"):
                raise Refused(f"is a data: address of {show(kind)}, not of a picture")
            raw = _unescaped(body)
            if not raw.isascii() or b"<" in raw:  # the file itself, not in base64
                if len(raw) > MAX_BYTES:
                    raise Refused(f"is larger than {MAX_BYTES:,} bytes")
                return raw
        if not body or body.isspace():
            raise Refused("is empty: nothing follows the comma of its data: address")
        return _from_base64(body)
    if len(source) < _HEAD and _PATH.fullmatch(source):
        raise Refused(
            f"is not valid base64: it looks like a file's path or an address without https:// ({len(source):,} "
            "characters); this worker sees no files of yours, so send the file itself"
        )
    if scheme := _SCHEME.match(source[:100]):
        if scheme[0].lower() == "data:":
            raise Refused("is a data: address without a comma: write data:image/png;base64, before the base64")
        raise Refused(f"is a {scheme[0]} address, and only https: addresses are fetched")
    return _from_base64(source)


def _from_base64(text: str) -> bytes:
    """What `text` encodes, in either alphabet, with or without padding and blanks; raises Refused with the reason."""
    if text[:_HEAD].lstrip()[:1] in ("<", "{", "["):
        name, advice = _looks_like(text[:_HEAD].encode(errors="replace")) or ("text", _NO_FILE)
        raise Refused(f"is not valid base64: it looks like {name} ({len(text):,} characters); {advice}")
    if "%" in text:
        text = _unescaped(text).decode(errors="replace")
    if "\\" in text:  # what JSON within JSON escaped
        for escaped in ("\\n", "\\r", "\\t"):
            text = text.replace(escaped, " ")
        text = text.replace("\\", "")
    data = _ascii(unquoted(text)).translate(_STANDARD, _BLANKS).rstrip(b"=")
    if not data:
        raise Refused("is empty: it holds no base64")
    if len(data) > MAX_BYTES * 4 / 3 + 4:
        raise Refused(f"is too large: {len(data):,} characters of base64")
    if strange := data.translate(None, _ALPHABET)[:1]:
        at = data.index(strange) + 1
        raise Refused(f"is not valid base64: character {at:,} of {len(data):,} is {show(strange.decode())}")
    if len(data) < _SHORTEST:
        raise Refused(f"is too short for a picture in base64: {len(data)} characters, {show(data.decode())}")
    if len(data) % 4 == 1:
        raise Refused(
            f"is not valid base64: of its {len(data):,} characters one is too many, or up to three are missing"
        )
    pieces = (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))
    return b"".join(binascii.a2b_base64(piece + b"=" * (-len(piece) % 4)) for piece in pieces)


def _ascii(text: str) -> bytes:
    """`text` without blanks that are not of ASCII; raises Refused at another character that is not."""
    while True:
        try:
            return text.encode("ascii")
        except UnicodeEncodeError as error:
            strange, at = text[error.start], error.start
        if not strange.isspace():
            raise Refused(f"is not valid base64: character {at + 1:,} of {len(text):,} is {show(strange)}")
        text = text.replace(strange, "")


def _unescaped(text: str) -> bytes:
    """`text` in UTF-8, with each %41 in it as the byte that it means."""
    data = text.encode(errors="replace")
    pieces = []
    start = 0
    while start < len(data):
        end = start + _PIECE
        end -= (data[end - 1 : end] == b"%") + 2 * (data[end - 2 : end - 1] == b"%")  # cuts none in two
        pieces.append(_unescaped_piece(np.frombuffer(data[start:end], np.uint8)))
        start = end
    return b"".join(pieces)


def _unescaped_piece(piece: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> bytes:
    at = np.flatnonzero(piece[:-2] == ord("%"))
    high, low = _HEX[piece[at + 1]], _HEX[piece[at + 2]]
    sound = (high < 16) & (low < 16)
    at = at[sound]
    plain = piece.copy()
    plain[at] = high[sound] * 16 + low[sound]
    kept = np.ones(piece.size, bool)
    kept[at + 1] = kept[at + 2] = False
    return plain[kept].tobytes()


def fetch_url(url: str, check: Callable[[], None] = lambda: None) -> bytes:
    """What lies at `url`, by the SDK's protection against private addresses, at most MAX_BYTES in half a minute.

    `check` may raise to end it. Raises Refused where it cannot be had.
    """
    return b"".join(open_url(url, MAX_BYTES, _FETCH_SECONDS, check))


def decode(
    file: bytes,
    mode: str = "RGB",
    room: int = MAX_INPUT_PIXELS,
    warn: Callable[[str], None] = lambda _: None,
    *,
    by_alpha: bool = False,
) -> Image.Image:
    """The picture in `file`, upright, in `mode` (RGB, or L for a mask), of `room` pixels at most.

    What is transparent is white, and black in a mask; but white in one that is read `by_alpha`, or that would be black
    all over. `warn` gets what a client may not expect. Raises Refused with the reason, and OutOfMemory where it is the
    machine that is short of something.
    """
    return _decode(file, _claim(file, room), mode, warn, by_alpha=by_alpha)


def _claim(file: bytes, room: int) -> Claim:
    """What `file` claims to be; raises Refused where that is not read, or more than `room` pixels."""
    claim = measure(file)
    if claim is None:
        raise _unknown(file)
    size = f"has {claim.width}x{claim.height} pixels"
    if claim.pixels > MAX_INPUT_PIXELS:
        raise Refused(f"{size}, more than {MAX_INPUT_PIXELS:,}")
    if claim.pixels > room:
        raise Refused(f"{size}, and this request's pictures together more than {MAX_PIXELS_TOGETHER:,}")
    return claim


def _decode(
    file: bytes,
    claim: Claim,
    mode: str,
    warn: Callable[[str], None],
    *,
    by_alpha: bool,
    check: Callable[[], None] = lambda: None,
) -> Image.Image:
    bounds = Bounds(claim.kind.formats, claim.pixels, claim.seconds)
    try:
        if claim.kind.whole:
            picture, notes = read_apart(file, bounds, mode, by_alpha=by_alpha, check=check)
        else:
            picture, notes = read(file, bounds, mode, by_alpha=by_alpha)
    except Unknown:
        raise _unknown(file) from None
    except Unreadable as error:
        raise Refused(str(error)) from error
    except (MemoryError, OSError) as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise OutOfMemory(f"the worker is short of what reading a picture takes ({what}); try again") from error
    for note in notes:
        warn(note)
    return picture


def _unknown(file: bytes) -> Refused:
    """Why a file of none of the formats is refused."""
    if found := _looks_like(file):
        return Refused(f"is {found[0]} ({len(file):,} bytes), which is not read here: {found[1]}")
    return Refused(f"is not a picture in one of these formats ({len(file):,} bytes)")


def _looks_like(file: bytes) -> tuple[str, str] | None:
    """What was sent instead of a picture that is read here, and what to do about it."""
    start = file[:4_096]
    found = ((name, advice) for begins, name, advice in _OTHERS if re.match(begins, start, re.DOTALL))
    return next(found, None)
