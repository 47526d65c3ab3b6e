"""Pictures that are meant to hurt: each is refused, or read, within bounds of time and memory."""

from __future__ import annotations

import base64
import errno
import gc
import io
import random
import resource
import struct
import subprocess
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks.photographs import photographs
from src.errors import Cancelled, OutOfMemory, Refused, TimedOut
from src.job import Job
from src.job_queue import JobQueue
from src.request import decoder, images
from src.request.bounds import MAX_SCANS
from src.request.decode_budget import DecodeBudget
from src.request.images import READABLE, decode, load_pictures, read_source
from src.request.reading import read_request
from src.request.schema import Request
from tests.test_images import file_of

PHOTO = photographs(1, 512)[0].resize((96, 64))
HEIC = (Path(__file__).parent / "gradient.heic").read_bytes()
UNPACKED = zlib.compress(bytes(1_000_000), 9)  # a megabyte, which Pillow takes to be harmless


def processor() -> float:
    """Seconds of the processor that this process took, and those that it started: however busy the machine is."""
    return sum(
        used.ru_utime + used.ru_stime
        for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


@contextmanager
def within(seconds: float) -> Iterator[None]:
    started = processor()
    yield
    assert processor() - started < seconds


def segment(code: int, body: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", len(body) + 2) + body


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def jpeg(before: bytes = b"", inside: bytes = b"") -> bytes:
    """A sound JPEG with something before its frame and in its scan."""
    file = file_of(PHOTO, "JPEG")
    return file[:20] + before + file[20:-2] + inside + file[-2:]


def scans(count: int, side: int) -> bytes:
    """A progressive JPEG that passes over side x side pixels `count` times."""
    file = b"\xff\xd8" + segment(0xDB, bytes(1) + bytes([1]) * 64)
    for table, value in ((0x00, b"\0"), (0x10, b"\xe0")):
        file += segment(0xC4, bytes([table, 1]) + bytes(15) + value)
    file += segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\1\x11\0")
    file += segment(0xDA, b"\1\1\0\0\0\0") + b"\0"
    return file + (segment(0xDA, b"\1\1\0\1\x3f\0") + bytes(25)) * (count - 1) + b"\xff\xd9"


def png(before: bytes = b"", after: bytes = b"") -> bytes:
    """A sound PNG with something before its pixels and after them."""
    file = file_of(PHOTO)
    return file[:33] + before + file[33:-12] + after + file[-12:]


def exif(tag: int, kind: int, count: int) -> bytes:
    return b"II*\0\x08\0\0\0\1\0" + struct.pack("<HHII", tag, kind, count, 26) + bytes(4) + b"\1" * (8 * count)


def tiff(width: int, height: int, entries: dict[int, tuple[int, int, int]], data: bytes = b"", after: int = 0) -> bytes:
    """A TIFF in grey; `entries` are type, count and value by tag, `after` is where the next directory lies."""
    plain = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1)}
    rows = sorted((plain | entries).items())
    file = b"II*\0\x08\0\0\0" + struct.pack("<H", len(rows))
    return file + b"".join(struct.pack("<HHII", tag, *row) for tag, row in rows) + struct.pack("<I", after) + data


def directories(count: int) -> bytes:
    strip = {273: (4, 1, 8), 278: (4, 1, 64), 279: (4, 1, 4096)}
    start = len(tiff(64, 64, strip))
    return tiff(64, 64, strip, after=start) + b"".join(struct.pack("<HI", 0, start + 6 * (i + 1)) for i in range(count))


def strips_a_byte_apart(count: int) -> bytes:
    """Each of them is read byte by byte."""
    entries = {273: (4, count, 0), 278: (4, 1, 1), 279: (4, count, 0)}
    start = len(tiff(1000, count, entries))
    entries |= {273: (4, count, start), 279: (4, count, start)}
    offsets = (start + 4 * count + np.arange(count)).astype("<u4").tobytes()
    return tiff(1000, count, entries, offsets + bytes(1_000_000))


