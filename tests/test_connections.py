"""Uploads to stores that hang, drip, hang up or lie: they end in time, and pictures get to the client another way."""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from PIL import Image

from handler import respond
from src.catalog import get_model
from src.engine import Engine
from src.errors import Cancelled, InvalidSettings, TimedOut, WorkerUnavailable
from src.job import Job, Progress
from src.outputs import Generation
from src.plan.plan import make_plan
from src.request.reading import read_request
from src.response import delivery
from src.response.connections import in_time
from src.response.storage import Bucket, read_bucket
from src.settings import Settings
from tests.fakes import FakePipeline

MODEL = get_model("flux-shapes")
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
LONG = 30  # seconds that nothing here may take: before, these waited for minutes or for ever


def drip(connection: socket.socket) -> None:
    """A status line, and headers without an end, a few bytes at a time."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    while True:
        connection.sendall(b"X: y\r\n")
        time.sleep(0.02)


def drip_body(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        connection.sendall(b"1\r\nx\r\n")
        time.sleep(0.02)


def endless_continue(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.005)


def hang(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def hang_up_after_continue(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 100 Continue\r\n")


def flood(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 403 Forbidden\r\nTransfer-Encoding: chunked\r\n\r\n")
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    while True:
        connection.sendall(piece)


def take(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.sendall(OK)


@contextmanager
def store(behave: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[socket.socket]]]:
    """A server whose every connection behaves so; its URL, and the connections."""
    connections: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            behave(connection)

    def accept() -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                connections.append(connection)
                threading.Thread(target=serve, args=[connection], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/pictures", connections
        server.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def bucket(url: str) -> Bucket:
    held = Bucket.from_settings(
        Settings(bucket_endpoint_url=url, bucket_access_key_id="key", bucket_secret_access_key="very-secret")
    )
    assert held is not None
    return held


def ship(held: Bucket | None, job: Job | None = None, pictures: int = 2, max_bytes: int = 10**7) -> dict[str, Any]:
    event = {"input": {"prompt": "x", "seed": 7, "width": 64, "height": 64, "num_images": pictures}}
    request, faults, _ = read_request(event)
    plan = make_plan(request, faults, MODEL, max_pixels=2048**2)
    drawn = tuple(Image.effect_noise((64, 64), 99).convert("RGB") for _ in range(pictures))
    generation = Generation(drawn, "euler", {}, (), None)
    return delivery.deliver(generation, plan, MODEL, None, job=job or Job(), bucket=held, max_bytes=max_bytes)


def wait_for_the_threads() -> None:
    """No upload is under way any more."""
    for thread in threading.enumerate():
        if thread.name == "upload":
            thread.join(LONG)
            assert not thread.is_alive()


STORES = [drip, drip_body, endless_continue, hang, hang_up_after_continue, flood]


@pytest.mark.parametrize("behave", STORES)
def test_a_store_that_takes_its_time_is_given_up_and_pictures_come_in_base64(
    behave: Callable[[socket.socket], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(delivery, "UPLOAD_SECONDS", 2)
    begun = time.monotonic()
    with store(behave) as (url, _):
        response = ship(bucket(url))
        assert time.monotonic() - begun < LONG
        assert len(response["images"]) == 2
        assert "image_urls" not in response
        assert all("its upload failed" in warning for warning in response["metadata"]["warnings"])
        assert {record.levelname for record in caplog.records if "upload" in record.message} == {"ERROR"}
        assert "very-secret" not in caplog.text
        wait_for_the_threads()


@pytest.mark.parametrize("behave", [drip, hang])
def test_a_job_that_is_cancelled_or_late_stops_uploading(behave: Callable[[socket.socket], None]) -> None:
    def see(progress: Progress) -> None:
        if progress.phase == "upload":
            threading.Timer(0.3, job.cancel).start()

    job, late = Job(on_progress=see), Job(timeout=2)
    begun = time.monotonic()
    with store(behave) as (url, connections):
        with pytest.raises(Cancelled, match="upload"):
            ship(bucket(url), job)
        with pytest.raises(TimedOut, match="REQUEST_TIMEOUT=2"):
            ship(bucket(url), late)
        assert time.monotonic() - begun < LONG
        wait_for_the_threads()
        assert connections, "it had begun"


def test_a_job_that_is_cancelled_while_it_uploads_is_no_success(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    class Slow(Bucket):
        """The client cancels while the last byte is on its way."""

        def upload(self, file: bytes, name: str, mime: str) -> str:
            job.cancel()
            return f"https://store.test/{name}"

    job = Job("abc")
    slow = Slow(None, "pictures", url_expiry=60)
    engine = Engine(FakePipeline(), MODEL, None)
    answer = respond({"input": {"prompt": "x"}}, job, Settings, lambda: engine, lambda: slow)
    assert answer["error_code"] == "cancelled"
    assert "success" not in caplog.text


def test_what_is_too_large_because_the_workers_bucket_is_down_is_the_workers_fault() -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}/pictures"
    with pytest.raises(WorkerUnavailable, match=r"bucket took none .*EndpointConnectionError.* send the request again"):
        ship(bucket(url), max_bytes=3_000)


def test_a_connection_serves_one_upload_after_another() -> None:
    def serve(connection: socket.socket) -> None:
        while True:
            take(connection)

    with store(serve) as (url, connections):
        held = bucket(url)
        for _ in range(3):
            assert "images" not in ship(held, pictures=1)
        assert len(connections) == 1
        before = len(os.listdir("/proc/self/fd"))
        held.close()
        assert len(os.listdir("/proc/self/fd")) <= before - 2, "not even the garbage collector is needed"


def test_without_another_thread_pictures_are_encoded_by_this_one_and_not_uploaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    plain = ship(None, pictures=4)
    with store(take) as (url, _), monkeypatch.context() as patch:
        held = bucket(url)
        patch.setattr(threading.Thread, "start", refuse)
        assert len(ship(None, pictures=4)["images"]) == len(plain["images"]) == 4
        response = ship(held)
        assert len(response["images"]) == 2
        assert "its upload failed (RuntimeError)" in response["metadata"]["warnings"][0]


def test_pictures_of_a_response_are_encoded_by_few_threads() -> None:
    names = set[str]()

    def work(i: int) -> int:
        names.add(str(threading.get_ident()))
        time.sleep(0.01)
        if i == 50:
            raise LookupError("50")
        return i * i

    assert list(delivery._side_by_side(work, range(20)).values()) == [i * i for i in range(20)]
    assert len(names) <= 4
    with pytest.raises(LookupError, match="50"):
        delivery._side_by_side(work, range(60))


def test_what_is_done_in_time_is_not_what_is_late() -> None:
    go = threading.Event()

    def fail() -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    outcomes = in_time({0: lambda: "done", 1: fail, 2: lambda: str(go.wait())}, 0.5)
    go.set()
    assert outcomes[0] == "done"
    assert isinstance(outcomes[1], OSError)
    assert isinstance(outcomes[2], TimeoutError)


@pytest.mark.parametrize("behave", [drip, hang, hang_up_after_continue])
def test_a_start_does_not_wait_for_a_store_for_ever(
    behave: Callable[[socket.socket], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.response.storage.UPLOAD_SECONDS", 1)
    begun = time.monotonic()
    with store(behave) as (url, _):
        with pytest.raises(InvalidSettings, match="do not let this worker upload"):
            bucket(url).check()
        assert time.monotonic() - begun < LONG
        wait_for_the_threads()


# ---- a client's own bucket

CONFIG = {"accessId": "key", "accessSecret": "very-secret", "bucketName": "pictures"}


def lead(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Let the name store.test lead to one of `addresses` after another."""
    resolve: Callable[..., Any] = socket.getaddrinfo
    coming = list(addresses)

    def answer(host: Any, *rest: Any, **options: Any) -> Any:
        if host == "store.test":
            host = coming.pop(0) if len(coming) > 1 else coming[0]
        return resolve(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)


