"""`python -m benchmarks.encoding`: the ways to write a picture, side by side in one run on one thread.

Every way that is said to be exact is decoded and compared. Measured on photographs and on flat shapes that the shipped
model's autoencoder decoded: milliseconds and bytes of each way, how a decoded tensor becomes a picture, and what base64
and JSON add for four pictures. Wants an idle machine. Writes results/encoding.json and results/encoding.png.
"""

from __future__ import annotations

import base64
import io
import json
import struct
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import fpng
import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from isal import igzip_lib, isal_zlib
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.machine import machine
from benchmarks.photographs import photographs
from src.response.encode import encode_image
from training.scenes import draw, pair

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SIDE = 1024
ROUNDS = 9
PARAMETERS = {"prompt": "a red star on black", "seed": 42}  # what a file says of itself
Encode = Callable[[Image.Image], bytes]


def main() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    pictures = {"photographs": photographs(4, SIDE), "shapes": [shapes(SIDE)]}
    results: dict[str, Any] = {
        "machine": machine() | {name: version(name) for name in ("pillow", "opencv-python-headless", "isal", "fpng")},
        "side": SIDE,
        "rounds": ROUNDS,
        "ways": files(pictures, ROUNDS),
        "assembly": assembly(SIDE, ROUNDS),
        "response": response(pictures["photographs"], ROUNDS),
    }
    (RESULTS / "encoding.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results["ways"]).savefig(RESULTS / "encoding.png", dpi=80)
    print(json.dumps(results, indent=2))


def shapes(side: int) -> Image.Image:
    """A scene as the shipped model would deliver it: flat, but for what its autoencoder adds."""
    scene = pair(("medium", "red", "circle"), "left of", ("large", "blue", "star"), "white")
    pixels = torch.from_numpy(np.array(draw(scene, side, side))).permute(2, 0, 1)[None] / 127.5 - 1
    vae = AutoencoderKL.from_pretrained(ROOT / "models" / "flux-shapes", subfolder="vae")
    with torch.inference_mode():
        return diffusers_way(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)[0]


# --- files ---


@dataclass(frozen=True)
class Way:
    """One way to write a file; `module` is what may not be installed."""

    library: str
    how: str
    encode: Encode
    module: str = ""
    exact: bool = True

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.library, self.how)))

    @property
    def missing(self) -> bool:
        return bool(self.module) and find_spec(self.module) is None

    def encode_all(self, pictures: list[Image.Image]) -> list[bytes]:
        return [self.encode(picture) for picture in pictures]


def _pillow(**options: int) -> Encode:
    def encode(picture: Image.Image) -> bytes:
        file = io.BytesIO()
        picture.save(file, "PNG", **options)
        return file.getvalue()

    return encode


def _opencv(**options: str) -> Encode:
    """`options` by the ends of OpenCV's names: strategy="RLE" is IMWRITE_PNG_STRATEGY, IMWRITE_PNG_STRATEGY_RLE."""
    names = [(f"IMWRITE_PNG_{key}".upper(), value) for key, value in options.items()]
    flags = [getattr(cv2, flag) for key, value in names for flag in (key, f"{key}_{value}")]

    def encode(picture: Image.Image) -> bytes:
        written, file = cv2.imencode(".png", cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR), flags)
        assert written
        return file.tobytes()

    return encode


def _imagecodecs(strategy: str, filter: str) -> Encode:
    def encode(picture: Image.Image) -> bytes:
        from imagecodecs import PNG, png_encode

        options = {"level": 1, "strategy": PNG.STRATEGY[strategy], "filter": PNG.FILTER[filter]}
        return bytes(png_encode(np.asarray(picture), **options))

    return encode


def _fpng(picture: Image.Image) -> bytes:
    return bytes(fpng.from_bytes(picture.tobytes(), *picture.size, 3))


def _fpng_two_passes(picture: Image.Image) -> bytes:
    """fpng-py binds the same library with its options; for Linux it has to be compiled."""
    fpng_py = import_module("fpng_py")
    flags = fpng_py.CompressionFlags.FPNG_ENCODE_SLOWER
    return bytes(fpng_py.fpng_encode_image_to_memory(picture.tobytes(), *picture.size, 3, flags))


