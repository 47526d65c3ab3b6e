"""Pictures that clients send: good ones in every shape, bad ones refused with a reason."""

from __future__ import annotations

import base64
import io
import os
import re
import struct
import textwrap
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from benchmarks.photographs import photographs
from src.catalog import get_model
from src.errors import Fault, InvalidRequest, Refused
from src.job import Job
from src.plan.decisions import decide_pictures
from src.plan.geometry import fit
from src.plan.plan import make_plan
from src.request.fetch import open_url
from src.request.images import READABLE, Pictures, decode, fetch_url, load_pictures, read_source
from src.request.reading import read_request

PHOTO = photographs(1, 512)[0].resize((96, 64))

MIRRORED = PHOTO.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def file_of(picture: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def near(one: Image.Image, other: Image.Image, most: float = 3) -> bool:
    return one.size == other.size and float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean()) < most


@pytest.mark.parametrize("format", READABLE)
def test_formats(format: str) -> None:
    assert near(decode(file_of(PHOTO, format)), PHOTO, most=10)


def test_a_phone_s_heic_is_read_upright() -> None:
    """tests/gradient.heic is a gradient of 96x64, turned as its EXIF says; pillow-heif 1.8.1 wrote it."""
    picture = decode((Path(__file__).parent / "gradient.heic").read_bytes())
    y, x = np.mgrid[0:64, 0:96]
    drawn = Image.fromarray(np.stack([x * 255 // 95, y * 255 // 63, np.full_like(x, 60)], -1).astype(np.uint8))
    assert near(picture, drawn.transpose(Image.Transpose.ROTATE_270), most=5)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "LA", "1", "I;16"])
def test_colour_modes_become_rgb(mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(PHOTO.convert("L"), np.uint16) * 257)
    else:
        picture = PHOTO.convert(mode)
    expected = PHOTO if mode in ("P", "CMYK", "RGBA") else PHOTO.convert("1" if mode == "1" else "L").convert("RGB")
    decoded = decode(file_of(picture, "TIFF" if mode in ("CMYK", "I;16") else "PNG"))
    assert decoded.mode == "RGB"
    assert near(decoded, expected, most=25 if mode == "P" else 3)


def test_a_camera_s_second_picture_is_not_read() -> None:
    two = file_of(PHOTO, "MPO", save_all=True, append_images=[MIRRORED])
    assert near(decode(two), PHOTO, most=10)


@pytest.mark.parametrize("white", [255, 65_535, 1_000_000])
def test_integers_of_32_bits_are_as_bright_as_they_can_be_meant(white: int) -> None:
    grey = np.asarray(PHOTO.convert("L"), np.int64)
    levels = (grey * white // grey.max()).astype(np.int32)
    expected = Image.fromarray((levels / white * 255).astype(np.uint8)).convert("RGB")
    assert near(decode(file_of(Image.fromarray(levels), "TIFF")), expected, most=1)


def test_orientation_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees, as phones do
    turned = PHOTO.transpose(Image.Transpose.ROTATE_90)
    assert near(decode(file_of(turned, "JPEG", exif=exif, quality=95)), PHOTO, most=6)


def test_what_is_transparent_is_white_in_a_picture_and_black_in_a_mask() -> None:
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    picture.paste((0, 0, 255, 255), (0, 0, 16, 32))
    assert [decode(file_of(picture)).getpixel((x, 5)) for x in (2, 30)] == [(0, 0, 255), (255, 255, 255)]
    mask = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 16, 32))
    assert [decode(file_of(mask), "L").getpixel((x, 5)) for x in (2, 30)] == [255, 0]


