"""Pictures reach the client whole: in base64, smaller, or by URL from a real S3 server."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import boto3
import numpy as np
import pytest
import requests
from numpy.typing import NDArray
from PIL import Image
from requests.structures import CaseInsensitiveDict

from benchmarks.photographs import photographs
from src.catalog import FORMATS, get_model
from src.errors import InvalidSettings, ResponseTooLarge
from src.job import Job
from src.outputs import Generation
from src.plan.plan import Plan, make_plan
from src.request.reading import read_request
from src.response.delivery import Base64, deliver
from src.response.encode import read_parameters
from src.response.storage import Bucket, read_bucket
from src.settings import Settings

MODEL = get_model("flux-shapes")


def ship(
    pictures: list[Image.Image], max_mb: float = 10, bucket: Bucket | None = None, **fields: Any
) -> dict[str, Any]:
    width, height = pictures[0].size
    event = {"input": {"prompt": "photographs", "seed": 7, "width": width, "height": height, **fields}}
    request, faults, _ = read_request({"input": {**event["input"], "num_images": len(pictures)}})
    plan: Plan = make_plan(request, faults, MODEL, max_pixels=2048 * 2048)
    generation = Generation(tuple(pictures), "euler", {"encode_prompt": 0.1, "denoise": 1.0, "decode": 0.2}, (), None)
    max_bytes = int(max_mb * 1e6)
    response = deliver(generation, plan, MODEL, "rev", job=Job("job/1"), bucket=bucket, max_bytes=max_bytes)
    assert len(json.dumps({"output": response}).encode()) <= max_bytes
    return response


def pixels(file: bytes) -> NDArray[Any]:
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))


def noise(side: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return photographs(4, 1024)


def test_what_fits_comes_as_it_was_asked_for(photos: list[Image.Image]) -> None:
    response = ship(photos, max_mb=20)
    assert "image_urls" not in response
    assert response["metadata"]["warnings"] == []
    for text, photo in zip(response["images"], photos, strict=True):
        assert np.array_equal(pixels(base64.b64decode(text)), np.asarray(photo))


def test_four_large_photographs_come_whole_within_the_limit_and_say_so(photos: list[Image.Image]) -> None:
    response = ship(photos, max_mb=8)
    (warning,) = response["metadata"]["warnings"]
    assert warning == "4 picture(s) came as lossless WEBP instead of PNG: a response may have 8 MB"
    assert response["metadata"]["output_format"] == "WEBP"
    for i, text in enumerate(response["images"]):
        file = base64.b64decode(text)
        assert np.array_equal(pixels(file), np.asarray(photos[i]))
        parameters = read_parameters(Image.open(io.BytesIO(file)))
        assert parameters is not None
        assert (parameters["input"]["seed"], parameters["input"]["output_format"]) == (7 + i, "PNG")


def test_what_is_too_large_without_loss_becomes_a_good_jpeg(photos: list[Image.Image]) -> None:
    response = ship(photos, max_mb=4)
    assert "came as JPEG of quality 9" in response["metadata"]["warnings"][0]
    assert response["metadata"]["output_quality"] in (90, 95)
    for i, text in enumerate(response["images"]):
        assert np.abs(pixels(base64.b64decode(text)) - np.asarray(photos[i], float)).mean() < 3


@pytest.mark.parametrize("format", [name for name, row in FORMATS.items() if row.quality])
def test_a_lossy_format_stays_itself_with_less_quality(format: str, photos: list[Image.Image]) -> None:
    quality = 100
    full = ship(photos, max_mb=50, output_format=format, output_quality=quality)
    size = len(json.dumps(full)) / 1e6
    response = ship(photos, max_mb=size * 0.8, output_format=format, output_quality=quality)
    assert response["metadata"]["output_format"] == format
    assert response["metadata"]["output_quality"] == 95


def test_what_fits_nowhere_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ResponseTooLarge, match=r"4 picture\(s\) of 512x512 .* even as JPEG of quality 85") as caught:
        ship([noise(512, seed) for seed in range(4)], max_mb=0.1)
    message = str(caught.value)
    assert "BUCKET_ENDPOINT_URL" in message
    assert "0.1 MB (MAX_RESPONSE_MB)" in message
    assert "[7, 8, 9, 10]" in message


def test_a_log_of_a_response_shows_sizes_not_pictures() -> None:
    response = ship([noise(64)])
    (text,) = response["images"]
    assert isinstance(text, Base64)
    assert f"<{len(text):,} characters of base64>" in str(response)
    assert str(text)[:20] not in repr(response)
    assert json.loads(json.dumps(response))["images"] == [str(text)]


# ---- a real S3 server


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """moto's server in a process of its own, with the bucket "pictures"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(300):
            try:
                requests.get(url, timeout=1)
                break
            except requests.RequestException:
                time.sleep(0.1)
        keys = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket="pictures")
        yield url
    finally:
        server.terminate()
        server.wait(10)