def _isal(rows: np.ndarray) -> bytes:
    """What this worker wrote before fpng."""
    return isal_zlib.compress(rows, 1)


def _isal_near(rows: np.ndarray) -> bytes:
    """No match from farther than 2**9 bytes: after the filter hardly any is worth its search."""
    return igzip_lib.compress(rows, 1, igzip_lib.COMP_ZLIB, hist_bits=9)


def _by_hand(compress: Callable[[np.ndarray], bytes]) -> Encode:
    return lambda picture: _png(picture, compress)


def _png(picture: Image.Image, compress: Callable[[np.ndarray], bytes]) -> bytes:
    """Each row less the one above it, then any compressor; ISA-L's checksum."""
    rows = np.asarray(picture).reshape(picture.height, -1)
    filtered = np.empty((rows.shape[0], 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = 2  # Up
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", *picture.size, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", compress(filtered)), (b"IEND", b""))
    parts = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        parts += (struct.pack(">I", len(data)), kind, data)
        parts.append(struct.pack(">I", isal_zlib.crc32(data, isal_zlib.crc32(kind))))
    return b"".join(parts)


WAYS = (
    Way("Pillow", "", _pillow()),
    Way("Pillow", "level 1", _pillow(compress_level=1)),
    Way("Pillow", "level 1, RLE", _pillow(compress_level=1, compress_type=zlib.Z_RLE)),
    Way("Pillow", "level 1, Huffman only", _pillow(compress_level=1, compress_type=zlib.Z_HUFFMAN_ONLY)),
    Way("Pillow", "level 1, fixed codes", _pillow(compress_level=1, compress_type=zlib.Z_FIXED)),
    Way("OpenCV", "", _opencv()),
    Way("OpenCV", "Up, RLE", _opencv(strategy="RLE", filter="UP")),
    Way("OpenCV", "Up, Huffman only", _opencv(strategy="HUFFMAN_ONLY", filter="UP")),
    Way("imagecodecs", "Sub, RLE", _imagecodecs("RLE", "SUB"), "imagecodecs"),
    Way("imagecodecs", "Up, Huffman only", _imagecodecs("HUFFMAN_ONLY", "UP"), "imagecodecs"),
    Way("this worker", "fpng and text", lambda picture: encode_image(picture, parameters=PARAMETERS)),
    Way("ISA-L", "Up", _by_hand(_isal)),
    Way("ISA-L", "Up, history of 512 bytes", _by_hand(_isal_near)),
    Way("fpng", "", _fpng),
    Way("fpng", "two passes", _fpng_two_passes, "fpng_py"),
    Way("not compressed", "", _by_hand(lambda rows: zlib.compress(rows.data, 0))),
    Way("lossless WEBP", "", lambda picture: encode_image(picture, "WEBP", lossless=True)),
    Way("JPEG", "quality 95 (not exact)", lambda picture: encode_image(picture, "JPEG", 95), exact=False),
    Way("AVIF", "quality 95 (not exact)", lambda picture: encode_image(picture, "AVIF", 95), exact=False),
)


def files(pictures: Mapping[str, list[Image.Image]], rounds: int) -> list[dict[str, Any]]:
    """Each of WAYS, round by round: milliseconds and bytes of one picture, or null where its library is missing."""
    measured = [way for way in WAYS if not way.missing]
    sizes = {(way, kind): _checked(way, some) for way in measured for kind, some in pictures.items()}
    seconds: dict[tuple[Way, str], list[float]] = {key: [] for key in sizes}
    for _ in range(rounds):
        for way, kind in sizes:
            seconds[way, kind].append(_seconds(partial(way.encode_all, pictures[kind])))

    def figures(way: Way, kind: str) -> dict[str, float] | None:
        if way.missing:
            return None
        count, size = len(pictures[kind]), sizes[way, kind]
        return {
            "ms": round(1000 * median(seconds[way, kind]) / count, 2),
            "bytes": size // count,
            "of_pillow": round(size / sizes[WAYS[0], kind], 3),
        }

    return [
        {"way": str(way), "library": way.library, "exact": way.exact} | {kind: figures(way, kind) for kind in pictures}
        for way in WAYS
    ]