def huge_png(side: int) -> bytes:
    """A whole PNG of side x side in a few kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    packer = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    rows = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def bomb_in_text() -> bytes:
    """A PNG whose compressed text unpacks to 200 MB."""
    picture = file_of(PHOTO)
    body = b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return picture[:33] + chunk + picture[33:]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (file_of(PHOTO)[:-200], "is damaged"),
        (file_of(PHOTO, "JPEG")[:500], "is damaged"),
        (b"", "not a picture in one of these formats (0 bytes"),
        (b"hello", "not a picture in one of these formats"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"PK\x03\x04" + bytes(100), "ZIP"),
        (file_of(PHOTO, "GIF"), "GIF"),
        (file_of(PHOTO, "GIF", save_all=True, append_images=[MIRRORED]), "GIF"),
        (file_of(Image.new("RGB", (1, 1))), "has 1x1 pixels"),
        (file_of(PHOTO, "PNG", save_all=True, append_images=[MIRRORED]), "is animated"),
        (file_of(PHOTO, "WEBP", save_all=True, append_images=[MIRRORED]), "is animated"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(file: bytes, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        decode(file)
    assert reason in str(caught.value)


def test_bombs_are_refused_before_they_are_unpacked() -> None:
    for file, reason in ((huge_png(20_000), "pixels"), (huge_png(12_000), "pixels"), (bomb_in_text(), "damaged")):
        assert len(file) < 300_000
        started = time.process_time()  # what else the machine does counts for nothing
        with pytest.raises(Refused, match=reason):
            decode(file)
        assert time.process_time() - started < 1


SENT = [file_of(PHOTO.resize((21 + i, 17))) for i in range(3)]  # their base64 ends in 0, 1 and 2 signs of padding
URL_SAFE = next(file for seed in range(99) if {43, 47} <= set(base64.b64encode(file := os.urandom(400 + seed % 3))))


@pytest.mark.parametrize("file", [*SENT, URL_SAFE], ids=range(4))
@pytest.mark.parametrize(
    "written",
    [
        "{}", " {}\n", "'{}'", '"{}"', ' "{}" ', "b'{}'", "`{}`", "\u201c{}\u201d", "\ufeff{}", '\\"{}\\"',
        "data:image/png;base64,{}", "data:image/png; base64, {}", "DATA:Image/PNG;BASE64,{}", "'data:;base64,{}'",
        "data:image/png;name=a.png;base64,{}", 'data:image/png;name="a,b.png";base64,{}', "data:;base64,{}",
        "data:image/png;charset=utf-8;base64,{}", "data:image/svg+xml;base64,\n{}", "data:image/png,base64,{}",
        "data:image/png,{}", "image/png;base64,{}", "base64,{}", 'data:image/png;base64,"{}"',
        "data: image/png;base64,{}",
        "data : image/png;base64 , {}",
    ],
)  # fmt: skip
def test_a_picture_in_text_is_read_however_it_is_written(written: str, file: bytes) -> None:
    text = base64.b64encode(file).decode()
    texts = [text, text.rstrip("="), text.replace("+", "-").replace("/", "_"), "\r\n".join(textwrap.wrap(text, 76))]
    texts += [" ".join(text), text.replace("/", "\\/"), "\\n".join(textwrap.wrap(text, 64))]
    for one in texts:
        assert read_source(written.format(one), pytest.fail) == file
    percent = quote(written.format(text), safe="")
    if percent.lower().startswith("data%3a"):
        assert read_source(percent, pytest.fail) == file
    assert read_source(written.format(quote(text, safe="")), pytest.fail) == file


def test_a_data_uri_may_hold_its_bytes_by_percent_signs() -> None:
    assert read_source(f"data:image/png,{quote(SENT[0])}", pytest.fail) == SENT[0]
    with pytest.raises(Refused, match="is SVG"):
        decode(read_source("data:image/svg+xml;utf8,<svg xmlns='http://www.w3.org/2000/svg'/>", pytest.fail))


@pytest.mark.parametrize("written", ["{}", " {} ", "'{}'", '"{}"', "\n{}\n", ' "{}"\n', "\ufeff{}"])
def test_an_address_is_read_however_it_is_written(written: str) -> None:
    for url in ("https://example.com/x.png?a=b", "HTTPS://example.com/x"):
        assert read_source(written.format(url), lambda asked: asked.encode()).decode() == url
        request, *_ = read_request({"input": {"prompt": "x", "init_image": written.format(url)}})
        assert request.init_images == (url,)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("http://example.com/a.png", "is a http: address, and only https:"),
        ("'http://example.com/a.png'", "is a http: address, and only https:"),
        ("file:///etc/passwd", "is a file: address"),
        ("FTP://example.com/a.png", "is a FTP: address"),
        ("s3://bucket/a.png", "is a s3: address"),
        ("data:text/html,hello", "is a data: address of 'text/html'"),
        ("data:image/png;base64", "is a data: address without a comma"),
        ("data:image/png;base64,", "is empty: nothing follows"),
        ("data:image/png;base64, '='", "is empty: it holds no base64"),
        ("", "is empty"),
        (" \n", "is empty"),
        ("====", "is empty"),
        ("not base64!", "is not valid base64: character 10 of 10 is '!'"),
        ("iVBOR=w0KGgoAAAANSUhEUgAAA", "is not valid base64: character 6 of 26 is '='"),
        ("A" * 101, "is not valid base64: of its 101 characters one is too many, or up to three are missing"),
        ("/etc/passwd", "is not valid base64: it looks like a file's path"),
        ("photo.png", "looks like a file's path"),
        ("C:\\Users\\me\\photo.png", "looks like a file's path"),
        ("~/photo.jpeg", "looks like a file's path"),
        ("../photo", "looks like a file's path"),
        ("example.com/photo.jpg", "an address without https://"),
        ('{"url": "https://example.com/a.png"}', "it looks like JSON"),
        ("[object Object]", "it looks like JSON"),
        ("<!DOCTYPE html><p>", "it looks like HTML"),
        ("<svg xmlns='x'></svg>", "it looks like SVG"),
        ("null", "is too short for a picture in base64: 4 characters, 'null'"),
        ("undefined", "is too short for a picture"),
        ("A" * 27_000_000, "27,000,000 characters of base64"),
    ],
)
def test_bad_sources_are_refused(source: str, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        read_source(source, pytest.fail)
    assert reason in str(caught.value)


def box(brand: bytes, *others: bytes) -> bytes:
    """How files of the ISO family begin."""
    return struct.pack(">I", 16 + 4 * len(others)) + b"ftyp" + brand + bytes(4) + b"".join(others) + bytes(100)


@pytest.mark.parametrize(
    ("file", "name", "advice"),
    [
        (box(b"heic", b"mif1", b"heic"), "HEIC", "send it as JPEG or PNG"),
        (box(b"heix"), "HEIC", "send it as JPEG or PNG"),
        (box(b"mif1", b"mif1", b"heic"), "HEIC", "send it as JPEG or PNG"),
        (box(b"msf1", b"hevc"), "HEIC", "send it as JPEG or PNG"),
        (b"\xff\x0a" + bytes(100), "JPEG XL (JXL)", "send it as JPEG or PNG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "JPEG XL (JXL)", "send it as JPEG or PNG"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), "JPEG 2000", "send it as JPEG or PNG"),
        (file_of(PHOTO, "GIF"), "GIF", "send one of its frames"),
        (b"%PDF-1.7\n" + bytes(100), "PDF", "export the page as PNG"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a -->\n<svg xmlns='x'/>", "SVG", "export it as PNG"),
        (b"8BPS\0\x01" + bytes(100), "PSD", "export it as PNG"),
        (box(b"isom", b"avc1"), "video", "send one of its frames"),
        (box(b"qt  "), "video", "send one of its frames"),
        (b"\x1aE\xdf\xa3" + bytes(100), "video", "send one of its frames"),
        (b"\0\0\x01\0\x01\0" + bytes(100), "ICO", "export it as PNG"),
        (file_of(PHOTO, "TGA"), "TGA", "export it as PNG"),
        (file_of(PHOTO, "PPM"), "PPM or PGM", "export it as PNG"),
        (b'{"detail": "not found"}', "JSON", "send the file of the picture itself"),
        (base64.b64encode(SENT[0]), "base64 once more", "encode it once"),
    ],
)  # fmt: skip
def test_what_is_no_picture_here_is_named_with_what_to_send_instead(file: bytes, name: str, advice: str) -> None:
    with pytest.raises(Refused, match=re.escape(f"is {name} ({len(file):,} bytes), which is not read here: {advice}")):
        decode(file)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/a.png", "https://localhost/a.png", "https://169.254.169.254/latest/meta-data/",
        "https://10.0.0.1/", "https://192.168.1.1/", "https://[::1]/", "https://0.0.0.0/", "https://100.64.0.1/",
        "https://2130706433/", "https://user:password@127.0.0.1/",
    ],
)  # fmt: skip
def test_private_addresses_are_never_asked(url: str) -> None:
    with pytest.raises(Refused, match="may not be fetched"):
        fetch_url(url)


@pytest.mark.parametrize(
    "url",
    ["https://[::1", "https://example.com:99999/x", "https://.com/", f"https://{'a' * 70}.com/", "https://a\u2028b.com/",
     "https://", "https:///x", "https://\x00/", "https://a b/"],
)  # fmt: skip
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(Refused):
        fetch_url(url)


class Site(BaseHTTPRequestHandler):
    """A web server of bad manners."""

    def do_GET(self) -> None:
        elsewhere = {"/redirect": "file:///etc/passwd", "/inside": "http://169.254.169.254/latest/meta-data/"}
        self.send_response(302 if self.path in elsewhere else 404 if self.path == "/missing" else 200)
        if self.path in elsewhere:
            self.send_header("Location", elsewhere[self.path])
            os.environ["RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS"] = "false"  # this server was the last that was allowed
        if self.path == "/liar":
            self.send_header("Content-Length", "999999999")
        self.end_headers()
        try:
            match self.path:
                case "/page":
                    self.wfile.write(b"<!DOCTYPE html><html>not here</html>")
                case "/photo":
                    self.wfile.write(file_of(PHOTO))
                case "/endless":
                    while True:
                        self.wfile.write(bytes(1_000_000))
                case "/drip":
                    while True:
                        self.wfile.write(b".")
                        time.sleep(0.05)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(os.environ, "RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_fetching(site: str) -> None:
    assert fetch_url(f"{site}/photo") == file_of(PHOTO)
    for path, reason in (
        ("missing", "HTTP 404"),
        ("endless", "larger than 20,000,000 bytes"),
        ("liar", "size cap"),
    ):
        with pytest.raises(Refused, match=reason):
            fetch_url(f"{site}/{path}")
    with pytest.raises(Refused, match="HTML"):
        decode(fetch_url(f"{site}/page"))
    with pytest.raises(Refused, match=r"within 0\.2 seconds"):
        list(open_url(f"{site}/drip", max_bytes=1_000, seconds=0.2, check=lambda: None))


@pytest.mark.parametrize(
    ("path", "reason"), [("redirect", "blocked URL scheme 'file'"), ("inside", "169.254.169.254|private|blocked")]
)
def test_a_redirect_leads_nowhere_that_may_not_be_asked(site: str, path: str, reason: str) -> None:
    with pytest.raises(Refused, match=f"may not be fetched: .*({reason})"):
        fetch_url(f"{site}/{path}")


def test_all_bad_pictures_of_a_request_are_named_at_once_and_none_is_shown() -> None:
    request, *_ = read_request(
        {"input": {"prompt": "x", "init_image": "QUJD" * 100, "mask_image": "file:///etc/passwd"}}
    )
    loaded, faults, _ = load_pictures(request, Job())
    assert loaded == {}
    assert [fault.field for fault in faults] == ["init_image", "mask_image"]
    assert "QUJDQUJD" not in str(faults)
    assert "allowed: a still picture (PNG" in faults[0].message


def test_fit_keeps_the_aspect_and_repeats_the_edges() -> None:
    wide = Image.new("RGB", (200, 100), "blue")
    wide.paste((255, 0, 0), (50, 0, 150, 100))
    square = fit(wide, (64, 64), (64, 64))
    assert (np.asarray(square)[30, [2, 61], 0] > 250).all(), "the middle, not squeezed"
    padded = fit(PHOTO, (96, 64), (96, 80))
    assert padded.size == (96, 80)
    assert near(padded.crop((0, 8, 96, 72)), PHOTO, most=0.001)
    assert padded.getpixel((40, 0)) == PHOTO.getpixel((40, 0))
    assert fit(PHOTO, (96, 64), (96, 64)) is PHOTO
    assert fit(Image.new("L", (20, 20), 255), (64, 64), (80, 64)).size == (80, 64)


def test_many_large_pictures_are_too_many() -> None:
    large = base64.b64encode(huge_png(7_992)).decode()
    fields = {"init_images": [large] * 4}
    loaded, faults, _ = load_pictures(read_request({"input": {"prompt": "x", **fields}})[0], Job())
    assert [fault.field for fault in faults] == ["init_images.2", "init_images.3"]
    assert "pictures together more than 128,000,000" in faults[0].message
    assert len(loaded["init_image"]) == 2


def test_the_first_page_of_a_document_is_used_with_a_warning() -> None:
    pages = base64.b64encode(file_of(PHOTO, "TIFF", save_all=True, append_images=[PHOTO.rotate(180)] * 2)).decode()
    loaded = load_pictures(read_request({"input": {"prompt": "x", "init_image": pages}})[0], Job())
    assert loaded.faults == ()
    assert near(loaded.pictures["init_image"][0], PHOTO, most=1)
    assert loaded.warnings == ("init_image has 3 pages, of which the first is used",)


@pytest.mark.parametrize("name", ["mask", "mask_image"])
def test_a_mask_whose_transparency_alone_says_something_is_read_by_it(name: str) -> None:
    hole = Image.new("RGBA", (96, 64), (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (0, 0, 48, 64))
    photo = PHOTO.convert("RGBA")
    photo.putalpha(hole.getchannel("A"))
    for mask in (hole, photo)[: 1 + (name == "mask")]:
        fields = {"init_image": PHOTO, name: mask}
        texts = {field: base64.b64encode(file_of(picture)).decode() for field, picture in fields.items()}
        loaded = load_pictures(read_request({"input": {"prompt": "x", **texts}})[0], Job())
        (warning,) = loaded.warnings
        assert warning.startswith("mask_image is read by its transparency")
        assert [loaded.pictures["mask_image"][0].getpixel((x, 9)) for x in (2, 90)] == [255, 0]


@pytest.mark.parametrize("name", ["mask", "mask_image"])
def test_white_strokes_on_a_transparent_ground_are_drawn_anew(name: str) -> None:
    """As an editor's canvas sends them: nothing that is opaque is to be kept."""
    strokes = Image.new("RGBA", (96, 64), (0, 0, 0, 0))
    strokes.paste((255, 255, 255, 255), (0, 0, 48, 64))
    fields = {"init_image": PHOTO, name: strokes}
    texts = {field: base64.b64encode(file_of(picture)).decode() for field, picture in fields.items()}
    loaded = load_pictures(read_request({"input": {"prompt": "x", **texts}})[0], Job())
    assert (loaded.faults, loaded.warnings) == ((), ())
    assert [loaded.pictures["mask_image"][0].getpixel((x, 9)) for x in (2, 90)] == [255, 0]


