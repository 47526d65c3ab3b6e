"""What is fuzzed: readers of foreign bytes, each with what a mutation changes one of, and what may come of it.

A target takes any bytes. It raises only where something is wrong: what the reader says in its own words is right.
"""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, NoReturn

from PIL import Image

from fuzz import formats
from src.catalog import get_model
from src.errors import InvalidRequest, Refused
from src.job import Job
from src.plan.plan import make_plan
from src.redaction import redact
from src.request.adapters import Adapter
from src.request.addresses import check_beginning, read_address
from src.request.aliases import ALIASES
from src.request.images import decode, load_pictures, read_source
from src.request.reading import read_request
from src.request.schema import Request
from src.response.describe import show_plan
from src.settings import Settings
from src.weights.single_file import read_single_file
from src.wording import did_you_mean, show

if TYPE_CHECKING:
    from src.engine.lora import Networks

SECONDS = 1.0  # of processors, for one input
MEGABYTES = 300  # above what was in use before it
LONGEST_ANSWER = 100_000  # characters
MODELS = ("flux-shapes", "FLUX.1-dev", "FLUX.1-Kontext-dev", "FLUX.1-Fill-dev")
TOKEN = "hf_abcdefghij0123456789"  # noqa: S105 - what must not come out again


class TooSlow(BaseException):
    """It took more than its seconds; no Exception, which readers of files take for damage."""


class TooLarge(Exception):
    """It took more memory than one input may."""


@dataclass(frozen=True)
class Target:
    """`run` is given the bytes; a mutation changes one piece of what `format` takes apart, or puts in `words`.

    `prepare` loads what would count as the first input's seconds.
    """

    run: Callable[[bytes], None]
    words: tuple[str, ...]
    format: formats.Format = formats.PLAIN
    longest: int = 100_000  # bytes
    prepare: Callable[[], object] = Image.init


def check(name: str, data: bytes, seconds: float = SECONDS) -> None:
    """Let the target `name` read `data`; raises what should not come of it, TooSlow and TooLarge among that."""
    Path("/proc/self/clear_refs").write_text("5")  # the most that was in use is counted anew
    used = _memory("VmRSS")
    signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        TARGETS[name].run(data)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if (more := _memory("VmHWM") - used) > MEGABYTES:
        raise TooLarge(f"{more} MB")


def _memory(name: str) -> int:
    """Megabytes by one of the kernel's counters."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1_024 // 10**6 for line in lines if line.startswith(name))


def _too_slow(_: int, frame: FrameType | None) -> NoReturn:
    raise TooSlow


def _text(data: bytes) -> str:
    """Any text that JSON can hold, lone surrogates among it."""
    try:
        return data.decode(errors="surrogatepass")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _refuse(url: str) -> NoReturn:
    raise Refused("could not be fetched")


def _request(data: bytes) -> None:
    """An event, until it is decided what is to be drawn, and the answer as it is sent."""
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        return  # which never reaches the worker
    try:
        request, faults, warnings = read_request(event)
        pictures, more, _ = load_pictures(request, Job(), _refuse)
        adapters = []
        for i, lora in enumerate(request.loras):
            with suppress(Refused):
                read_address(lora)
            adapters.append(Adapter(f"lora_{i}", Path("x.safetensors"), lora, "loras"))
        for model in MODELS:
            with suppress(InvalidRequest):
                plan = make_plan(
                    request, (*faults, *more), get_model(model), pictures, adapters,
                    warnings=warnings, max_pixels=2048 * 2048,
                )  # fmt: skip
                _check_answer(show_plan(plan))
        make_plan(request, (*faults, *more), get_model(MODELS[0]), pictures, adapters, max_pixels=2048 * 2048)
    except InvalidRequest as error:
        _check_answer(error.to_response(include_traceback=True))


def _check_answer(answer: Mapping[str, object]) -> None:
    text = json.dumps(answer, allow_nan=False, ensure_ascii=False)
    text.encode()  # as the SDK sends it
    assert len(text) <= LONGEST_ANSWER, f"an answer of {len(text):,} characters"


def _picture(data: bytes) -> None:
    """A file, read as one of the kinds of pictures that a request may hold."""
    mode, by_alpha = (("RGB", False), ("L", False), ("L", True))[len(data) % 3]
    with suppress(Refused):
        assert decode(data, mode, by_alpha=by_alpha).mode == mode


def _source(data: bytes) -> None:
    """A picture as base64, as a data: address or as an address."""
    text = _text(data)
    try:
        assert isinstance(read_source(text, _refuse), bytes)
    except Refused as error:
        assert len(str(error)) < 1_000


def _single_file(data: bytes) -> None:
    """A model in one file, by its header."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path.write_bytes(data)
        with suppress(Refused):
            read_single_file(path)


@cache
def _networks() -> Networks:
    from src.engine import load_engine
    from src.engine.lora import Networks

    return Networks(load_engine(Settings(model_name="flux-shapes"))._pipeline)


@cache
def _file() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-")) / "adapter.safetensors"


def _adapter(data: bytes) -> None:
    """A safetensors file, held against the layers of the shipped model."""
    import torch

    from src.engine.lora import AdapterFile

    _file().write_bytes(data)
    try:
        check_beginning(data[:512])
        file = AdapterFile(_file(), _networks())
        file.check()
        weights = file.read()
    except Refused as error:
        assert len(str(error)) < 2_000
        return
    assert all(len(warning) < 2_000 for warning in weights.warnings)
    assert all(tensor.dtype == torch.float32 for tensor in weights.lora.values())


def _wording(data: bytes) -> None:
    """Foreign text on its way into an answer or the log."""
    text = _text(data)
    assert TOKEN not in redact(f"{text} {TOKEN}")
    assert len(show(text)) <= 300
    did_you_mean(text, Request.model_fields)
    with suppress(ValueError, RecursionError):
        assert len(show(json.loads(data))) <= 300


_FIELDS = tuple(f'"{name}": ' for name in (*Request.model_fields, *ALIASES))
_LAYERS = (
    "lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "hada_w1_a",
    "lokr_w1", "lokr_w2_a", "diff_b", "lora_magnitude_vector", "lora_unet_", "lora_te1_", "transformer.", "BF16",
    "F8_E4M3", "F32", "I8", "data_offsets", "__metadata__", "lora_adapter_metadata", "alpha_pattern",
)  # fmt: skip
_CHUNKS = ("IHDR", "IDAT", "iCCP", "zTXt", "eXIf", "acTL", "tRNS", "JFIF", "Exif", "RIFF", "VP8X", "ftyp", "MPF")
_VALUES = ("null", "true", "1e308", "-1", "[]", "{}", "https://", "data:image/png;base64,")
TARGETS: Mapping[str, Target] = MappingProxyType({
    "requests": Target(_request, (*_FIELDS, *_VALUES), formats.REQUEST),
    "pictures": Target(_picture, _CHUNKS, formats.PICTURE, longest=200_000),
    "adapters": Target(_adapter, _LAYERS, formats.SAFETENSORS, prepare=_networks),
    "single-files": Target(_single_file, ("GGUF", "general.architecture", "double_blocks.0.", ".weight", "F8_E4M3")),
    "sources": Target(_source, ("data:", ";base64,", "image/png", "%", "https://", "\\n", '"', ",")),
    "wording": Target(_wording, ("?", "&", "sig=", "token=", "://", "@", "Bearer ", "X-Amz-", "hf_", ":")),
})  # fmt: skip
