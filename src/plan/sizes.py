"""How large a picture is to be: what a request says of it, what its pictures say, what the model likes.

Sizes are pairs of width and height in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from src.catalog import Model, ModeSpec
from src.errors import Fault
from src.plan.geometry import Size
from src.request.schema import MIN_SIDE, Request

REFERENCE_PIXELS = 1024 * 1024  # what is larger Flux2Pipeline shrinks anyway


def reference_pixels(spec: ModeSpec, count: int) -> int:
    """The pixels at which each of `count` references is read."""
    return max(spec.whole_reference, REFERENCE_PIXELS) if count == 1 else REFERENCE_PIXELS


def is_about(picture: Size, size: Size, model: Model, pixels: int) -> bool:
    """Whether a reference that is read at so many `pixels` is as large as `size`, but for rounding down twice at most.

    It goes by the sizes, not by who asked for them: a file says in numbers what its picture said, and gives the same.
    """
    scale = min(1.0, math.sqrt(pixels / (picture[0] * picture[1])), model.max_side / max(picture))
    within = 2 * model.side_multiple
    return all(abs(there * scale - here) < within for there, here in zip(picture, size, strict=True))


def decide_size(
    request: Request, model: Model, picture: Size | None, max_pixels: int, *, whole: int = 0
) -> tuple[Size, list[Fault]]:
    """What `request` asks for; `picture` gives what it leaves open, and where there is none the `model`'s own size.

    What nobody asked for in pixels is made to fit, its shape kept: to as many as the model's own, or as the `picture`'s
    up to `whole`.
    """
    width, height = request.width, request.height
    own = model.width, model.height
    faults = [
        Fault(
            name,
            f"must be less than or equal to {model.max_side}, got {side}; allowed: an integer, a multiple of 8 from "
            f"{MIN_SIDE} to {model.max_side} on {model.name}",
        )
        for name, side in (("width", width), ("height", height))
        if side and side > model.max_side
    ]
    if faults:
        return (width or own[0], height or own[1]), faults
    most = float(own[0] * own[1])
    if request.aspect_ratio or request.megapixels:
        faults = [
            Fault(name, "cannot be combined with aspect_ratio or megapixels, which also set the size")
            for name in ("width", "height")
            if getattr(request, name) is not None
        ]
        across, down = map(int, request.aspect_ratio.split(":")) if request.aspect_ratio else picture or own
        pixels = request.megapixels * 1e6 if request.megapixels else most
        wanted = (math.sqrt(pixels * across / down), math.sqrt(pixels * down / across))
    elif picture is None or (width and height):
        return (width or own[0], height or own[1]), []
    elif width or height:
        shape = picture[0] / picture[1]
        wanted = (width or (height or 0) * shape, height or (width or 0) / shape)
    else:
        if request.outpaint:
            most = math.inf  # what is drawn around a picture leaves its pixels as they are
        wanted = _scaled(picture, max(most, whole))
    asked = bool(request.megapixels or width or height)
    if not asked:
        wanted = _scaled(wanted, min(max_pixels, model.max_side**2 * min(wanted) / max(wanted)))
        enlarged = max(1.0, MIN_SIDE / min(wanted))
        wanted = (wanted[0] * enlarged, wanted[1] * enlarged)
    size = _sides(*wanted, round)
    if not asked and size[0] * size[1] > max_pixels:
        size = _sides(*wanted, math.floor)
    if min(size) < MIN_SIDE or max(size) > model.max_side:
        allowed = f"sides of {MIN_SIDE} to {model.max_side} pixels"
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