def test_a_mask_that_changes_nothing_is_named_in_a_warning() -> None:
    for level, warned in ((127, 1), (128, 0)):
        fields = {"init_image": PHOTO.resize((64, 64)), "mask_image": Image.new("L", (64, 64), level)}
        texts = {field: base64.b64encode(file_of(picture)).decode() for field, picture in fields.items()}
        request, faults, _ = read_request({"input": {"prompt": "x", **texts}})
        pictures, *_ = load_pictures(request, Job())
        plan = make_plan(request, faults, get_model("FLUX.1-dev"), pictures, max_pixels=2**22)
        assert len([text for text in plan.warnings if "mask_image changes nothing" in text]) == warned


def laid(**fields: Any) -> tuple[Pictures, list[Fault]]:
    """The request's pictures with their masks and borders."""
    request, *_ = read_request({"input": {"prompt": "x", **fields}})
    return decide_pictures(request, load_pictures(request, Job())[0])


def test_what_is_drawn_around_a_picture_is_white_in_its_mask() -> None:
    fields: dict[str, Any] = {
        "init_image": base64.b64encode(file_of(PHOTO)).decode(),
        "outpaint": {"left": 8, "bottom": 4},
    }
    loaded, _ = laid(**fields)
    (picture,), (mask,) = loaded["init_image"], loaded["mask_image"]
    assert picture.size == mask.size == (104, 72), "multiples of 8, so that nothing is scaled"
    assert near(picture.crop((8, 0, 104, 64)), PHOTO, most=0.001)
    assert picture.getpixel((0, 5)) == PHOTO.getpixel((0, 5))
    around = np.full((72, 104), 255)
    around[:64, 8:] = 0
    assert np.array_equal(np.asarray(mask), around)
    hole = Image.new("L", (48, 32))
    hole.paste(255, (0, 0, 24, 32))
    fields["mask_image"] = base64.b64encode(file_of(hole)).decode()
    (mask,) = laid(**fields)[0]["mask_image"]
    around[:64, 8:56] = 255
    assert np.array_equal(np.asarray(mask), around)


