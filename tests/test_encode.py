from __future__ import annotations

import base64
import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from src.catalog import FORMATS
from src.response.encode import can_carry, encode_image, image_to_base64, read_parameters
from src.settings import ROOT

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


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """Name and data of each, checksums checked."""
    found, at = [], 8
    while at < len(png):
        length, name = struct.unpack_from(">I4s", png, at)
        data = png[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", png, at + 8 + length) == (zlib.crc32(name + data),)
        found.append((name, data))
        at += 12 + length
    return found


@pytest.mark.parametrize("height", [1, 2, 17, 300])
@pytest.mark.parametrize("width", [*range(1, 20), 333, 2047])
def test_png_of_any_size_is_whole(width: int, height: int) -> None:
    shape = (height, width, 3)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    falling = -np.arange(height).astype(np.uint8)[:, None, None]  # each row less the one above it is 255 everywhere
    for pixels in (noise, noise // 64, np.full(shape, 255, np.uint8), np.broadcast_to(falling, shape).copy()):
        png = encode_image(Image.fromarray(pixels), parameters=PARAMETERS)
        header, *texts, own, (name, data), end = chunks(png)
        assert header == (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        assert ([text[0] for text in texts], own[0], name, end) == ([b"iTXt"] * 2, b"fdEC", b"IDAT", (b"IEND", b""))
        assert len(zlib.decompress(data)) == height * (1 + 3 * width)
        file = Image.open(io.BytesIO(png))
        assert np.array_equal(np.asarray(file), pixels)
        assert read_parameters(file) == PARAMETERS


def test_png_is_the_same_bytes_from_many_threads() -> None:
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 64, (97, 131 + i, 3), dtype=np.uint8)) for i in range(32)]
    alone = [encode_image(picture, parameters=PARAMETERS) for picture in pictures]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda picture: encode_image(picture, parameters=PARAMETERS), pictures * 10))
    assert together == alone * 10


def test_png_leaves_no_half_loaded_opencv() -> None:
    script = "import sys, src.response.png; assert 'cv2' not in sys.modules; import cv2; assert type(cv2) is type(sys)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("format", [name for name, row in FORMATS.items() if row.quality])
def test_quality_counts(format: str, picture: Image.Image) -> None:
    assert len(encode_image(picture, format, 30)) < len(encode_image(picture, format, 95))


@pytest.mark.parametrize("format", FORMATS)
def test_the_longest_prompts_fit_into_a_file(format: str, picture: Image.Image) -> None:
    longest = {"prompt": "🔴" * 5_000, "negative_prompt": "長" * 5_000}
    file = Image.open(io.BytesIO(encode_image(picture, format, 90, longest)))
    assert read_parameters(file) == longest


def test_a_request_that_a_format_cannot_carry_is_left_out(picture: Image.Image) -> None:
    long = {"prompt": ["🔴" * 5_000] * 4}
    kept = {
        format: read_parameters(Image.open(io.BytesIO(encode_image(picture, format, 90, long)))) for format in FORMATS
    }
    assert kept == {format: long if row.max_text is None else None for format, row in FORMATS.items()}
    assert [format for format in FORMATS if not can_carry(format, long)] == ["JPEG"]


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


@pytest.mark.parametrize("format", FORMATS)
def test_half_a_character_of_a_request_is_kept(format: str, picture: Image.Image) -> None:
    half = {"prompt": "a \ud800 \udfff circle \\ud800", "seed": 1}
    file = Image.open(io.BytesIO(encode_image(picture, format, 90, half)))
    assert read_parameters(file) == half
