"""A client's pictures: base64, data URI or https URL -> upright RGB pictures, or the reason why not.

Everything that came over the wire is taken for hostile: nothing larger than the caps is read, and no pixel is decoded
before its picture's size is known.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
import pi_heif
from PIL import Image, ImageOps, UnidentifiedImageError

from src.catalog import FORMATS
from src.errors import Fault, Refused, redact
from src.job import Job
from src.request.fetch import is_url, open_url
from src.request.schema import PICTURES, Request, unquoted
from src.wording import show

Fetch = Callable[[str], bytes]
Pictures = Mapping[str, tuple[Image.Image, ...]]  # by what they are for, a key of PICTURES, in the request's order

MAX_BYTES = 20_000_000  # what /runsync carries
MAX_INPUT_PIXELS = 64_000_000  # 8000 x 8000: more than cameras make, and 200 MB once decoded
MAX_PIXELS_TOGETHER = 2 * MAX_INPUT_PIXELS  # of a request
MIN_INPUT_SIDE = 16
WHITE = 128  # the least that counts as white in a mask, as diffusers' VaeImageProcessor.binarize has it
READABLE = tuple(dict.fromkeys((*FORMATS, "BMP", "TIFF")))  # what is written can be sent again
_FORMATS_READ = ", ".join((*READABLE, "HEIC"))
ALLOWED = f"a still picture ({_FORMATS_READ}) as base64, a data URI or an https URL, at most {MAX_BYTES // 10**6} MB"
_FETCH_SECONDS = 30
_DATA_URI = re.compile(r'(data\s*:)?((?:"[^"]*"|[^,"]){0,1000}),(\s*base64\s*,)?', re.IGNORECASE)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
# A path that is base64 too, such as /etc/passwd; base64 of JPEG and JPEG XL begins with a slash as well.
_PATH = re.compile(
    r"(?:/(?!9j|w[o-r])|~|\.\.?[/\\]|[a-z]:[/\\]|\\).{0,260}|[^,:{<]{1,260}\.[a-z]\w{1,4}", re.IGNORECASE
)
_SHORTEST = 24  # characters of base64: what is shorter is a word such as null

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


pi_heif.register_heif_opener(thumbnails=False)  # HEIC, which phones send


class LoadedPictures(NamedTuple):
    """A request's pictures, the faults of those that cannot be used, and warnings of what was read otherwise."""

    pictures: Pictures
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]


def load_pictures(request: Request, job: Job, fetch: Fetch | None = None) -> LoadedPictures:
    """The request's pictures, masks as L and others as RGB.

    While pictures are fetched other jobs may pass `job`, and its end ends the fetching.
    """
    sources = request.sources()
    if any(is_url(source) for *_, source in sources):
        job.step_aside()
    pictures: dict[str, tuple[Image.Image, ...]] = {}
    faults, found, room = [], list[str](), MAX_PIXELS_TOGETHER
    for kind, field, source in sources:
        try:
            file = read_source(source, fetch or partial(fetch_url, check=job.check))
            notes: list[str] = []
            picture = decode(file, PICTURES[kind], room, notes.append, by_alpha=request.mask_by_alpha)
            found += [f"{field} {note}" for note in notes]
            pictures[kind] = (*pictures.get(kind, ()), picture)
            room -= picture.width * picture.height
        except Refused as error:
            faults.append(Fault(field, redact(f"{error}; allowed: {ALLOWED}")))
    return LoadedPictures(pictures, tuple(faults), tuple(found))


