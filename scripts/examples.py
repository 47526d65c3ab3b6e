"""A request for each mode, as docs/api.md shows it, and `make pictures`: what the shipped model draws of them.

A picture within a request is written as the file of docs/pictures that it is.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from src.request.schema import PICTURES
from src.settings import ROOT

FOLDER = ROOT / "docs" / "pictures"
SHIPPED = "flux-shapes"
_COLOURS = 128  # of a file: scenes are flat, and files small


class Example(NamedTuple):
    """A request and what it shows; `model` is a row of the catalog that has the mode."""

    model: str
    shows: str
    fields: Mapping[str, Any]


_SCENE, _MASK = "text-to-image.png", "mask.png"
_EDGES: Mapping[str, Any] = {"control_image": _SCENE, "control_type": "canny", "preprocess": True}

# By mode.
EXAMPLES: Mapping[str, Example] = {
    "text-to-image": Example(
        SHIPPED,
        "A picture of what the prompt says.",
        {"prompt": "a green triangle on an orange background", "seed": 42},
    ),
    "image-to-image": Example(
        SHIPPED,
        "`init_image` is where it starts, and `strength` says how much of it may change.",
        {"prompt": "a blue triangle on an orange background", "init_image": _SCENE, "strength": 0.7, "seed": 1},
    ),
    "editing": Example(
        "FLUX.1-Kontext-dev",
        "The prompt says what is to be different in `init_image`; from FLUX.2 on `init_images` takes several.",
        {"prompt": "make the triangle blue", "init_image": _SCENE, "seed": 1},
    ),
    "inpainting": Example(
        SHIPPED,
        "What is white in `mask_image` is drawn anew; outside of it the very pixels of `init_image` come back. "
        "`outpaint` instead of a mask goes on beyond the edges.",
        {"prompt": "a purple star on an orange background", "init_image": _SCENE, "mask_image": _MASK, "seed": 1},
    ),
    "controlnet": Example(
        SHIPPED,
        "A ControlNet reads `control_image`, which says where things are; `preprocess` makes canny edges of a plain "
        "picture.",
        {"prompt": "a yellow triangle on a blue background", **_EDGES, "seed": 1},
    ),
    "controlnet-image-to-image": Example(
        SHIPPED,
        "Both: the edges hold the shape, `init_image` gives colours to start from.",
        {"prompt": "a red triangle on an orange background", "init_image": _SCENE, "strength": 0.8, **_EDGES,
         "seed": 1},
    ),
    "controlnet-inpainting": Example(
        SHIPPED,
        "Within the mask alone, along the edges.",
        {"prompt": "a white triangle on an orange background", "init_image": _SCENE, "mask_image": _MASK, **_EDGES,
         "seed": 1},
    ),
    "control": Example(
        "FLUX.1-Canny-dev",
        "A model that was trained with the control picture reads it by itself: edges by Canny, depth by Depth.",
        {"prompt": "a marble triangle on sand", "control_image": _SCENE, "preprocess": True, "seed": 1},
    ),
    "control-image-to-image": Example(
        "FLUX.1-Canny-dev",
        "With a picture to start from.",
        {"prompt": "a marble triangle on sand", "init_image": _SCENE, "strength": 0.8, "control_image": _SCENE,
         "preprocess": True, "seed": 1},
    ),
    "control-inpainting": Example(
        "FLUX.1-Canny-dev",
        "Within a mask.",
        {"prompt": "a marble triangle on sand", "init_image": _SCENE, "mask_image": _MASK, "control_image": _SCENE,
         "preprocess": True, "seed": 1},
    ),
}  # fmt: skip


def drawn_modes() -> list[str]:
    """The modes whose pictures the shipped model draws."""
    return [mode for mode, example in EXAMPLES.items() if example.model == SHIPPED]


def pictures_of(example: Example) -> dict[str, str]:
    """The files of docs/pictures that a request holds, by its fields."""
    return {name: value for name, value in example.fields.items() if name in PICTURES}


def with_pictures(example: Example, folder: Path = FOLDER) -> dict[str, Any]:
    """The request as it is sent."""
    texts = {
        name: base64.b64encode((folder / file).read_bytes()).decode() for name, file in pictures_of(example).items()
    }
    return {**example.fields, **texts}


def draw_mask() -> Image.Image:
    """The middle of the scene in white."""
    mask = Image.new("L", (128, 128))
    ImageDraw.Draw(mask).rectangle((24, 24, 103, 103), fill=255)
    return mask


def draw(handler: Callable[[dict[str, Any]], dict[str, Any]], folder: Path) -> None:
    """Put the mask and each mode's picture into `folder`; later examples start from the first one's."""
    draw_mask().save(folder / _MASK, optimize=True)
    for mode in drawn_modes():
        response = handler({"id": mode, "input": with_pictures(EXAMPLES[mode], folder)})
        if response["status"] != "success" or response["metadata"]["mode"] != mode:
            raise ValueError(f"{mode}: {response.get('error') or response['metadata']['mode']}")
        with Image.open(io.BytesIO(base64.b64decode(response["images"][0]))) as picture:
            picture.convert("RGB").quantize(_COLOURS).save(folder / f"{mode}.png", optimize=True)


def main() -> None:
    """Draw them into docs/pictures."""
    os.environ["MODEL_NAME"] = SHIPPED
    from handler import handler

    FOLDER.mkdir(exist_ok=True)
    draw(handler, FOLDER)


if __name__ == "__main__":
    main()