def tile(side: int) -> bytes:
    """64x64 pixels as one tile of side x side."""
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(2**20)) for _ in range(side * side >> 20)) + packer.flush()
    entries = {259: (3, 1, 8), 322: (4, 1, side), 323: (4, 1, side), 324: (4, 1, 0), 325: (4, 1, len(body))}
    start = len(tiff(64, 64, entries))
    return tiff(64, 64, entries | {324: (4, 1, start)}, body)


def bmp(side: int, runs: bytes) -> bytes:
    """A BMP of 8 bits in runs."""
    palette = bytes(range(256)) * 4
    start = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + header + palette + runs


def webp(*chunks: tuple[bytes, bytes], side: int = 64) -> bytes:
    head = (b"VP8X", b"\2\0\0\0" + (side - 1).to_bytes(3, "little") * 2)
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in (head, *chunks))
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def nested(count: int) -> bytes:
    """A HEIC of boxes within boxes."""
    boxes = (struct.pack(">I4s", 8 * n, b"iprp") for n in range(count, 0, -1))
    return HEIC[: int.from_bytes(HEIC[:4])] + b"".join(boxes)


def frames(count: int) -> bytes:
    still = file_of(PHOTO.resize((64, 64)), "WEBP")[12:]
    frame = bytes(6) + (63).to_bytes(3, "little") * 2 + (100).to_bytes(3, "little") + b"\0" + still
    return webp((b"ANIM", bytes(6)), *[(b"ANMF", frame)] * count)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: scans(2_800, 2_000), "more than 64 scans"),
        (lambda: scans(101, 64), "more than 64 scans"),
        (lambda: b"\xff\xd8" + b"\xff" * 15_000_000, "fill bytes"),
        (lambda: jpeg(inside=b"\xff" * 15_000_000), "fill bytes"),
        (lambda: jpeg(bytes(19_000_000)), "bytes between its segments"),
        (lambda: jpeg(b"\xff\0" * 5_000_000), "bytes between its segments"),
        (lambda: jpeg(b"\xff\xfe\0\2" * 4_700_000), "more than 2,000 segments"),
        (lambda: jpeg(segment(0xE1, b"Exif\0\0" + exif(0x11A, 5, 8_000)) * 5), "bytes of EXIF"),
        (lambda: jpeg(segment(0xED, b"Photoshop 3.0\0" + b"8BIM\1\2\0\0\0\0\0\0" * 5_400) * 300), "takes longer"),
        (lambda: png(chunk(b"tEXt", b"a\0b") * 1_000_000), "chunks of metadata"),
        (lambda: png(after=chunk(b"aaAa") * 1_600_000), "chunks of metadata"),
        (lambda: png(chunk(b"IDAT") * 1_600_000), "more than 65,536 chunks"),
        (lambda: png(chunk(b"zTXt", b"\0\0" + UNPACKED) * 15_000), "compressed metadata"),
        (lambda: png(chunk(b"iCCP", b"a\0\0" + UNPACKED) * 15_000), "compressed metadata"),
        (lambda: png(after=chunk(b"iTXt", b"\0\1\0\0\0" + UNPACKED) * 15_000), "compressed metadata"),
        (lambda: png(chunk(b"fdAT", bytes(4)) * 1_000_000), "chunks of metadata"),
        (lambda: png(chunk(b"acTL", struct.pack(">II", 900_000, 0))), "is animated"),
        (lambda: png(chunk(b"eXIf", exif(0x112, 3, 1_000_000))), "bytes of EXIF"),
        (lambda: png(chunk(b"tEXt", b"Raw profile type exif\0\n\n\n" + b"00" * 500_000)), "bytes of EXIF"),
        (lambda: frames(10_000), "more than 1,000 chunks"),
        (lambda: webp(*[(b"abcd", b"")] * 1_000_000), "more than 1,000 chunks"),
        (lambda: directories(3_000_000), "more than 1,000 pages"),
        (lambda: tiff(64, 64, dict.fromkeys(range(1_000, 30_000), (1, 10_000_000, 8))), "more than 20,000 tags"),
        (lambda: tiff(16, 1_000_000, {273: (4, 1_000_000, 0)}), "more than 65,536 strips"),
        (lambda: strips_a_byte_apart(1_000), "takes longer"),
        (lambda: tiff(64, 64, {273: (4, 1, 8), 282: (5, 2_300_000, 300)}, b"\1" * 18_500_000), "takes "),
        (lambda: tile(16_384), "is damaged"),
        (lambda: bmp(1_000, b"\1\2" * 500 + b"\1\1" * 9_000_000), "takes longer"),
        (lambda: bmp(8_000, b"\1\2" * 7_000_000), "8,000,000 at most"),
        (lambda: HEIC + struct.pack(">I4s", 8, b"free") * 2_400_000, "more than 10,000 boxes"),
        (lambda: file_of(PHOTO, "AVIF") + struct.pack(">I4s", 8, b"free") * 2_400_000, "more than 10,000 boxes"),
        (lambda: nested(19_000), "more than 10,000 boxes"),
    ],
)  # fmt: skip
def test_parts_are_counted_before_a_decoder_runs(make: Callable[[], bytes], reason: str) -> None:
    file = make()
    assert len(file) <= 20_000_000
    message = "takes longer"  # but a fast processor may read it
    with within(2.5):
        try:
            decode(file)
        except Refused as error:
            message = str(error)
    assert reason in message


