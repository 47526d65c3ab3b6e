"""A picture's file -> upright pixels.

What reads a file whole cannot be stopped from within: this file runs as a process of its own too, where the system
stops it. So it knows no other module of ours, and is there in a twentieth of a second.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

Box = tuple[int, int, int, int]  # left, top, right, bottom

MIN_INPUT_SIDE = 16
WHITE = 128  # the least that counts as white in a mask, as diffusers' VaeImageProcessor.binarize has it
_STRIP = 2**20  # pixels that are worked on at once where that takes more than their own memory
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's Orientation
_ORIENTATION = 0x0112
# Of the process: bytes of memory, and seconds on the clock for each of the processor, however busy that is.
_MEMORY, _MEMORY_A_PIXEL = 200_000_000, 24
_PATIENCE = 20
_THREADS = 4
_NO_MEMORY = 3  # its exit status
_PAUSE = 0.1  # seconds between two looks whether the job is still wanted
# That a file is read in, a microsecond of Pillow's work each: those of a PNG with as many chunks as it may have, and
# more than the strips of a TIFF or the runs of a BMP need for their pixels.
_PIECES, _PIECES_A_PIXEL = 270_000, 1 / 100
_TOO_SLOW = "takes longer to decode than a picture of its size may: save it anew"

warnings.filterwarnings("ignore", module="PIL")  # of what is odd in a client's file: each would be remembered for ever


class Unreadable(Exception):
    """Why a file gives no picture, as a sentence whose subject is its field."""


class Unknown(Unreadable):
    """It is a picture of none of the formats."""


class Bounds(NamedTuple):
    """What the decoding of one file may take."""

    formats: tuple[str, ...]  # Pillow's names
    pixels: int
    seconds: float  # of the processor


class _File(io.BytesIO):
    """What ends the reading of itself after too many pieces, or once this thread has worked for too long."""

    def __init__(self, file: bytes, bounds: Bounds) -> None:
        super().__init__(file)
        self._pieces = _PIECES + bounds.pixels * _PIECES_A_PIXEL
        self._until = time.thread_time() + bounds.seconds

    def read(self, size: int | None = -1, /) -> bytes:
        self._pieces -= 1
        if self._pieces < 0 or time.thread_time() > self._until:
            raise Unreadable(_TOO_SLOW)
        return super().read(size)


def read(file: bytes, bounds: Bounds, mode: str, *, by_alpha: bool = False) -> tuple[Image.Image, list[str]]:
    """The picture in `file`, upright, in `mode` (RGB, or L for a mask), and what a client may not expect of it.

    What is transparent is white, and black in a mask; but white in one that is read `by_alpha`, or that would be black
    all over. Raises Unreadable with the reason.
    """
    notes = list[str]()
    try:
        picture = Image.open(_File(file, bounds), formats=bounds.formats)
        width, height = picture.size
        if min(picture.size) < MIN_INPUT_SIDE:
            raise Unreadable(f"has {width}x{height} pixels, and each side must have {MIN_INPUT_SIDE} at least")
        if width * height > bounds.pixels:
            raise Unreadable(f"is damaged: it has {width}x{height} pixels, more than it begins by saying")
        if getattr(picture, "is_animated", False) and picture.format != "MPO":  # a JPEG with others behind it
            if picture.format not in ("TIFF", "HEIF"):
                raise Unreadable("is animated: send one of its frames")
            notes.append(f"has {getattr(picture, 'n_frames', 'several')} pages, of which the first is used")
        picture.load()
        turn = _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
        upright = picture.transpose(turn) if turn is not None else picture
        del picture
        if mode == "L" and (mask := _from_alpha(upright, by_alpha)):
            notes.append(
                "is read by its transparency: what is transparent is drawn anew, what is opaque is kept; send "
                "mask_image without transparency, white where it is to be drawn anew, to have it read by its colours"
            )
            return mask, notes
        return _flat(upright, mode), notes
    except (Unreadable, MemoryError):
        raise
    except UnidentifiedImageError:
        raise Unknown from None
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the machine's
            raise
        raise Unreadable(f"is damaged: {type(error).__name__}: {str(error)[:150]}") from error


def _from_alpha(picture: Image.Image, always: bool) -> Image.Image | None:
    """The mask in the transparency of `picture`, as OpenAI's clients send it: `always`, or where its colours hold none.

    None where its transparency holds no mask either.
    """
    if not picture.has_transparency_data:
        return None
    alpha = Image.new("L", picture.size)
    for box, strip in _strips(picture):
        alpha.paste(strip.convert("RGBA").getchannel("A"), box)
    if is_black(alpha) or is_black(ImageOps.invert(alpha)):
        return None
    colours = _flat(picture, "L")
    kept = alpha.point(lambda level: 255 * (level >= WHITE))
    dark = colours.point(lambda level: 255 * (level < WHITE))
    strokes = ImageChops.darker(kept, dark).getbbox() is None  # white ones, of an editor's canvas
    return ImageOps.invert(alpha) if is_black(colours) or (always and not strokes) else None


def is_black(mask: Image.Image) -> bool:
    """Whether no pixel of it (L) is white, and so nothing would be drawn anew."""
    return mask.getextrema()[1] < WHITE  # type: ignore[operator]


def _flat(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode.startswith("I") or picture.mode == "F":  # more than 8 bits a channel, which Pillow would clip
        picture = _in_8_bits(picture)
    if not picture.has_transparency_data:
        if picture.mode != mode:
            return picture.convert(mode)
        return Image.Image()._new(picture.im)  # without the file, and without a copy
    flat = Image.new(mode, picture.size)
    for box, strip in _strips(picture):
        ground = Image.new("RGBA", strip.size, "black" if mode == "L" else "white")
        flat.paste(Image.alpha_composite(ground, strip.convert("RGBA")).convert(mode), box)
    return flat


def _in_8_bits(picture: Image.Image) -> Image.Image:
    """Integers of 16 or 32 bits, or floats, as what they can be meant to be: L."""
    import numpy as np

    def values(strip: Image.Image) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        return np.asarray(strip, float)

    brightest = max(1.0, float(np.max([values(strip).max() for _, strip in _strips(picture)])))
    whites = {"I": (255, 65_535, brightest), "F": (brightest,)}.get(picture.mode, (65_535,))
    white = next(value for value in whites if brightest <= value)
    levels = Image.new("L", picture.size)
    with np.errstate(invalid="ignore"):
        for box, strip in _strips(picture):
            levels.paste(Image.fromarray((values(strip) / white * 255).clip(0, 255).astype(np.uint8)), box)
    return levels


def _strips(picture: Image.Image) -> Iterator[tuple[Box, Image.Image]]:
    """`picture` in pieces, and where each lies."""
    return ((box, picture.crop(box)) for box in _boxes(picture.size))


def _boxes(size: tuple[int, int]) -> Iterator[Box]:
    """Where pieces of a megapixel lie."""
    width, height = size
    rows = max(1, _STRIP // width)
    return ((0, top, width, min(top + rows, height)) for top in range(0, height, rows))


def read_apart(
    file: bytes, bounds: Bounds, mode: str, *, by_alpha: bool, check: Callable[[], None]
) -> tuple[Image.Image, list[str]]:
    """`read` in a process of its own, which is stopped at its bounds, or where `check` raises."""
    order = json.dumps([bounds, mode, by_alpha])
    with _scratch("file") as sent, _scratch("pixels") as received:
        sent.write(file)
        sent.seek(0)
        process = subprocess.Popen(  # noqa: S603 - of this very file, without the secrets of the environment
            [sys.executable, "-I", __file__, order], stdin=sent, stdout=received, stderr=subprocess.DEVNULL, env={}
        )
        try:
            _wait(process, time.monotonic() + _PATIENCE * (1 + bounds.seconds), check)
        finally:
            process.kill()
            process.wait()
        if process.returncode == -signal.SIGPROF:
            raise Unreadable(_TOO_SLOW)
        if process.returncode == _NO_MEMORY:
            raise Unreadable("takes more memory to decode than a picture of its size may: save it anew")
        if process.returncode > 0 or process.returncode == -signal.SIGKILL:  # by the system, which is short of memory
            raise OSError(f"the process that decodes it ended with {process.returncode}")
        if process.returncode < 0:
            raise Unreadable(f"is damaged: its decoder ended with {signal.Signals(-process.returncode).name}")
        received.seek(0)
        answer = json.loads(received.readline())
        if answer.get("unknown"):
            raise Unknown
        if "unreadable" in answer:
            raise Unreadable(answer["unreadable"])
        picture = Image.new(mode, answer["size"])
        for box in _boxes(picture.size):
            size = (box[2] - box[0], box[3] - box[1])
            picture.paste(Image.frombytes(mode, size, received.read(size[0] * size[1] * len(mode))), box)
        return picture, answer["notes"]


def _scratch(name: str) -> IO[bytes]:
    """A file in memory, where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create(name), "w+b")
    return tempfile.TemporaryFile()