def bucket(s3: str, **more: Any) -> Bucket:
    keys = {"bucket_access_key_id": "key", "bucket_secret_access_key": "secret", "bucket_name": "pictures"}
    held = Bucket.from_settings(Settings(bucket_endpoint_url=s3, **{**keys, **more}))
    assert held is not None
    return held


def test_pictures_are_uploaded_and_fetched_by_their_signed_urls(s3: str, photos: list[Image.Image]) -> None:
    response = ship(photos, max_mb=1, bucket=bucket(s3, bucket_prefix="/flux/"))
    assert "images" not in response
    assert response["metadata"]["warnings"] == []
    assert response["metadata"]["timings"]["upload"] > 0
    assert len(set(response["image_urls"])) == 4
    for url, photo in zip(response["image_urls"], photos, strict=True):
        assert "/pictures/flux/job_1/" in url
        assert "X-Amz-Expires=604800" in url
        answer = requests.get(url, timeout=10)
        assert answer.status_code == 200
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.headers["Cache-Control"] == "private, max-age=31536000, immutable"
        assert np.array_equal(pixels(answer.content), np.asarray(photo))


def test_bytes_in_the_bucket_are_the_bytes_that_travel_in_base64(s3: str, photos: list[Image.Image]) -> None:
    carried, uploaded = ship(photos, max_mb=20), ship(photos, bucket=bucket(s3))
    for text, url in zip(carried["images"], uploaded["image_urls"], strict=True):
        assert base64.b64decode(text) == requests.get(url, timeout=10).content


def test_a_failed_upload_falls_back_picture_by_picture(s3: str) -> None:
    class Moody(Bucket):
        """Fails every second upload."""

        numbers = itertools.count()

        def upload(self, file: bytes, name: str, mime: str) -> str:
            if name.endswith(("/8.png", "/10.png")):
                raise ConnectionError("https://key:secret@host is gone")
            return super().upload(file, name, mime)

    held = bucket(s3)
    response = ship([noise(64, i) for i in range(4)], bucket=Moody(held._client, "pictures", url_expiry=60))
    assert [url is None for url in response["image_urls"]] == [False, True, False, True]
    assert [text is None for text in response["images"]] == [True, False, True, False]
    assert response["metadata"]["warnings"] == [
        f"picture {i} is here in base64: its upload failed (ConnectionError)" for i in (1, 3)
    ]
    assert np.array_equal(pixels(base64.b64decode(response["images"][3])), np.asarray(noise(64, 3)))


def test_a_bucket_that_is_gone_loses_nothing(s3: str) -> None:
    response = ship([noise(64)], bucket=bucket(s3, bucket_name="no-such-bucket"))
    assert "image_urls" not in response
    assert len(response["images"]) == 1
    assert "NoSuchBucket" in response["metadata"]["warnings"][0]


