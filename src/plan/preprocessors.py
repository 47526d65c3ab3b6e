"""Control pictures made of plain ones, for requests that ask for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image


def canny_edges(picture: Image.Image) -> Image.Image:
    """White edges on black (RGB), with the thresholds that FLUX's ControlNets and Canny-dev were shown: 100 and 200."""
    import cv2

    return Image.fromarray(cv2.Canny(np.asarray(picture.convert("L")), 100, 200)).convert("RGB")


# What `preprocess` can make of a plain picture, by control type.
PREPROCESSORS: Mapping[str, Callable[[Image.Image], Image.Image]] = MappingProxyType({"canny": canny_edges})