def test_what_is_drawn_around_a_picture_has_its_limit() -> None:
    long = base64.b64encode(file_of(Image.new("1", (16, 1_000_000)))).decode()
    fields = {"init_image": long, "outpaint": {"left": 2048, "right": 2048}}
    loaded, (fault,) = laid(**fields)
    assert "would make a picture of 4112x1000000; allowed: 64,000,000 pixels at most" in fault.message
    assert "mask_image" not in loaded


def test_a_mask_has_the_shape_of_its_picture() -> None:
    def masked(*size: int, **fields: Any) -> Image.Image:
        mask = Image.new("L", (size[0], size[1]))
        mask.paste(255, (0, 0, size[0], size[1] // 4))
        sent = {"init_image": file_of(Image.new("RGB", (256, 128))), "mask_image": file_of(mask)}
        sources = {name: base64.b64encode(file).decode() for name, file in sent.items()}
        request, faults, _ = read_request({"input": {"prompt": "x", **sources, **fields}})
        assert faults == ()
        pictures, found, _ = load_pictures(request, Job())
        plan = make_plan(request, found, get_model("FLUX.1-dev"), pictures, max_pixels=2**22)
        return plan.pictures["mask_image"][0]

    for size in ((256, 128), (128, 64), (130, 64)):
        mask = masked(*size)
        assert (mask.size, mask.getbbox()) == ((256, 128), (0, 0, 256, 32))
    fields: dict[str, Any]
    for fields in ({}, {"outpaint": {"left": 8}}):
        with pytest.raises(
            InvalidRequest, match=r"^mask_image: must have the shape of init_image, which is 256x128, got 128x128$"
        ):
            masked(128, 128, **fields)