def many_chunks() -> bytes:
    """As encoders write that stream: 8 kB at a time."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1_000, 1_000, 3), np.uint8))
    file = file_of(noise, compress_level=0)
    body, kept = b"", file[:33]
    at = 33
    while at < len(file):
        (length,) = struct.unpack_from(">I", file, at)
        if file[at + 4 : at + 8] == b"IDAT":
            body += file[at + 8 : at + 8 + length]
        at += 12 + length
    return kept + b"".join(chunk(b"IDAT", body[i : i + 512]) for i in range(0, len(body), 512)) + chunk(b"IEND")


@pytest.mark.parametrize(
    "make",
    [
        lambda: scans(MAX_SCANS, 64),
        lambda: file_of(PHOTO, "JPEG", progressive=True, icc_profile=bytes(3_000_000)),
        lambda: jpeg(segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(60_000)) * 250),
        lambda: file_of(PHOTO, "JPEG") + bytes(random.Random(0).randbytes(5_000_000)),  # a film behind it
        lambda: file_of(PHOTO, "MPO", save_all=True, append_images=[PHOTO] * 30),
        many_chunks,
        lambda: png(chunk(b"tEXt", b"prompt\0" + b"x" * 3_000_000) + chunk(b"zTXt", b"a\0\0" + UNPACKED) * 20),
        lambda: file_of(PHOTO, "TIFF", save_all=True, append_images=[PHOTO] * 200, compression="tiff_lzw"),
        lambda: file_of(PHOTO, "TIFF", big_tiff=True),
        lambda: bmp(64, (b"\x40\1\0\0") * 64),
    ],
)
def test_what_programs_write_is_far_within_the_limits(make: Callable[[], bytes]) -> None:
    assert min(decode(make()).size) >= 64


def test_a_picture_is_no_larger_than_it_begins_by_saying() -> None:
    """Room, time and memory were given to what it said."""
    with pytest.raises(Refused, match="is damaged"):
        decode(png(chunk(b"IHDR", struct.pack(">IIBBBBB", 8_000, 8_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT")))
    large = file_of(Image.new("RGB", (2_000, 2_000)), "AVIF", speed=10)
    at = large.index(b"ispe") + 8
    for file in (large[:at] + struct.pack(">II", 64, 64) + large[at + 8 :], large.replace(b"ispe", b"free")):
        with within(2.5), suppress(Refused):
            assert decode(file).size == (64, 64)


@pytest.mark.parametrize(("at", "code"), [(176, 162), (177, 195), (178, 133), (179, 255)])
def test_a_decoder_that_crashes_takes_nobody_with_it(at: int, code: int) -> None:
    """pi-heif 1.4 ends the process at an item whose type is no text."""
    with pytest.raises(Refused, match="is damaged"):
        decode(HEIC[:at] + bytes([code]) + HEIC[at + 1 :])


@contextmanager
def room_of(pixels: int) -> Iterator[None]:
    """Room for so many pixels of small and of large pictures alike."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_BUDGET", DecodeBudget(pixels))
        patch.setattr(images, "_SMALL_BUDGET", images._BUDGET)
        yield