def test_the_check_of_a_bucket_writes_and_leaves_nothing(s3: str) -> None:
    held = bucket(s3, bucket_prefix="checked")
    held.check()
    assert held._client.list_objects_v2(Bucket="pictures", Prefix="checked")["KeyCount"] == 0
    with pytest.raises(InvalidSettings, match=r"BUCKET_NAME='nobody'.*NoSuchBucket"):
        bucket(s3, bucket_name="nobody").check()


@pytest.mark.parametrize(
    ("url", "endpoint", "name", "region"),
    [
        ("https://s3.example.com/pictures", "https://s3.example.com", "pictures", "us-east-1"),
        ("https://pictures.s3.eu-west-1.amazonaws.com", "https://s3.eu-west-1.amazonaws.com", "pictures", "eu-west-1"),
        ("https://s3.amazonaws.com/pictures/", "https://s3.amazonaws.com", "pictures", "us-east-1"),
        (
            "https://abc.r2.cloudflarestorage.com/pictures",
            "https://abc.r2.cloudflarestorage.com",
            "pictures",
            "us-east-1",
        ),
    ],
)
def test_a_url_names_its_bucket_and_region(url: str, endpoint: str, name: str, region: str) -> None:
    held = bucket(url, bucket_name=None)
    client = held._client
    assert (client.meta.endpoint_url, held._name, client.meta.region_name) == (endpoint, name, region)


A_ACCOUNT = "0123456789abcdef0123456789abcdef"
# The address, the name beside it -> the endpoint, the bucket, the region, and where a signed URL leads.
ADDRESSES = [
    ("https://pics.s3-eu-west-1.amazonaws.com", None, "https://s3-eu-west-1.amazonaws.com", "eu-west-1",
     "https://s3-eu-west-1.amazonaws.com/pics/k"),
    ("https://S3.EU-West-1.AMAZONAWS.com/pics/", None, "https://s3.eu-west-1.amazonaws.com", "eu-west-1",
     "https://s3.eu-west-1.amazonaws.com/pics/k"),
    ("https://pics.s3.dualstack.eu-west-1.amazonaws.com", None, "https://s3.dualstack.eu-west-1.amazonaws.com",
     "eu-west-1", "https://s3.dualstack.eu-west-1.amazonaws.com/pics/k"),
    ("https://pics.s3-accelerate.amazonaws.com", None, "https://s3-accelerate.amazonaws.com", "us-east-1",
     "https://pics.s3-accelerate.amazonaws.com/k"),
    ("https://pics.s3-accelerate.dualstack.amazonaws.com", None, "https://s3-accelerate.dualstack.amazonaws.com",
     "us-east-1", "https://pics.s3-accelerate.dualstack.amazonaws.com/k"),
    ("https://pics.s3.cn-north-1.amazonaws.com.cn", None, "https://s3.cn-north-1.amazonaws.com.cn", "cn-north-1",
     "https://s3.cn-north-1.amazonaws.com.cn/pics/k"),
    ("https://pics.s3-fips.us-gov-west-1.amazonaws.com", None, "https://s3-fips.us-gov-west-1.amazonaws.com",
     "us-gov-west-1", "https://s3-fips.us-gov-west-1.amazonaws.com/pics/k"),
    ("https://x.example.co/storage/v1/s3", "pics", "https://x.example.co/storage/v1/s3", "us-east-1",
     "https://x.example.co/storage/v1/s3/pics/k"),
    ("https://files.example.com/minio", "pics", "https://files.example.com/minio", "us-east-1",
     "https://files.example.com/minio/pics/k"),
    ("https://files.example.com/minio/pics/", "pics", "https://files.example.com/minio", "us-east-1",
     "https://files.example.com/minio/pics/k"),
    ("http://minio:9000/pics", None, "http://minio:9000", "us-east-1", "http://minio:9000/pics/k"),
    ("https://s3.example.com/pics", "pics", "https://s3.example.com", "us-east-1", "https://s3.example.com/pics/k"),
    ("https://pics.fra1.digitaloceanspaces.com", None, "https://fra1.digitaloceanspaces.com", "fra1",
     "https://fra1.digitaloceanspaces.com/pics/k"),
    ("https://s3.us-west-004.backblazeb2.com", "pics", "https://s3.us-west-004.backblazeb2.com", "us-west-004",
     "https://s3.us-west-004.backblazeb2.com/pics/k"),
    (f"https://{A_ACCOUNT}.eu.r2.cloudflarestorage.com/pics", None, f"https://{A_ACCOUNT}.eu.r2.cloudflarestorage.com",
     "us-east-1", f"https://{A_ACCOUNT}.eu.r2.cloudflarestorage.com/pics/k"),
    ("https://s3api-eu-ro-1.runpod.io/pics", None, "https://s3api-eu-ro-1.runpod.io", "EU-RO-1",
     "https://s3api-eu-ro-1.runpod.io/pics/k"),
    ("https://pics.fsn1.your-objectstorage.com:443", None, "https://fsn1.your-objectstorage.com:443", "fsn1",
     "https://fsn1.your-objectstorage.com:443/pics/k"),
]  # fmt: skip


