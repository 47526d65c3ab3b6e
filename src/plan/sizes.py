"""How large a picture is to be: what a request says of it, what its pictures say, what the model likes.

Sizes are pairs of width and height in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from src.errors import Fault
from src.plan.geometry import Size
from src.request.schema import MAX_SIDE, MIN_SIDE, Request

REFERENCE_PIXELS = 1024 * 1024  # what is larger Flux2Pipeline shrinks anyway


def is_about(picture: Size, size: Size, multiple: int) -> bool:
    """Whether a reference is as large as `size` but for what rounding to such multiples takes off twice at most.

    It goes by the sizes, not by who asked for them: a file says in numbers what its picture said, and gives the same.
    """
    scale = min(1.0, math.sqrt(REFERENCE_PIXELS / (picture[0] * picture[1])), MAX_SIDE / max(picture))
    return all(abs(there * scale - here) < 2 * multiple for there, here in zip(picture, size, strict=True))


def decide_size(request: Request, model: Size, picture: Size | None, max_pixels: int) -> tuple[Size, list[Fault]]:
    """What `request` asks for; `picture` gives what it leaves open, and where there is none the `model`'s own size.

    What nobody asked for in pixels is made to fit, its shape kept.
    """
    width, height = request.width, request.height
    faults: list[Fault] = []
    most = float(model[0] * model[1])
    if request.aspect_ratio or request.megapixels:
        faults = [
            Fault(name, "cannot be combined with aspect_ratio or megapixels, which also set the size")
            for name in ("width", "height")
            if getattr(request, name) is not None
        ]
        across, down = map(int, request.aspect_ratio.split(":")) if request.aspect_ratio else picture or model
        pixels = request.megapixels * 1e6 if request.megapixels else most
        wanted = (math.sqrt(pixels * across / down), math.sqrt(pixels * down / across))
    elif picture is None or (width and height):
        return (width or model[0], height or model[1]), []
    elif width or height:
        shape = picture[0] / picture[1]
        wanted = (width or (height or 0) * shape, height or (width or 0) / shape)
    else:
        if request.outpaint:
            most = math.inf  # what is drawn around a picture leaves its pixels as they are
        wanted = _scaled(picture, most)
    asked = bool(request.megapixels or width or height)
    if not asked:
        wanted = _scaled(wanted, min(max_pixels, MAX_SIDE**2 * min(wanted) / max(wanted)))
        enlarged = max(1.0, MIN_SIDE / min(wanted))
        wanted = (wanted[0] * enlarged, wanted[1] * enlarged)
    size = _sides(*wanted, round)
    if not asked and size[0] * size[1] > max_pixels:
        size = _sides(*wanted, math.floor)
    if min(size) < MIN_SIDE or max(size) > MAX_SIDE:
        allowed = f"sides of {MIN_SIDE} to {MAX_SIDE} pixels"
        faults.append(
            Fault(
                asking_field(request) or "init_image",
                f"would make a picture of {size[0]}x{size[1]}; allowed: {allowed}",
            )
        )
    return size, faults


def asking_field(request: Request) -> str | None:
    """The field that says how large the picture is to be."""
    named = ("aspect_ratio", "megapixels", "width", "height")
    return next((name for name in named if getattr(request, name) is not None), None)


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


def _scaled(size: tuple[float, float], most: float) -> tuple[float, float]:
    """`size`, or one of its shape that has `most` pixels where it has more."""
    scale = min(1.0, math.sqrt(most / (size[0] * size[1])))
    return size[0] * scale, size[1] * scale


def _sides(width: float, height: float, rounded: Callable[[float], int]) -> Size:
    """The nearest, or the nearest below, that a request may ask for."""
    return rounded(width / 8) * 8, rounded(height / 8) * 8