def _checked(way: Way, pictures: list[Image.Image]) -> int:
    """The bytes of all `pictures`; what is exact has the very pixels."""
    written = way.encode_all(pictures)
    for picture, file in zip(pictures, written, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        assert not way.exact or np.array_equal(pixels, np.asarray(picture)), f"{way}: other pixels"
    return sum(map(len, written))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


# --- from the decoder's tensor to a picture ---


def diffusers_way(decoded: torch.Tensor) -> list[Image.Image]:
    """Floats to the processor's memory, then everything in numpy."""
    pictures: list[Image.Image] = VaeImageProcessor().postprocess(decoded, output_type="pil")
    return pictures


def bytes_first(decoded: torch.Tensor) -> list[Image.Image]:
    """The same arithmetic where the tensor is; a quarter of float32's bytes is copied, once."""
    pixels = _levels(decoded).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(one) for one in pixels]


def planes_first(decoded: torch.Tensor) -> list[Image.Image]:
    """As `bytes_first`, but Pillow interleaves the colours."""
    return [Image.merge("RGB", [Image.fromarray(plane) for plane in one]) for one in _levels(decoded).cpu().numpy()]


def _levels(decoded: torch.Tensor) -> torch.Tensor:
    """0..255 as diffusers rounds: the first half in the tensor's own precision, the second in float32."""
    return decoded.mul(0.5).add_(0.5).clamp_(0, 1).float().mul_(255).round_().to(torch.uint8)


ASSEMBLIES = {"diffusers": diffusers_way, "bytes_first": bytes_first, "planes_first": planes_first}


def assembly(side: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds from a decoded tensor to a picture, the same bytes in every way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    noise = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        decoded = (2.4 * noise - 1.2).to(device, dtype)
        made = [np.asarray(way(decoded)[0]) for way in ASSEMBLIES.values()]
        assert all(np.array_equal(made[0], other) for other in made[1:]), "other pixels"
        seconds: dict[str, list[float]] = {name: [] for name in ASSEMBLIES}
        for _ in range(rounds):
            for name, way in ASSEMBLIES.items():
                seconds[name].append(_seconds(partial(way, decoded)))
        milliseconds = {name: round(1000 * median(values), 2) for name, values in seconds.items()}
        rows.append({"dtype": str(dtype).removeprefix("torch."), "device": device, "ms": milliseconds})
    return rows


# --- from files to a response ---


def response(pictures: list[Image.Image], rounds: int) -> dict[str, Any]:
    """Milliseconds for all `pictures`, one after another: their files, base64, and the dict as the SDK's JSON."""
    seconds: dict[str, list[float]] = {"files": [], "base64": [], "json": []}
    for _ in range(rounds):
        began = time.perf_counter()
        written = [encode_image(picture) for picture in pictures]
        filed = time.perf_counter()
        texts = [str(base64.b64encode(file), "ascii") for file in written]
        texted = time.perf_counter()
        body = json.dumps({"output": {"status": "success", "images": texts, "metadata": {}}}, ensure_ascii=False)
        ended = time.perf_counter()
        for name, value in zip(seconds, (filed - began, texted - filed, ended - texted), strict=True):
            seconds[name].append(value)
    milliseconds = {name: round(1000 * median(values), 2) for name, values in seconds.items()}
    return {"pictures": len(pictures), "characters": len(body), "ms": milliseconds}


def plot(ways: list[dict[str, Any]]) -> Figure:
    """How long each way takes, with the size of its file."""
    kinds = {"photographs": "a photograph", "shapes": "flat shapes"}
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (kind, title) in zip(panels, kinds.items(), strict=True):
        rows = [row for row in ways if row[kind]][::-1]
        colours = ["tab:green" if row["library"] == "this worker" else "tab:gray" for row in rows]
        bars = axes.barh([row["way"] for row in rows], [row[kind]["ms"] for row in rows], color=colours)
        axes.bar_label(bars, [f"{row[kind]['ms']:.3g} ms, {row[kind]['of_pillow']:.2f} x" for row in rows], padding=3)
        right = 12 * max(row[kind]["ms"] for row in rows)  # room for the longest bar's label
        axes.set(xscale="log", xlim=(1, right), xlabel="milliseconds; size beside Pillow's", title=title)
    return figure


if __name__ == "__main__":
    main()
