from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from src.images import FORMATS, encode_image, image_to_base64, read_parameters

PARAMETERS = {"prompt": "a «red» circle 🔴", "seed": 2**63 - 1, "guidance_scale": 3.5}


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (72, 104, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((208, 144))


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_has_its_format_size_and_parameters(format: str, picture: Image.Image) -> None:
    file = Image.open(io.BytesIO(encode_image(picture, format, 90, PARAMETERS)))
    assert (file.format, file.size, file.mode) == (format, picture.size, "RGB")
    assert read_parameters(file) == PARAMETERS


def test_png_keeps_every_pixel(picture: Image.Image) -> None:
    file = Image.open(io.BytesIO(encode_image(picture)))
    assert np.array_equal(np.asarray(file), np.asarray(picture))


@pytest.mark.parametrize("format", [name for name, row in FORMATS.items() if row.quality])
def test_quality_is_heard(format: str, picture: Image.Image) -> None:
    assert len(encode_image(picture, format, 30)) < len(encode_image(picture, format, 95))


@pytest.mark.parametrize("format", FORMATS)
def test_the_longest_prompts_fit_into_a_file(format: str, picture: Image.Image) -> None:
    longest = {"prompt": "🔴" * 5_000, "negative_prompt": "長" * 5_000}
    file = Image.open(io.BytesIO(encode_image(picture, format, 90, longest)))
    assert read_parameters(file) == longest


def test_the_specifications_function(picture: Image.Image) -> None:
    assert Image.open(io.BytesIO(base64.b64decode(image_to_base64(picture)))).format == "PNG"
    assert Image.open(io.BytesIO(base64.b64decode(image_to_base64(picture, format="WEBP")))).format == "WEBP"


def test_a_file_of_others_has_no_parameters(picture: Image.Image) -> None:
    assert read_parameters(picture) is None
    for text in ("not json", "[1]"):
        picture.info["parameters"] = text
        assert read_parameters(picture) is None
    del picture.info["parameters"]
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0hello"
    file = io.BytesIO()
    picture.save(file, "JPEG", exif=exif)
    assert read_parameters(Image.open(file)) is None
