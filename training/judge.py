"""Looks at a picture of one shape, or of two by halves, and says what is in it; tests hold it to drawn scenes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from training.scenes import COLOURS, OUTLINES, RELATIONS, draw, lone

_NAMES = list(COLOURS)
_RGB = np.array(list(COLOURS.values()), dtype=np.int32)
_SIDE = 48


def name_colours(picture: Image.Image) -> NDArray[np.intp]:
    """The nearest colour of each pixel as an index into COLOURS, [height, width]."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.int32)
    nearest: NDArray[np.intp] = np.argmin(((pixels[:, :, None, :] - _RGB) ** 2).sum(-1), axis=-1)
    return nearest


def centre_colour(picture: Image.Image) -> str:
    """The commonest colour of the middle tenth."""
    named = name_colours(picture)
    (h, w), reach = named.shape, max(1, min(named.shape) // 20)
    return _commonest(named[h // 2 - reach : h // 2 + reach, w // 2 - reach : w // 2 + reach])


def background_colour(picture: Image.Image) -> str:
    """The commonest colour of a frame of two pixels."""
    named = name_colours(picture)
    return _commonest(
        np.concatenate([named[:2].ravel(), named[-2:].ravel(), named[:, :2].ravel(), named[:, -2:].ravel()])
    )


def shape(picture: Image.Image) -> str | None:
    """The shape whose outline, stretched over what is not background, covers it best; None if there is nothing."""
    mask = name_colours(picture) != _NAMES.index(background_colour(picture))
    seen = _normalised(mask)
    if seen is None:
        return None
    return max(_TEMPLATES, key=lambda name: _overlap(seen, _TEMPLATES[name]))


def halves(picture: Image.Image, layout: str) -> tuple[Image.Image, Image.Image]:
    """Where the first and the second thing of a pair are to be; `layout` names a row of RELATIONS."""
    w, h = picture.size
    if layout in ("above", "below"):
        one, other = picture.crop((0, 0, w, h // 2)), picture.crop((0, h // 2, w, h))
    else:
        one, other = picture.crop((0, 0, w // 2, h)), picture.crop((w // 2, 0, w, h))
    return (one, other) if RELATIONS[layout][0] < RELATIONS[layout][1] else (other, one)


def _commonest(named: NDArray[np.intp]) -> str:
    return _NAMES[int(np.bincount(named.ravel(), minlength=len(_NAMES)).argmax())]


def _normalised(mask: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """`mask` cut to its bounding box and stretched to a square."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if rows.size < 4 or columns.size < 4:
        return None
    box = Image.fromarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    return np.asarray(box.resize((_SIDE, _SIDE), Image.Resampling.NEAREST))


def _overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


def _templates() -> Mapping[str, NDArray[np.bool_]]:
    templates = {}
    for name in OUTLINES:
        picture = draw(lone("black", name, "white", "large"), 256, 256)
        mask = _normalised(np.asarray(picture.convert("L")) < 128)
        assert mask is not None
        templates[name] = mask
    return templates


_TEMPLATES = _templates()