def _wait(process: subprocess.Popen[bytes], until: float, check: Callable[[], None]) -> None:
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_PAUSE)
            return
        check()
        if time.monotonic() > until:
            raise Unreadable(_TOO_SLOW)


def _main(order: str) -> None:
    """Read a file from the standard input; write one line of JSON and the pixels to the standard output."""
    # 1. Limits, before anything of the file is looked at
    (formats, pixels, seconds), mode, by_alpha = json.loads(order)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    memory = _MEMORY + _MEMORY_A_PIXEL * pixels
    resource.setrlimit(resource.RLIMIT_DATA, (memory if most == resource.RLIM_INFINITY else min(memory, most), most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, seconds)  # ends the process

    # 2. The picture
    from PIL import AvifImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401 - or Pillow imports all that it has

    AvifImagePlugin.DEFAULT_MAX_THREADS = _THREADS  # each has a stack
    if "HEIF" in formats:  # what phones send
        import pi_heif

        pi_heif.register_heif_opener(thumbnails=False)
    answer: dict[str, object]
    picture = None
    try:
        file = sys.stdin.buffer.read()
        picture, notes = read(file, Bounds(tuple(formats), pixels, seconds), mode, by_alpha=by_alpha)
        answer = {"size": picture.size, "notes": notes}
    except Unknown:
        answer = {"unknown": True}
    except Unreadable as error:
        answer = {"unreadable": str(error)}
    out = sys.stdout.buffer
    out.write(json.dumps(answer).encode() + b"\n")
    for _, strip in _strips(picture) if picture else ():
        out.write(strip.tobytes())
    out.flush()


if __name__ == "__main__":
    try:
        _main(sys.argv[1])
    except MemoryError:
        os._exit(_NO_MEMORY)
