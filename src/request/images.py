"""A client's pictures: base64, data URI or https URL -> upright RGB pictures, or the reason why not.

Everything that came over the wire is taken for hostile: nothing larger than the caps is read, and no pixel is decoded
before its picture's size is known.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from src.catalog import FORMATS
from src.errors import Fault, Refused, redact
from src.job import Job
from src.request.fetch import is_url, open_url
from src.request.schema import PICTURES, Request

Fetch = Callable[[str], bytes]
Pictures = Mapping[str, tuple[Image.Image, ...]]  # by what they are for, a key of PICTURES, in the request's order

MAX_BYTES = 20_000_000  # what /runsync carries
MAX_INPUT_PIXELS = 64_000_000  # 8000 x 8000: more than cameras make, and 200 MB once decoded
MAX_PIXELS_TOGETHER = 2 * MAX_INPUT_PIXELS  # of a request
MIN_INPUT_SIDE = 16
READABLE = tuple(dict.fromkeys((*FORMATS, "BMP", "TIFF")))  # what is written can be sent again
ALLOWED = (
    f"a still picture ({', '.join(READABLE)}) as base64, a data URI or an https URL, at most {MAX_BYTES // 10**6} MB"
)
_FETCH_SECONDS = 30
_DATA_URI = re.compile(r"data:[\w/+.-]*(;[\w=+.-]+)*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def load_pictures(request: Request, job: Job, fetch: Fetch | None = None) -> tuple[Pictures, tuple[Fault, ...]]:
    """The request's pictures, masks as L and others as RGB, and the faults of those that cannot be used.

    While pictures are fetched other jobs may pass `job`, and its end ends the fetching.
    """
    sources = request.sources()
    if any(is_url(source) for *_, source in sources):
        job.step_aside()
    pictures: dict[str, tuple[Image.Image, ...]] = {}
    faults, room = [], MAX_PIXELS_TOGETHER
    for kind, field, source in sources:
        try:
            file = read_source(source, fetch or partial(fetch_url, check=job.check))
            picture = decode(file, PICTURES[kind], room)
            pictures[kind] = (*pictures.get(kind, ()), picture)
            room -= picture.width * picture.height
        except Refused as error:
            faults.append(Fault(field, redact(f"{error}; allowed: {ALLOWED}")))
    return pictures, tuple(faults)


def read_source(source: str, fetch: Fetch) -> bytes:
    """The file that `source` holds or names; raises Refused where there is none to be had."""
    source = source.strip()
    if is_url(source):
        return fetch(source)
    if uri := _DATA_URI.match(source):
        source = source[uri.end() :]
    elif scheme := _SCHEME.match(source):
        raise Refused(f"is a {scheme[0]} address, and only https: addresses are fetched")
    if len(source) > MAX_BYTES * 4 / 3 + 4:
        raise Refused(f"is too large: {len(source):,} characters of base64")
    try:
        return base64.b64decode("".join(source.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(f"is not valid base64 ({len(source):,} characters)") from None


def fetch_url(url: str, check: Callable[[], None] = lambda: None) -> bytes:
    """What lies at `url`, by the SDK's protection against private addresses, at most MAX_BYTES in half a minute.

    `check` may raise to end it. Raises Refused where it cannot be had.
    """
    return b"".join(open_url(url, MAX_BYTES, _FETCH_SECONDS, check))


def decode(file: bytes, mode: str = "RGB", room: int = MAX_INPUT_PIXELS) -> Image.Image:
    """The picture in `file`, upright, in `mode` (RGB or L), of `room` pixels at most.

    What is transparent is white, and black in a mask. Raises Refused with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # measured below, by our own cap
            picture = Image.open(io.BytesIO(file), formats=READABLE)
        width, height = picture.size
        if width * height > MAX_INPUT_PIXELS:
            raise Refused(f"has {width}x{height} pixels, more than {MAX_INPUT_PIXELS:,}")
        if width * height > room:
            together = f"this request's pictures together more than {MAX_PIXELS_TOGETHER:,}"
            raise Refused(f"has {width}x{height} pixels, and {together}")
        if min(picture.size) < MIN_INPUT_SIDE:
            raise Refused(f"has {width}x{height} pixels, and each side must have {MIN_INPUT_SIDE} at least")
        if getattr(picture, "is_animated", False) and picture.format != "MPO":  # a JPEG with others behind it
            raise Refused("is animated")
        return _flat(ImageOps.exif_transpose(picture), mode)
    except Refused:
        raise
    except UnidentifiedImageError:
        raise Refused(f"is not a picture in one of these formats ({len(file):,} bytes, {_looks_like(file)})") from None
    except Image.DecompressionBombError:
        raise Refused(f"has far more than {MAX_INPUT_PIXELS:,} pixels") from None
    except Exception as error:
        raise Refused(f"is damaged: {type(error).__name__}: {error}"[:200]) from error


def _flat(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":  # more than 8 bits a channel, which Pillow would clip
        pixels = np.asarray(picture, float)
        brightest = max(1.0, float(pixels.max()))
        whites = {"I": (255, 65_535, brightest), "F": (brightest,)}.get(picture.mode, (65_535,))
        white = next(value for value in whites if brightest <= value)
        picture = Image.fromarray((pixels / white * 255).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "black" if mode == "L" else "white")
        picture = Image.alpha_composite(ground, picture)
    return picture.convert(mode)


def _looks_like(file: bytes) -> str:
    """A word on what was sent instead."""
    start = file[:512].lstrip().lower()
    if b"<svg" in start:
        return "SVG"
    if start.startswith((b"<!doctype", b"<html")):
        return "HTML"
    kinds: Mapping[bytes, str] = {b"gif8": "GIF", b"pk\x03\x04": "ZIP", b"%pdf": "PDF", b"{": "JSON"}
    return next((name for magic, name in kinds.items() if start.startswith(magic)), "unknown")
