"""Pictures and the files that carry them, and the request that a picture's file keeps.

Nothing here knows of models or requests.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping
from typing import Any

from PIL import ExifTags, Image

from src.catalog import FORMATS
from src.response.png import encode_png

_SOFTWARE = "FLUX worker for RunPod"
_PARAMETERS = "parameters"
_HALF = re.compile("[\ud800-\udfff]")
_UNICODE = b"UNICODE\0"  # EXIF 2.32, table 9: the character code of a UserComment in UTF-16


def encode_image(
    image: Image.Image,
    format: str = "PNG",
    quality: int = 95,
    parameters: Mapping[str, Any] | None = None,
    *,
    lossless: bool = False,
) -> bytes:
    """`image` (RGB) as a file of `format`, a key of FORMATS; `quality` 1 to 100 where the format takes one.

    `lossless` is for WEBP: every pixel is kept, and the file is smaller than a PNG and takes longer.

    `parameters` is kept in the file as JSON, where that can carry it: PNG text, or the EXIF user comment of others.
    """
    text = None
    if parameters is not None and can_carry(format, parameters):
        text = _as_json(parameters)
    if format == "PNG":
        return encode_png(image, {} if text is None else {_PARAMETERS: text, "Software": _SOFTWARE})
    row = FORMATS[format]
    options: dict[str, Any] = {**({"quality": quality} if row.quality else {}), **row.options}
    if lossless:
        options |= {"lossless": True, "quality": 0, "method": 0}  # the least effort: a tenth larger, six times faster
    if text is not None:
        exif = Image.Exif()
        exif[ExifTags.Base.Software] = _SOFTWARE
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _UNICODE + _utf_16(text)
        options["exif"] = exif
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def can_carry(format: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a file of `format` has room for `parameters`."""
    room = FORMATS[format].max_text
    return room is None or len(_utf_16(_as_json(parameters))) <= room


def _as_json(parameters: Mapping[str, Any]) -> str:
    """Text of Unicode: half a character, which JSON may hold and no file, stays escaped."""
    return _HALF.sub(lambda half: f"\\u{ord(half[0]):04x}", json.dumps(parameters, ensure_ascii=False))


def _utf_16(text: str) -> bytes:
    return text.encode("utf-16-le")


def image_to_base64(
    image: Image.Image, format: str = "PNG", quality: int = 95, parameters: Mapping[str, Any] | None = None
) -> str:
    """`encode_image` in base64."""
    return base64.b64encode(encode_image(image, format, quality, parameters)).decode("ascii")


def read_parameters(image: Image.Image) -> dict[str, Any] | None:
    """What `encode_image` kept in the file that `image` was opened from; None where there is nothing of ours."""
    text = image.info.get(_PARAMETERS)
    if text is None:
        comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
        if not isinstance(comment, bytes) or not comment.startswith(_UNICODE):
            return None
        text = comment.removeprefix(_UNICODE).decode("utf-16-le", errors="replace")
    try:
        parameters = json.loads(text)
    except ValueError:
        return None
    return parameters if isinstance(parameters, dict) else None
