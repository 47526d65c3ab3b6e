"""A client's pictures: base64, data URI or https URL -> upright RGB pictures, or the reason why not.

Everything that came over the wire is taken for hostile: nothing is fetched from private addresses, nothing larger than
the caps is read, and no pixel is decoded before its picture's size is known.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from src.errors import Fault, redact
from src.job import Job
from src.request import PICTURES, Borders, Request

Fetch = Callable[[str], bytes]
Pictures = Mapping[str, tuple[Image.Image, ...]]  # by what they are for, a key of PICTURES, in the request's order

MAX_BYTES = 20_000_000  # what /runsync carries
MAX_PIXELS = 64_000_000  # 8000 x 8000: more than cameras make, and 200 MB once decoded
MAX_PIXELS_TOGETHER = 2 * MAX_PIXELS  # of a request
MIN_SIDE = 16
_MASK_SHAPE = 1.05  # how much longer or wider than its picture a mask may be
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
ALLOWED = (
    f"a still picture ({', '.join(FORMATS)}) as base64, a data URI or an https URL, at most {MAX_BYTES // 10**6} MB"
)
_FETCH_SECONDS = 30
_DATA_URI = re.compile(r"data:[\w/+.-]*(;[\w=+.-]+)*;base64,", re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


class Refused(Exception):
    """Why a picture cannot be used."""


def load_pictures(request: Request, job: Job, fetch: Fetch | None = None) -> tuple[Pictures, tuple[Fault, ...]]:
    """The request's pictures, masks as L and others as RGB, and the faults of those that cannot be used.

    While pictures are fetched other jobs may pass `job`, and its end ends the fetching.
    """
    sources = request.sources()
    if any(_is_url(source) for *_, source in sources):
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
    if "init_image" in pictures:
        size = pictures["init_image"][0].size
        faults += [_misfit(size, mask.size) for mask in pictures.get("mask_image", ()) if not _covers(mask.size, size)]
        if request.outpaint and not faults:
            (left, right), (top, bottom) = around = borders(request.outpaint, size)
            width, height = size[0] + left + right, size[1] + top + bottom
            if width * height > MAX_PIXELS:
                told = f"would make a picture of {width}x{height}; allowed: {MAX_PIXELS:,} pixels at most"
                faults.append(Fault("outpaint", told))
            else:
                pictures |= widened(pictures, around)
    return pictures, tuple(faults)


def read_source(source: str, fetch: Fetch) -> bytes:
    """The file that `source` holds or names."""
    source = source.strip()
    if _is_url(source):
        return fetch(source)
    if uri := _DATA_URI.match(source):
        source = source[uri.end() :]
    elif scheme := _SCHEME.match(source):
        raise Refused(f"must not be a {scheme[0]} address")
    if len(source) > MAX_BYTES * 4 / 3 + 4:
        raise Refused(f"has {len(source):,} characters")
    try:
        return base64.b64decode("".join(source.split()), validate=True)
    except (binascii.Error, ValueError):
        raise Refused(f"is no base64 ({len(source):,} characters)") from None


def _is_url(source: str) -> bool:
    return source.lstrip().lower().startswith("https://")


def fetch_url(url: str, check: Callable[[], None] = lambda: None) -> bytes:
    """What lies at `url`, by the SDK's protection against private addresses, at most MAX_BYTES in half a minute.

    `check` may raise to end it.
    """
    return b"".join(open_url(url, MAX_BYTES, _FETCH_SECONDS, check))


def open_url(url: str, max_bytes: int, seconds: float, check: Callable[[], None]) -> Iterator[bytes]:
    """What lies at `url`, piece by piece; Refused where it may not be asked, is too large or takes too long."""
    import requests
    import urllib3
    from runpod.serverless.utils.rp_ssrf import SSRFError, safe_get

    size, deadline = 0, time.monotonic() + seconds
    try:
        with safe_get(url, timeout=10, max_bytes=max_bytes, headers={"Accept-Encoding": "identity"}) as answer:
            if answer.status_code != 200:
                raise Refused(f"could not be fetched: HTTP {answer.status_code}")
            while chunk := answer.raw.read1(65_536):  # what has come: a dripping server must not outlast the deadline
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


def decode(file: bytes, mode: str = "RGB", room: int = MAX_PIXELS) -> Image.Image:
    """The picture in `file`, upright, in `mode` (RGB or L), of `room` pixels at most.

    What is transparent is white, and black in a mask.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # measured below, by our own cap
            picture = Image.open(io.BytesIO(file), formats=FORMATS)
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise Refused(f"has {width}x{height} pixels, more than {MAX_PIXELS:,}")
        if width * height > room:
            raise Refused(f"has {width}x{height} pixels, with the others more than {MAX_PIXELS_TOGETHER:,}")
        if min(picture.size) < MIN_SIDE:
            raise Refused(f"has {width}x{height} pixels, and each side must have {MIN_SIDE} at least")
        if getattr(picture, "is_animated", False) and picture.format != "MPO":  # a JPEG with others behind it
            raise Refused("is animated")
        return _flat(ImageOps.exif_transpose(picture), mode)
    except Refused:
        raise
    except UnidentifiedImageError:
        raise Refused(f"is no picture of these formats ({len(file):,} bytes, {_looks_like(file)})") from None
    except Image.DecompressionBombError:
        raise Refused(f"has far more than {MAX_PIXELS:,} pixels") from None
    except Exception as error:
        raise Refused(f"is damaged: {type(error).__name__}: {error}"[:200]) from error


