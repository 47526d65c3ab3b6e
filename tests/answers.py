"""A worker's answers without a worker: small pictures of one colour, which their seeds pick."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Mapping
from typing import Any

from PIL import Image


def picture_file(seed: int, side: int = 8) -> bytes:
    """A PNG of one colour; of noise where it is larger than 64 pixels, and so as large as a photograph."""
    colours = random.Random(seed)
    file = io.BytesIO()
    if side > 64:
        Image.frombytes("RGB", (side, side), colours.randbytes(side * side * 3)).save(file, "PNG", compress_level=0)
    else:
        Image.new("RGB", (side, side), tuple(colours.randbytes(3))).save(file, "PNG")
    return file.getvalue()


def answer(input: Mapping[str, Any], side: int = 8) -> dict[str, Any]:
    """As handler() answers, as far as a client looks."""
    seeds = [input["seed"] + i for i in range(input.get("num_images", 1))]
    return {
        "status": "success",
        "images": [base64.b64encode(picture_file(seed, side)).decode() for seed in seeds],
        "metadata": {"seeds": seeds, "output_format": "PNG", "timings": {"total": 0.1}, "warnings": []},
    }
