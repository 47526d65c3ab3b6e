"""`python -m fuzz.corpus`: what fuzzing starts from, out of the tests' own material; adds files and removes none."""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image
from safetensors.torch import save

from fuzz import CORPUS
from fuzz.formats import SAFETENSORS
from fuzz.targets import TARGETS
from src.engine import load_engine
from src.request.images import READABLE
from src.settings import ROOT, Settings
from tests import test_adapter_layouts, test_images, test_request, test_services
from tests.headers import chroma, flux_1, flux_2, flux_3, gguf, safetensors

LARGEST = {"requests": 3_000, "pictures": 8_000, "adapters": 12_000, "single-files": 12_000}  # bytes
PHOTO = test_images.PHOTO.resize((24, 16))


def carried(value: object) -> bool:
    """Whether JSON can, in a few bytes."""
    try:
        return len(json.dumps(value)) < 200
    except (TypeError, ValueError, RecursionError):
        return False


def requests() -> Iterator[bytes]:
    """Other services' requests, good ones, and each field with its wrong values."""
    small = test_images.file_of(PHOTO.quantize(4))
    named = {"PICTURE in base64": base64.b64encode(small).decode(), "a token": "hf_abcdefghij0123456789"}
    named |= {"PICTURE as a data URI": f"data:image/png;base64,{named['PICTURE in base64']}"}
    named["MASK as a data URI"] = named["PICTURE as a data URI"]
    for case in test_services.CASES:
        text = json.dumps({"input": case["input"]})
        for name, value in named.items():
            text = text.replace(json.dumps(name), json.dumps(value))
        yield text.encode()
    for fields in test_request.GOOD:
        yield json.dumps({"input": {"prompt": "a cat", **fields}}).encode()
    for i in range(max(map(len, test_request.WRONG.values()))):  # the i-th wrong value of each field
        wrong = {name: values[i % len(values)] for name, values in test_request.WRONG.items()}
        yield json.dumps({"input": {name: value for name, value in wrong.items() if carried(value)}}).encode()
    controls = [{"image": named["PICTURE in base64"], "type": "canny", "scale": 0.5, "start": 0, "end": 1}]
    loras: list[dict[str, Any]] = [{"path": "owner/name@v1/a/x.safetensors", "scale": -1}]
    yield json.dumps({"input": {"prompt": "x", "controls": controls, "loras": loras, "sigmas": [1, 0.5]}}).encode()