@pytest.mark.parametrize(("url", "name", "endpoint", "region", "link"), ADDRESSES)
def test_every_form_of_an_address(url: str, name: str | None, endpoint: str, region: str, link: str) -> None:
    held = bucket(url, bucket_name=name)
    client = held._client
    assert (client.meta.endpoint_url, held._name, client.meta.region_name) == (endpoint, "pics", region)
    assert held._link("k").split("?")[0] == link


def test_the_bucket_stands_where_the_setting_has_it() -> None:
    virtual = bucket("https://s3.example.com/pics", bucket_name=None, bucket_addressing_style="Virtual")
    assert virtual._link("k").startswith("https://pics.s3.example.com/k?")
    aws = bucket("https://pics.s3.eu-west-1.amazonaws.com", bucket_name=None, bucket_addressing_style="virtual")
    assert aws._link("k").startswith("https://pics.s3.eu-west-1.amazonaws.com/k?")


@pytest.mark.parametrize(
    ("url", "name", "reason"),
    [
        ("https://s3.example.com/a/b", None, "BUCKET_NAME: is required"),
        ("https://s3.example.com/a?x=1", None, "without a user, a query or a fragment"),
        ("https://s3.example.com:port/a", None, "must be the address of a store"),
        ("https://pics.s3.eu-west-1.amazonaws.com", "other", "names the bucket 'pics', and beside it 'other' is named"),
    ],
)
def test_what_is_no_address_of_a_bucket_is_refused(url: str, name: str | None, reason: str) -> None:
    with pytest.raises(InvalidSettings, match=re.escape(reason)):
        bucket(url, bucket_name=name)


WRONG_REGION = b"""<Error><Code>AuthorizationHeaderMalformed</Code><Message>The authorization header is malformed; the
region 'us-east-1' is wrong; expecting 'eu-west-1'</Message><Region>eu-west-1</Region></Error>"""


