"""How large a picture is to be: what a request says of it, what its pictures say, what the model likes.

Sizes are pairs of width and height in pixels.
"""

from __future__ import annotations

import math

from src.errors import Fault
from src.request import Request

Size = tuple[int, int]


def decide_size(request: Request, model: Size, picture: Size | None) -> tuple[Size, list[Fault]]:
    """What `request` asks for; `picture` gives what it leaves open, and where there is none the `model`'s own size."""
    if not (request.aspect_ratio or request.megapixels):
        if picture is None:
            return (request.width or model[0], request.height or model[1]), []
        return _from_picture(picture, request.width, request.height, model[0] * model[1]), []
    faults = [
        Fault(name, "cannot be given beside aspect_ratio or megapixels, which say it too")
        for name in ("width", "height")
        if getattr(request, name) is not None
    ]
    across, down = map(int, request.aspect_ratio.split(":")) if request.aspect_ratio else picture or model
    pixels = request.megapixels * 1e6 if request.megapixels else model[0] * model[1]
    return _sides(math.sqrt(pixels * across / down), math.sqrt(pixels * down / across)), faults


def canvas(size: Size, multiple: int) -> Size:
    """The smallest of sides that are such multiples which holds `size`."""
    width, height = (-(-side // multiple) * multiple for side in size)
    return width, height


def shrunk(size: Size, most: int, multiple: int) -> Size:
    """`size`, or one of its shape whose sides are such multiples and which has at most so many pixels."""
    width, height = canvas(size, multiple)
    if width * height <= most:
        return size
    scale = math.sqrt(most / (width * height))
    w, h = (max(math.floor(side * scale / multiple) * multiple, 64) for side in (width, height))
    return w, h


def _from_picture(picture: Size, width: int | None, height: int | None, most: int) -> Size:
    """The picture's own size, or one of its shape with at most so many pixels; what is given stays."""
    shape = picture[0] / picture[1]
    if width and height:
        return width, height
    if width or height:
        wanted = (width or (height or 0) * shape, height or (width or 0) / shape)
    else:
        scale = min(1.0, math.sqrt(most / (picture[0] * picture[1])))
        wanted = (picture[0] * scale, picture[1] * scale)
    w, h = _sides(*wanted)
    return width or w, height or h


def _sides(width: float, height: float) -> Size:
    """The nearest that a request may ask for."""
    w, h = (min(max(round(side / 8) * 8, 64), 2048) for side in (width, height))
    return w, h