def asking(*pictures: Image.Image) -> Request:
    sent = [base64.b64encode(file_of(picture)).decode() for picture in pictures]
    return read_request({"input": {"prompt": "x", "init_images": sent}})[0]


def test_pictures_of_all_jobs_share_one_room() -> None:
    """A job waits until others hold their pictures no longer, and never for itself."""
    request = asking(PHOTO, PHOTO)
    started, done = threading.Event(), list[int]()

    def load(n: int) -> None:
        started.set()
        load_pictures(request, Job())
        done.append(n)

    with room_of(2 * 96 * 64):
        held = [load_pictures(request, Job())]
        threads = []
        for n in range(3):
            threads.append(threading.Thread(target=load, args=(n,)))
            threads[-1].start()
            time.sleep(0.1)
        time.sleep(0.2)
        assert done == []
        held.clear()
        for thread in threads:
            thread.join(30)
    assert done == [0, 1, 2]


def test_who_waits_for_room_can_be_stopped() -> None:
    request = asking(PHOTO)
    with room_of(96 * 64):
        held = load_pictures(request, Job())
        with pytest.raises(TimedOut):
            load_pictures(request, Job(timeout=0.2))
        job = Job()
        threading.Timer(0.2, job.cancel).start()
        with pytest.raises(Cancelled):
            load_pictures(request, job)
        del held
        assert load_pictures(request, Job(timeout=10)).faults == ()


def test_room_comes_back_whatever_becomes_of_a_picture() -> None:
    damaged = base64.b64encode(file_of(PHOTO)[:-200]).decode()
    broken = read_request({"input": {"prompt": "x", "init_images": [damaged] * 2, "mask_image": damaged}})[0]
    with room_of(4 * 96 * 64):
        for _ in range(20):
            assert len(load_pictures(broken, Job(timeout=10)).faults) == 3
            assert load_pictures(asking(PHOTO, PHOTO), Job(timeout=10)).faults == ()
        gc.collect()
        assert images._BUDGET._count() == 4 * 96 * 64


def test_small_pictures_do_not_wait_for_large_ones() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_BUDGET", DecodeBudget(0))
        assert load_pictures(asking(PHOTO), Job(timeout=10)).faults == ()


def test_whoever_reads_pictures_leaves_the_line() -> None:
    queue = JobQueue()
    try:
        reader, other = Job(queue_up=queue.ticket), Job(queue_up=queue.ticket)
        order = list[str]()

        def passing(_: str) -> bytes:
            other.on_device(lambda: order.append("other"))
            return file_of(PHOTO)

        url = read_request({"input": {"prompt": "x", "init_image": "https://example.com/a.png"}})[0]
        load_pictures(url, reader, passing)
        assert order == ["other"]
        sender, other = Job(queue_up=queue.ticket), Job(queue_up=queue.ticket, timeout=30)
        load_pictures(asking(PHOTO), sender)
        other.on_device(lambda: order.append("other"))
        sender.on_device(lambda: order.append("sender"))
        assert order == ["other", "other", "sender"]
    finally:
        queue.close()


def test_a_job_that_is_stopped_stops_its_decoder() -> None:
    slow = base64.b64encode(bmp(2_800, b"\1\2" * 7_400_000)).decode()
    request = read_request({"input": {"prompt": "x", "init_image": slow}})[0]
    with within(4), pytest.raises(TimedOut):
        load_pictures(request, Job(timeout=0.15))


def test_files_of_a_request_have_a_limit_together() -> None:
    film = file_of(PHOTO, "JPEG") + bytes(19_000_000)
    urls = [f"https://example.com/{i}" for i in range(10)]
    request = read_request({"input": {"prompt": "x", "init_images": urls, "mask_image": urls[0]}})[0]
    loaded = load_pictures(request, Job(), lambda _: film)
    assert [(fault.field, fault.message.partition(":")[0]) for fault in loaded.faults] == [
        ("mask_image", "makes this request's files together larger than 200,000,000 bytes; allowed")
    ]


