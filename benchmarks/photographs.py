"""Photographs of any size, for whatever must be measured on real pictures."""

from __future__ import annotations

import numpy as np
from PIL import Image
from skimage import data

_NAMES = ("astronaut", "chelsea", "coffee", "rocket")


def photographs(count: int, side: int) -> list[Image.Image]:
    """`count` RGB pictures of `side` x `side`: scikit-image's own, enlarged, with a sensor's noise put back."""
    rng = np.random.default_rng(0)
    pictures = []
    for i in range(count):
        photo = Image.fromarray(getattr(data, _NAMES[i % len(_NAMES)])()).convert("RGB")
        pixels = np.asarray(photo.resize((side, side), Image.Resampling.LANCZOS), float)
        pixels = pixels + rng.normal(0, 1, (side, side, 3))
        pictures.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return pictures
