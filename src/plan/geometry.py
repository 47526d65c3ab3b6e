"""Pictures of one size made into pictures of another: scaled, cropped, shrunk, widened.

Sizes are pairs of width and height in pixels; a padding is two pairs: pixels left and right, above and below.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageOps

from src.request.schema import Borders

Size = tuple[int, int]
Padding = tuple[tuple[int, int], tuple[int, int]]

_MASK_SHAPE = 1.05  # how much longer or wider than its picture a mask may be


def at_most(picture: Image.Image, pixels: int) -> Image.Image:
    """`picture`, shrunk to about so many pixels where it has more, as diffusers' Flux2ImageProcessor does it."""
    if picture.width * picture.height <= pixels:
        return picture
    scale = math.sqrt(pixels / (picture.width * picture.height))
    return picture.resize((int(picture.width * scale), int(picture.height * scale)), Image.Resampling.LANCZOS)


def fit(picture: Image.Image, size: Size, canvas: Size) -> Image.Image:
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


def covers(mask: Size, picture: Size) -> bool:
    """A mask may be of another size than its picture, but not of another shape."""
    across, down = (mask[i] / picture[i] for i in (0, 1))
    return max(across, down) <= _MASK_SHAPE * min(across, down)


def padding(outpaint: Borders, size: Size) -> Padding:
    """What `outpaint` asks for, and a few pixels more where that makes sides of a size that can be drawn, for which the
    picture itself needs no scaling.
    """
    across, down = size[0] + outpaint.left + outpaint.right, size[1] + outpaint.top + outpaint.bottom
    return (outpaint.left, outpaint.right + -across % 8), (outpaint.top, outpaint.bottom + -down % 8)


def widen(picture: Image.Image, mask: Image.Image, around: Padding) -> tuple[Image.Image, Image.Image]:
    """`picture` (RGB) with its edges repeated into the padding, and `mask` (L, as large) white there."""
    across, down = around
    repeated = np.pad(np.asarray(picture), (down, across, (0, 0)), mode="edge")
    masked = np.pad(np.asarray(mask), (down, across), constant_values=255)
    return Image.fromarray(repeated), Image.fromarray(masked)