def test_a_name_that_leads_into_a_private_network_later_gets_no_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    lead(monkeypatch, "8.8.8.8", "127.0.0.1")
    received = list[bytes]()

    def listen(connection: socket.socket) -> None:
        received.append(connection.recv(65536))

    with store(listen) as (url, _):
        port = url.rpartition(":")[2].partition("/")[0]
        brought = read_bucket({"s3Config": {**CONFIG, "endpointUrl": f"http://store.test:{port}"}}, Settings())
        assert brought.faults == ()
        response = ship(brought.bucket)
        brought.close()
    assert len(response["images"]) == 2
    assert "its upload failed" in response["metadata"]["warnings"][0]
    assert not any(received)


def test_a_name_server_that_takes_its_time_is_given_up_and_others_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.response.storage._LOOK_UP_SECONDS", 0.2)
    resolve: Callable[..., Any] = socket.getaddrinfo
    go = threading.Event()

    def wait(host: Any, *rest: Any, **options: Any) -> Any:
        if host == "store.test":
            go.wait(LONG)
            host = "127.0.0.1"
        return resolve(host, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", wait)
    brought = read_bucket({"s3Config": {**CONFIG, "endpointUrl": "https://store.test"}}, Settings())
    go.set()
    assert "could not be looked up within 0.2 seconds" in brought.faults[0].message


@pytest.mark.parametrize(
    "config",
    [
        {"endpointUrl": "https://["},
        {"endpointUrl": "https://store.test:99999"},
        {"endpointUrl": "https://store.test/\ud800"},
        {"endpointUrl": "https://\ud800.test"},
        {"endpointUrl": "https://" + "a." * 2_000_000},
        {"endpointUrl": "https://8.8.8.8", "accessSecret": "s" * 10_000_000},
        {"endpointUrl": "https://8.8.8.8", "bucketName": "b" * 10_000},
        {"endpointUrl": "https://8.8.8.8", "bucketName": {"a": 1}},
        {"endpointUrl": "https://[::1]/pictures"},
        {"endpointUrl": "https://[::ffff:10.0.0.1]/pictures"},
        {"endpointUrl": "https://0x7f.1/pictures"},
    ],
)
def test_a_clients_odd_bucket_is_the_clients_fault_and_soon_named(config: dict[str, Any]) -> None:
    engine = Engine(FakePipeline(), MODEL, None)
    begun = time.monotonic()
    answer = respond({"input": {"prompt": "x"}, "s3Config": {**CONFIG, **config}}, Job(), Settings, lambda: engine)
    assert time.monotonic() - begun < 15
    assert answer["error_code"] == "invalid_request", answer
    assert [error["field"] for error in answer["errors"]] == ["s3Config"]
    assert len(str(answer)) < 50_000
    str(answer).encode()


@pytest.mark.parametrize("field", ["accessId", "accessSecret", "bucketName"])
def test_half_a_character_in_a_clients_bucket_is_answered(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_ALLOW_PRIVATE_DOWNLOAD_URLS", "true")
    engine = Engine(FakePipeline(), MODEL, None)
    with store(take) as (url, _):
        config = {**CONFIG, "endpointUrl": url.removesuffix("/pictures"), field: "k\ud800"}
        answer = respond({"input": {"prompt": "x"}, "s3Config": config}, Job(), Settings, lambda: engine)
    assert answer.get("error_code") in (None, "invalid_request"), answer
    str(answer).encode()


def test_many_clients_may_bring_a_bucket_at_once() -> None:
    events = [{"s3Config": {**CONFIG, "endpointUrl": f"https://8.8.8.{i}"}} for i in range(16)]
    with ThreadPoolExecutor(16) as threads:
        brought = list(threads.map(lambda event: read_bucket(event, Settings()), events))
    assert all(each.bucket and not each.faults for each in brought)
    for each in brought:
        each.close()


def test_a_jobs_progress_is_shown_before_it_uploads() -> None:
    seen = list[Progress]()
    with store(take) as (url, _):
        ship(bucket(url), Job(on_progress=seen.append), pictures=1)
    assert [progress.phase for progress in seen] == ["encode_images", "upload"]