def pictures() -> Iterator[bytes]:
    """A photograph in every format and kind of colours, and what is refused."""
    for format in (*READABLE, "GIF", "ICO"):
        options = {"max_threads": 1} if format == "AVIF" else {}  # on whose number its bytes depend
        yield test_images.file_of(PHOTO, format, **options)
    yield test_images.file_of(PHOTO.quantize(8))
    for mode in ("L", "RGBA", "LA", "1", "I;16"):
        yield test_images.file_of(PHOTO.convert("L").convert(mode))
    for mode in ("I", "F"):
        yield test_images.file_of(PHOTO.convert("L").convert(mode), "TIFF")
    for mode in ("CMYK", "L"):
        yield test_images.file_of(PHOTO.convert(mode), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    for more in ({"progressive": True}, {"exif": exif.tobytes()}, {"restart_marker_blocks": 1}):
        yield test_images.file_of(PHOTO, "JPEG", **more)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"):
        picture = PHOTO.convert("1") if compression == "group4" else PHOTO
        yield test_images.file_of(picture, "TIFF", compression=compression)
    for format in ("PNG", "WEBP", "TIFF", "MPO"):  # an AVIF of several holds the time
        yield test_images.file_of(PHOTO, format, save_all=True, append_images=[PHOTO.rotate(180)])
    yield test_images.file_of(PHOTO, "WEBP", lossless=True)
    yield test_images.huge_png(4_000)
    yield test_images.file_of(Image.new("L", (1_200, 1_200)), "JPEG", progressive=True)  # each scan goes over all of it
    yield (ROOT / "tests" / "gradient.heic").read_bytes()


def adapters() -> Iterator[bytes]:
    """Every layout of every trainer, as far as it is small."""
    engine = load_engine(Settings(model_name="flux-shapes"))
    for name in test_adapter_layouts.LAYOUTS:
        if not name.startswith(tuple(test_adapter_layouts.FAMILIES)):
            made = test_adapter_layouts.make(name, engine)
            file = save({key: tensor.contiguous() for key, tensor in made.tensors.items()}, made.metadata)
            header, numbers = SAFETENSORS.take_apart(file)  # its metadata is in any order
            yield SAFETENSORS.put_together([json.dumps(json.loads(header), sort_keys=True).encode(), numbers])


def single_files() -> Iterator[bytes]:
    """Small files in each format, and the headers of models without what they announce."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        tensors = {"a.weight": (32, 32), "a.bias": (32,), "scaled_fp8": (0,)}
        for kind in ("F32", "Q8_0", "Q4_0"):
            yield gguf(path, tensors, kind, keys={"comfy.gguf.orig_shape.a.weight": [16, 64]}).read_bytes()
        yield gguf(path, {"blk.0.attn_q.weight": (32, 32)}, architecture="llama").read_bytes()
        for dtype in ("F32", "BF16", "F8_E4M3", "U8"):
            yield safetensors(path, tensors, dtype).read_bytes()
        for name in ("lora_unet_x.lora_down.weight", "controlnet_blocks.0.weight", "head.modulation", "encoder.mid.a"):
            yield safetensors(path, {name: (2, 2)}).read_bytes()
        for shapes in (flux_1(1, 1), flux_2(1, 1), flux_3(1, 1), chroma(1, 1)):
            for write_one in (safetensors, gguf):
                with write_one(path, shapes).open("rb") as opened:
                    yield opened.read(11_000)


def sources() -> Iterator[bytes]:
    """A picture in text, however it is written, and what is none."""
    text = base64.b64encode(test_images.file_of(PHOTO.quantize(4))).decode()
    written = ["{}", " {}\n", "b'{}'", "\ufeff{}", "data:image/png;base64,{}", "DATA:Image/PNG; base64 , '{}'"]
    written += ['data:image/png;name="a,b.png";base64,{}', "data:image/png,base64,{}", "data:image/svg+xml;base64,\n{}"]
    for form in written:
        yield form.format(text).encode()
        yield quote(form.format(text), safe="").encode()
    bad = ["http://example.com/a.png", "https://example.com/a.png?sig=b", "data:text/html,hello", "data:image/png"]
    bad += ["data:image/png;base64,", "data:image/svg+xml;utf8,<svg/>", "====", "not base64!", "C:\\me\\a.png", "null"]
    bad += ["data:" + ";a" * 200, "data:;base64," + "%41" * 100, "data:" + '"' * 99, "[object Object]", "../photo"]
    yield from (source.encode() for source in bad)
    yield b"iVBOR\xed\xa0\x80"


def wording() -> Iterator[bytes]:
    """Addresses, headers and keys that hold secrets, and what only begins like them."""
    texts = ["token hf_abcdefghij0123456789 refused", "{'Authorization': 'Bearer abc.def'}", "http://user:pass@host/x"]
    texts += ["https://s.test/x?X-Amz-Signature=abc&x=1", "https://s.test/x?sig=abc#top", "https:///?" + "sig" * 60]
    texts += ["://" + ":" * 200, "?" + "token" * 60 + "=", "&" + "-key" * 60, "A" * 400, "Bearer " * 40, "//a:b" * 60]
    yield from (text.encode() for text in texts)
    yield json.dumps({"a": [1, "x" * 100, None], "b": {"c": {"d": {"e": 1}}}}).encode()
    yield b"a\xed\xa0\x80 \xff\x00\x7f"


MAKERS = {
    "requests": requests,
    "pictures": pictures,
    "adapters": adapters,
    "single-files": single_files,
    "sources": sources,
    "wording": wording,
}


def write(folder: Path, files: Iterator[bytes], largest: int) -> Mapping[str, int]:
    """Each of `files` that is small enough, by its digest."""
    folder.mkdir(parents=True, exist_ok=True)
    made = {hashlib.sha256(file).hexdigest()[:12]: file for file in files if len(file) <= largest}
    for name, file in made.items():
        (folder / name).write_bytes(file)
    return {name: len(file) for name, file in made.items()}


if __name__ == "__main__":
    for target in TARGETS:
        sizes = write(CORPUS / target, MAKERS[target](), LARGEST.get(target, 3_000))
        print(f"{target}: {len(sizes)} files, {sum(sizes.values()):,} bytes")