@contextmanager
def proxy(store: str, answer: Callable[[str, str], tuple[str, int]]) -> Iterator[str]:
    """A server before the store: `answer` says of each method and path where it leads there, or which status it has."""

    class Handler(BaseHTTPRequestHandler):
        def pass_on(self) -> None:
            path, status = answer(self.command, self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if status:
                content, headers = WRONG_REGION, CaseInsensitiveDict[str]()
            else:
                there = requests.request(self.command, store + path, data=body, headers=dict(self.headers), timeout=10)
                content, headers, status = there.content, there.headers, there.status_code
            self.send_response(status)
            for name in headers.keys() & {"Content-Type", "ETag"}:
                self.send_header(name, headers[name])
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_DELETE = do_HEAD = pass_on

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_store_behind_a_path(s3: str) -> None:
    with proxy(
        s3, lambda _, path: (path.removeprefix("/storage/v1/s3"), 0 if path.startswith("/storage/") else 404)
    ) as url:
        held = bucket(f"{url}/storage/v1/s3")
        held.check()
        assert held.no_links == ""
        (link,) = ship([noise(64)], bucket=held)["image_urls"]
        assert "/storage/v1/s3/pictures/job_1/" in link
        assert requests.get(link, timeout=10).status_code == 200


def test_a_store_that_refuses_signed_gets_sends_pictures_in_base64(s3: str) -> None:
    with proxy(s3, lambda method, path: (path, 403 if method == "GET" else 0)) as url:
        held = bucket(url)
        held.check()
        assert "403" in held.no_links
        response = ship([noise(64)], bucket=held)
        assert "image_urls" not in response
        assert len(response["images"]) == 1
        assert "nobody could fetch them from the bucket" in response["metadata"]["warnings"][0]


def test_a_public_address_gives_links_without_an_end(s3: str) -> None:
    def public(method: str, path: str) -> tuple[str, int]:
        """As a CDN: it may read the bucket, and needs no signature."""
        if method != "GET":
            return path, 0
        folder, _, key = path.removeprefix("/").partition("/")
        return bucket(s3)._link(unquote(key)).removeprefix(s3), 0 if folder == "cdn" else 403

    with proxy(s3, public) as url:
        held = bucket(url, bucket_public_url=f"{url}/cdn/", bucket_prefix="a b")
        held.check()
        assert held.no_links == ""
        (link,) = ship([noise(64)], bucket=held)["image_urls"]
        assert link.startswith(f"{url}/cdn/a%20b/job_1/")
        assert "?" not in link
        assert requests.get(link, timeout=10).status_code == 200
        nowhere = bucket(url, bucket_public_url=f"{url}/elsewhere")
        nowhere.check()
        assert "403" in nowhere.no_links


def test_the_region_that_a_store_names_is_said(s3: str) -> None:
    with (
        proxy(s3, lambda _, path: (path, 400)) as url,
        pytest.raises(InvalidSettings, match="set BUCKET_REGION=eu-west-1"),
    ):
        bucket(url).check()


CONFIG = {"accessId": "key", "accessSecret": "very-secret", "bucketName": "pictures"}


def test_the_bucket_that_an_event_brings(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(bucket_url_expiry=60)
    event = {"input": {}, "s3Config": {**CONFIG, "endpointUrl": s3}}
    held, faults = read_bucket(event, settings)
    assert held is None
    assert faults[0].field == "s3Config"
    assert "resolves to non-public address 127.0.0.1" in faults[0].message
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")  # the SDK's own, for stores in one's own network
    held, faults = read_bucket(event, settings)
    assert not faults
    assert held is not None
    (link,) = ship([noise(64)], bucket=held)["image_urls"]
    assert requests.get(link, timeout=10).status_code == 200


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, ""),
        (None, ""),
        ("s3://pictures", "must be an object with endpointUrl"),
        ({"endpointUrl": "https://s3.example.com"}, "accessId is required, accessSecret is required"),
        ({**CONFIG, "accessId": 5, "endpointUrl": "https://s3.example.com"}, "accessId is no text"),
        ({**CONFIG, "endpointUrl": "s3.example.com"}, "must be the address of a store"),
        ({**CONFIG, "bucketName": "", "endpointUrl": "https://s3.example.com"}, "bucketName is required"),
        ({**CONFIG, "endpointUrl": "http://169.254.169.254/x"}, "non-public"),
    ],
)
def test_what_is_wrong_of_a_bucket_that_an_event_brings_is_said(config: object, reason: str) -> None:
    held, faults = read_bucket({"input": {}, "s3Config": config}, Settings())
    assert held is None
    assert [fault.field for fault in faults] == ["s3Config"] * bool(reason)
    assert all(reason in fault.message and "very-secret" not in fault.message for fault in faults)


def test_a_bucket_without_a_name_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="BUCKET_NAME: is required"):
        bucket("https://s3.example.com", bucket_name=None)


def test_no_bucket_is_no_bucket() -> None:
    assert Bucket.from_settings(Settings()) is None