def at_most(picture: Image.Image, pixels: int) -> Image.Image:
    """`picture`, shrunk to about so many pixels where it has more, as diffusers' Flux2ImageProcessor does it."""
    if picture.width * picture.height <= pixels:
        return picture
    scale = math.sqrt(pixels / (picture.width * picture.height))
    return picture.resize((int(picture.width * scale), int(picture.height * scale)), Image.Resampling.LANCZOS)


def fit(picture: Image.Image, size: tuple[int, int], canvas: tuple[int, int]) -> Image.Image:
    """`picture` scaled and cropped to cover `size` with its aspect kept, then its edges repeated out to `canvas`."""
    resampling = Image.Resampling.NEAREST if picture.mode == "L" else Image.Resampling.LANCZOS
    covered = picture if picture.size == size else ImageOps.fit(picture, size, resampling)
    if size == canvas:
        return covered
    left, top = (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2
    right, bottom = canvas[0] - size[0] - left, canvas[1] - size[1] - top
    pixels = np.asarray(covered)
    around = ((top, bottom), (left, right), (0, 0))[: pixels.ndim]
    return Image.fromarray(np.pad(pixels, around, mode="edge"))


def borders(outpaint: Borders, size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels left and right, above and below: a few more where that makes sides of a size that can be drawn, for which
    the picture itself needs no scaling.
    """
    across, down = size[0] + outpaint.left + outpaint.right, size[1] + outpaint.top + outpaint.bottom
    return (outpaint.left, outpaint.right + -across % 8), (outpaint.top, outpaint.bottom + -down % 8)


def widened(pictures: Pictures, around: tuple[tuple[int, int], tuple[int, int]]) -> Pictures:
    """`init_image` with its edges repeated out to the borders, and a mask that has them drawn anew beside what
    `mask_image` says.
    """
    (picture, *_) = pictures["init_image"]
    (mask, *_) = pictures.get("mask_image") or (Image.new("L", picture.size),)
    across, down = around
    repeated = np.pad(np.asarray(picture), (down, across, (0, 0)), mode="edge")
    resized = mask.resize(picture.size, Image.Resampling.NEAREST)
    masked = np.pad(np.asarray(resized), (down, across), constant_values=255)
    return {"init_image": (Image.fromarray(repeated),), "mask_image": (Image.fromarray(masked),)}


def _covers(mask: tuple[int, int], picture: tuple[int, int]) -> bool:
    """A mask may be of another size than its picture, but not of another shape."""
    across, down = (mask[i] / picture[i] for i in (0, 1))
    return max(across, down) <= _MASK_SHAPE * min(across, down)


def _misfit(picture: tuple[int, int], mask: tuple[int, int]) -> Fault:
    told = f"{picture[0]}x{picture[1]}, got {mask[0]}x{mask[1]}"
    return Fault("mask_image", f"must have the shape of init_image, which is {told}")


def canny_edges(picture: Image.Image) -> Image.Image:
    """White edges on black, with the thresholds that FLUX's ControlNets and Canny-dev were shown: 100 and 200."""
    import cv2

    return Image.fromarray(cv2.Canny(np.asarray(picture.convert("L")), 100, 200)).convert("RGB")


# What `preprocess` can make of a plain picture, by control type.
PREPROCESSORS: Mapping[str, Callable[[Image.Image], Image.Image]] = MappingProxyType({"canny": canny_edges})


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