def read_source(source: str, fetch: Fetch) -> bytes:
    """The file that `source` holds or names; raises Refused where there is none to be had."""
    source = unquoted(source)
    if is_url(source):
        return fetch(source)
    if source[:7].lower() == "data%3a":
        source = unquote(source)
    uri = _DATA_URI.match(source)
    if uri and (uri[1] or uri[2].strip().lower().endswith("base64")):
        kind, *parameters = (part.strip().lower() for part in uri[2].split(";"))
        body = source[uri.end() :]
        if not ("base64" in (kind, *parameters) or uri[3]):
            if kind.startswith("text/"):
                raise Refused(f"is a data: address of {show(kind)}, not of a picture")
            raw = unquote_to_bytes(body)
            if not raw.isascii() or b"<" in raw:  # the file itself, not in base64
                return raw
        if not body.strip():
            raise Refused("is empty: nothing follows the comma of its data: address")
        return _from_base64(body)
    if _PATH.fullmatch(source):
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
    if text.lstrip()[:1] in ("<", "{", "["):
        name, advice = _looks_like(text[:4_096].encode(errors="replace")) or ("text", _NO_FILE)
        raise Refused(f"is not valid base64: it looks like {name} ({len(text):,} characters); {advice}")
    if "%" in text:
        text = unquote(text)
    if "\\" in text:  # what JSON within JSON escaped
        text = re.sub(r"\\[nrt]|\\", "", text)
    text = "".join(unquoted(text).split()).replace("-", "+").replace("_", "/").rstrip("=")
    if not text:
        raise Refused("is empty: it holds no base64")
    if len(text) > MAX_BYTES * 4 / 3 + 4:
        raise Refused(f"is too large: {len(text):,} characters of base64")
    if strange := re.search(r"[^A-Za-z0-9+/]", text):
        raise Refused(f"is not valid base64: character {strange.start() + 1:,} of {len(text):,} is {show(strange[0])}")
    if len(text) < _SHORTEST:
        raise Refused(f"is too short for a picture in base64: {len(text)} characters, {show(text)}")
    if len(text) % 4 == 1:
        raise Refused(
            f"is not valid base64: of its {len(text):,} characters one is too many, or up to three are missing"
        )
    return base64.b64decode(text + "=" * (-len(text) % 4))


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
    all over. `warn` gets what a client may not expect. Raises Refused with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # measured below, by our own cap
            picture = Image.open(io.BytesIO(file), formats=(*READABLE, "HEIF"))
        width, height = picture.size
        if width * height > MAX_INPUT_PIXELS:
            raise Refused(f"has {width}x{height} pixels, more than {MAX_INPUT_PIXELS:,}")
        if width * height > room:
            together = f"this request's pictures together more than {MAX_PIXELS_TOGETHER:,}"
            raise Refused(f"has {width}x{height} pixels, and {together}")
        if min(picture.size) < MIN_INPUT_SIDE:
            raise Refused(f"has {width}x{height} pixels, and each side must have {MIN_INPUT_SIDE} at least")
        if getattr(picture, "is_animated", False) and picture.format != "MPO":  # a JPEG with others behind it
            if picture.format not in ("TIFF", "HEIF"):
                raise Refused("is animated: send one of its frames")
            warn(f"has {getattr(picture, 'n_frames', 'several')} pages, of which the first is used")
        upright: Image.Image = ImageOps.exif_transpose(picture)
        if mode == "L" and (mask := _from_alpha(upright, by_alpha)):
            warn(
                "is read by its transparency: what is transparent is drawn anew, what is opaque is kept; send "
                "mask_image without transparency, white where it is to be drawn anew, to have it read by its colours"
            )
            return mask
        return _flat(upright, mode)
    except Refused:
        raise
    except UnidentifiedImageError:
        if found := _looks_like(file):
            raise Refused(f"is {found[0]} ({len(file):,} bytes), which is not read here: {found[1]}") from None
        raise Refused(f"is not a picture in one of these formats ({len(file):,} bytes)") from None
    except Image.DecompressionBombError:
        raise Refused(f"has far more than {MAX_INPUT_PIXELS:,} pixels") from None
    except Exception as error:
        raise Refused(f"is damaged: {type(error).__name__}: {error}"[:200]) from error


def _from_alpha(picture: Image.Image, always: bool) -> Image.Image | None:
    """The mask in the transparency of `picture`, as OpenAI's clients send it: `always`, or where its colours hold none.

    None where its transparency holds no mask either.
    """
    if not picture.has_transparency_data:
        return None
    alpha = picture.convert("RGBA").getchannel("A")
    if is_black(alpha) or is_black(ImageOps.invert(alpha)):
        return None
    colours = _flat(picture, "L")
    strokes = bool(
        (np.asarray(colours)[np.asarray(alpha) >= WHITE] >= WHITE).all()
    )  # white ones, of an editor's canvas
    return ImageOps.invert(alpha) if is_black(colours) or (always and not strokes) else None


def is_black(mask: Image.Image) -> bool:
    """Whether no pixel of it is white, and so nothing would be drawn anew."""
    return bool(np.asarray(mask).max() < WHITE)


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


def _looks_like(file: bytes) -> tuple[str, str] | None:
    """What was sent instead of a picture that is read here, and what to do about it."""
    start = file[:4_096]
    found = ((name, advice) for begins, name, advice in _OTHERS if re.match(begins, start, re.DOTALL))
    return next(found, None)