MEBIBYTES = 8
FLOODS: tuple[Callable[[int], str], ...] = (
    lambda n: "data:" + ";a" * (n // 2),
    lambda n: "data:" + ";a" * (n // 2) + ",AAAA",
    lambda n: 'data:"' + ";a" * (n // 2) + '",AAAA',
    lambda n: 'data:"' + "a" * n,
    lambda n: "data:image/png," + "%41" * (n // 3),
    lambda n: "data:image/png," + "%80" * (n // 3),
    lambda n: "data%3aimage/png%2c" + "%41" * (n // 3),
    lambda n: "%41" * (n // 3),
    lambda n: "%2541" * (n // 5),
    lambda n: "A " * (n // 2),
    lambda n: "A\u00a0" * (n // 2),
    lambda n: "A\\" + "\\" * n,
    lambda n: "A\\n" * (n // 3),
    lambda n: "A" * n + "\U0001f600",
    lambda n: "A" * n + "\ud800",
    lambda n: "A" * n + "\0",
    lambda n: " " * n,
    lambda n: "\u201c" * n,
    lambda n: "=" * n,
    lambda n: "/" * n,
    lambda n: "A" * n,
)


@pytest.mark.parametrize("flood", FLOODS, ids=range(len(FLOODS)))
def test_long_texts_take_no_more_than_a_few_copies_of_themselves(flood: Callable[[int], str]) -> None:
    """And no more than half a second for all that a request may hold."""
    text = flood(MEBIBYTES * 2**20)
    size = len(text) * (1 if text.isascii() else 4)
    tracemalloc.start()
    try:
        with suppress(Refused):
            read_source(text, pytest.fail)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 4 * size + 2**24
    with within(0.8), suppress(Refused):
        read_source(text, pytest.fail)


@pytest.mark.parametrize(
    "text",
    ["\ud800", "A" * 40 + "\ud800", "data:image/png;base64,\udfff", "data:image/png,\ud800", "data%3a\ud800%2c\ud800",
     "A\0" * 40, "\x1b" * 40, "é" * 40, "A" * 40 + "%ff", "data:\ud800;base64,AAAA", "data:;\u0660,AAAA", "%", "%4",
     "A" * 40 + "%4", "%%34%31"],
)  # fmt: skip
def test_odd_characters_are_refused(text: str) -> None:
    with pytest.raises(Refused) as caught:
        decode(read_source(text, pytest.fail))
    str(caught.value).encode()


def test_what_is_escaped_is_read_wherever_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    file = random.Random(0).randbytes(300)
    for piece in (4, 8, 12, 16, 2**20):
        monkeypatch.setattr(images, "_PIECE", piece)
        assert read_source("data:x/y," + "".join(f"%{byte:02x}" for byte in file), pytest.fail) == file
        text = base64.b64encode(file).decode()
        assert (
            read_source("".join(f"%{ord(one):02X}" if i % 3 else one for i, one in enumerate(text)), pytest.fail)
            == file
        )


def as_it_was(picture: Image.Image, mode: str) -> Image.Image:
    """How pictures were made flat before they were in strips."""
    if picture.mode.startswith("I") or picture.mode == "F":
        pixels = np.asarray(picture, float)
        brightest = max(1.0, float(pixels.max()))
        whites = {"I": (255, 65_535, brightest), "F": (brightest,)}.get(picture.mode, (65_535,))
        white = next(value for value in whites if brightest <= value)
        picture = Image.fromarray((pixels / white * 255).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "black" if mode == "L" else "white")
        picture = Image.alpha_composite(ground, picture)
    return picture.convert(mode)


def deep(kind: str, most: int) -> Image.Image:
    values = np.random.default_rng(most).integers(-5 if kind == "i4" else 0, most, (70, 90), endpoint=True)
    return Image.fromarray((values / 7 if kind == "f4" else values).astype(kind))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    "picture",
    [
        *(deep("u2", most) for most in (1, 255, 4_095, 65_535)),
        *(deep("i4", most) for most in (1, 255, 256, 65_535, 65_536, 2**31 - 1)),
        *(deep("f4", most) for most in (1, 7, 65_535, 10**9)),
        *(photographs(1, 512)[0].resize((90, 70)).convert(kind) for kind in ("RGB", "L", "P", "1", "CMYK", "YCbCr")),
        *(Image.fromarray(np.random.default_rng(n).integers(0, 255, (70, 90, n), np.uint8)) for n in (2, 4)),
    ],
    ids=lambda picture: picture.mode,
)
def test_strips_change_no_byte(picture: Image.Image, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = picture.copy()
    for pixels in (1, 1_000, 2**20):
        monkeypatch.setattr(decoder, "_STRIP", pixels)
        flat = decoder._flat(picture, mode)
        assert (flat.mode, flat.tobytes()) == (mode, as_it_was(before, mode).tobytes())


def test_transparency_of_palettes_and_colours_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "_STRIP", 500)
    for mode, transparent in (("P", 3), ("P", bytes(range(200))), ("RGB", (10, 20, 30)), ("L", 100), ("1", 0)):
        file = file_of(PHOTO.convert(mode), transparency=transparent)
        for wanted in ("RGB", "L"):
            picture = decode(file, wanted)
            if wanted == "RGB":
                assert picture.tobytes() == as_it_was(Image.open(io.BytesIO(file)), wanted).tobytes()


@pytest.mark.parametrize(
    "trouble",
    [MemoryError(), OSError(errno.ENOMEM, "Cannot allocate memory"), OSError(errno.EMFILE, "Too many open files")],
)
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_what_the_machine_lacks_is_not_the_picture_s_fault(
    format: str, trouble: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise trouble

    monkeypatch.setattr(Image, "open", fail)
    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(OutOfMemory, match=r"is short of what reading a picture takes.*try again"):
        decode(file_of(PHOTO, format))


def sound(format: str) -> list[bytes]:
    """Files of the format with all that may be in them."""
    seen = Image.Exif()
    seen[0x0112], seen[0x011A], seen[0x010F] = 6, 72.0, "x"
    if format == "HEIF":
        return [HEIC]
    if format == "PNG":
        info = PngInfo()
        info.add_text("a", "b" * 50, zip=True)
        return [
            file_of(PHOTO.convert("RGBA"), pnginfo=info, exif=seen, icc_profile=bytes(300)),
            file_of(PHOTO.convert("P")),
        ]
    if format == "JPEG":
        return [file_of(PHOTO, "JPEG", progressive=True, exif=seen), file_of(PHOTO.convert("CMYK"), "JPEG")]
    if format == "BMP":
        return [file_of(PHOTO, "BMP"), bmp(64, b"\x20\1\x20\2\0\0" * 60 + b"\0\2\5\5\0\1")]
    if format == "TIFF":
        packed = ("raw", "tiff_lzw", "jpeg", "packbits", "tiff_adobe_deflate")
        return [file_of(PHOTO, format, compression=kind) for kind in packed] + [file_of(PHOTO.convert("F"), format)]
    return [file_of(PHOTO, format), file_of(PHOTO.convert("RGBA"), format, exif=seen)]


@pytest.mark.parametrize("format", [*READABLE, "HEIF"])
def test_mutated_files_are_read_or_refused(format: str) -> None:
    """A hundred thousand more were tried by hand."""
    chance = random.Random(format)
    files = sound(format)
    for _ in range(200 if format in ("PNG", "JPEG") else 25):
        file = bytearray(chance.choice(files))
        for _ in range(chance.choice((1, 1, 2, 5, 30))):
            at = chance.randrange(min(len(file), chance.choice((64, 300, 10**6))))
            match chance.randrange(5):
                case 0:
                    file[at] = chance.randrange(256)
                case 1:
                    file[at] ^= 1 << chance.randrange(8)
                case 2:
                    file[at : at + 4] = chance.choice((bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\1"))
                case 3:
                    del file[at : at + chance.choice((1, 2, 4, 100))]
                case 4:
                    file[at:at] = file[: chance.choice((1, 4, 50))]
            file = file or bytearray(b"x")
        with within(2), suppress(Refused):
            assert min(decode(bytes(file), chance.choice(("RGB", "L"))).size) >= 16
