"""web.py: RunPod's routes over HTTP on the real handler, who may ask, what is bounded, and how it ends."""

from __future__ import annotations

import base64
import concurrent.futures
import http.client
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import requests
import runpod
from PIL import Image

from handler import answer, handler
from src.errors import DeviceFailed, InvalidSettings
from src.job import Job
from src.settings import ROOT, web_token
from src.web.bodies import Bodies
from src.web.endpoint import FINAL
from src.web.local import LocalEndpoint
from tests.fakes import never
from tests.runpod_stand_in import ENDPOINT, StandIn, worker
from tests.served import served
from web import deployed

ENDLESS: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 100, "num_images": 4}
EVERYWHERE = "0.0.0.0"  # noqa: S104
SMALL: dict[str, Any] = {"prompt": "a red circle", "width": 64, "height": 64, "num_inference_steps": 2, "seed": 5}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The real handler behind the real server."""
    with served(LocalEndpoint(answer)) as address:
        yield address


@pytest.fixture
def quiet() -> Iterator[str]:
    """A server whose jobs nobody should begin."""
    with served(LocalEndpoint(never)) as address:
        yield address


def post(url: str, route: str, body: Any = None, **headers: str) -> requests.Response:
    return requests.post(f"{url}/{route}", json=body, headers=headers, timeout=60)


def run(url: str, **fields: Any) -> str:
    return str(post(url, "v2/local/run", {"input": fields}).json()["id"])


def runsync(url: str, **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = post(url, "v2/local/runsync", {"input": fields}).json()
    return found


def status(url: str, id: str) -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"{url}/v2/local/status/{id}", timeout=60).json()
    return found


def until(url: str, id: str, ready: Callable[[dict[str, Any]], bool], seconds: float = 60) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while not ready(state := status(url, id)):
        assert time.monotonic() < deadline, state
        assert state["status"] not in FINAL, state
        time.sleep(0.01)
    return state


def is_over(state: dict[str, Any]) -> bool:
    return state["status"] in FINAL


def has_begun(state: dict[str, Any]) -> bool:
    return state["status"] == "IN_PROGRESS" and bool(state["output"]["step"])


# RunPod's routes


def test_a_job_is_the_handlers_own_answer(url: str) -> None:
    done = runsync(url, **SMALL)
    assert done["status"] == "COMPLETED"
    assert done["executionTime"] > 0
    assert done["delayTime"] >= 0
    assert done["output"]["images"] == handler({"input": SMALL})["images"]
    assert status(url, done["id"]) == done


def test_runpods_own_client_works(url: str) -> None:
    endpoint = runpod.Endpoint("local", api_key="rpa_of_nobody")
    endpoint.rp_client.endpoint_url_base = f"{url}/v2"
    assert endpoint.run_sync({"input": SMALL})["status"] == "success"
    job = endpoint.run({"input": ENDLESS})
    assert job.status() in ("IN_QUEUE", "IN_PROGRESS")
    assert job.cancel()["status"] == "CANCELLED"
    assert job.status() == "CANCELLED"
    assert endpoint.health()["jobs"]["completed"] >= 1


def test_a_job_that_runs_tells_how_far_it_is_and_the_next_one_waits(url: str) -> None:
    first, second = run(url, **ENDLESS, preview=True), run(url, **SMALL)
    seen = until(url, first, lambda state: has_begun(state) and "preview" in state["output"])["output"]
    assert {"phase", "step", "steps", "percent", "seconds_left", "preview"} == set(seen)
    assert seen["steps"] == 400
    assert Image.open(io.BytesIO(base64.b64decode(seen["preview"]))).format == "JPEG"
    assert status(url, second) == {"id": second, "status": "IN_QUEUE"}
    post(url, f"v2/local/cancel/{first}")
    assert until(url, second, is_over)["status"] == "COMPLETED"


def test_a_cancel_frees_the_device_within_a_step(url: str) -> None:
    victim = run(url, **ENDLESS)
    until(url, victim, has_begun)
    assert post(url, f"v2/local/cancel/{victim}").json() == {"id": victim, "status": "CANCELLED"}
    assert runsync(url, **SMALL)["delayTime"] < 30_000  # and not after the other's four hundred steps
    assert status(url, victim) == {"id": victim, "status": "CANCELLED"}
    assert post(url, f"v2/local/cancel/{victim}").json()["status"] == "CANCELLED"


def test_a_job_that_waits_is_cancelled_unbegun_and_one_that_is_done_stays_so(url: str) -> None:
    first, second = run(url, **ENDLESS), run(url, **ENDLESS)
    until(url, first, has_begun)
    for id in (second, first):
        assert post(url, f"v2/local/cancel/{id}").json()["status"] == "CANCELLED"
    done = runsync(url, **SMALL)
    assert post(url, f"v2/local/cancel/{done['id']}").json() == done


def test_a_request_that_is_wrong_fails_with_all_its_faults(url: str) -> None:
    failed = runsync(url, prompt="x", width=7, num_images=9)
    assert failed["status"] == "FAILED"
    assert failed["error"].startswith("invalid_request: ")
    assert {error["field"] for error in failed["output"]["errors"]} == {"width", "num_images"}


def test_many_jobs_in_hand_come_back_as_they_were_asked(url: str) -> None:
    """More than there are threads, each with a picture to read, which lets others pass."""
    start = handler({"input": SMALL})["images"][0]
    asked = [{**SMALL, "seed": seed, "init_image": start, "strength": 1.0} for seed in range(50)]
    ids = [run(url, **fields) for fields in asked]
    done = [until(url, id, is_over, seconds=180) for id in ids]
    assert [job["output"]["metadata"]["seed"] for job in done] == list(range(50))


def test_a_status_is_to_be_had_a_thousand_times(url: str) -> None:
    id = run(url, **ENDLESS)
    with concurrent.futures.ThreadPoolExecutor(8) as threads, requests.Session() as session:
        asked = threads.map(lambda _: session.get(f"{url}/v2/local/status/{id}", timeout=60).status_code, range(1_000))
        assert set(asked) == {200}
    post(url, f"v2/local/cancel/{id}")


@pytest.mark.parametrize("id", ["no-such-job", "x" * 200, "..%2f..%2fhealth", "%00", "é"])
def test_a_job_that_nobody_knows_is_not_found(quiet: str, id: str) -> None:
    for method, route in (("GET", "status"), ("POST", "status"), ("POST", "cancel")):
        answered = requests.request(method, f"{quiet}/v2/local/{route}/{id}", timeout=60)
        assert answered.status_code == 404
        assert answered.json()["error"]


def test_another_endpoint_is_not_found(quiet: str) -> None:
    assert post(quiet, "v2/other/run", {"input": {}}).status_code == 404
    assert post(quiet, "v2/local/other", {"input": {}}).status_code == 404
    assert requests.get(f"{quiet}/v2/local/run", timeout=60).status_code == 405


def test_what_only_runpod_does_is_refused_by_name(quiet: str) -> None:
    answered = post(quiet, "v2/local/run", {"input": {}, "webhook": "https://x.example", "policy": {}})
    assert answered.status_code == 400
    assert answered.json()["error"].startswith("policy, webhook: ")


# Bodies


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[1]", "must be a JSON object"),
        (b'{"prompt": "x"}', 'must be {"input"'),
        (b'{"input": {"seed": NaN}}', "NaN is not a number"),
        (b'{"input": {"seed": ' + b"9" * 10_000 + b"}}", "not JSON"),
        (b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"input": "\xff"}', "not JSON"),
    ],
)
def test_a_body_that_is_no_request_is_refused_in_a_sentence(quiet: str, body: bytes, words: str) -> None:
    for route in ("run", "runsync"):
        headers = {"Content-Type": "application/json"}
        answered = requests.post(f"{quiet}/v2/local/{route}", data=body, headers=headers, timeout=60)
        assert answered.status_code == 400
        assert words in answered.json()["error"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_json_must_say_that_it_is(quiet: str, kind: str) -> None:
    """A form of another site's page can send the others without asking."""
    answered = requests.post(f"{quiet}/v2/local/run", data=b'{"input": {}}', headers={"Content-Type": kind}, timeout=60)
    assert answered.status_code == 415


@pytest.mark.parametrize(("route", "most"), [("run", 10_000_000), ("runsync", 20_000_000)])
def test_a_body_is_as_large_as_runpods_at_most(quiet: str, route: str, most: int) -> None:
    headers = {"Content-Type": "application/json"}
    for body in (b" " * (most + 1), (b" " * 1_000_000 for _ in range(most // 1_000_000 + 1))):  # the second is chunked
        answered = requests.post(f"{quiet}/v2/local/{route}", data=body, headers=headers, timeout=60)
        assert answered.status_code == 413
        assert answered.json()["error"] == f"the body has more than {most:,} bytes"


def test_a_body_that_does_not_arrive_is_not_waited_for() -> None:
    with served(LocalEndpoint(never), bodies=Bodies(seconds=0.2)) as url:
        host, port = urlsplit(url).netloc.split(":")
        with socket.create_connection((host, int(port)), 30) as slow:
            slow.sendall(
                b"POST /v2/local/run HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert b" 408 " in slow.recv(1_000)


def test_a_request_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.HEAD_SECONDS", 0.2)
    with served(LocalEndpoint(never)) as url:
        host, port = urlsplit(url).netloc.split(":")
        for begun in (b"", b"GET / HTTP/1.1\r\nHost: local"):
            with socket.create_connection((host, int(port)), 30) as slow:
                slow.sendall(begun)
                assert slow.recv(1_000) == b""


def test_an_answer_on_a_kept_connection_waits_for_no_acknowledgement(quiet: str) -> None:
    """Nagle's algorithm and a delayed acknowledgement together cost 40 ms each time."""
    with requests.Session() as session:
        took = []
        for _ in range(50):
            started_at = time.monotonic()
            session.get(f"{quiet}/v2/local/health", timeout=60)
            took.append(time.monotonic() - started_at)
    assert min(took[1:]) < 0.03


def test_bodies_that_are_on_their_way_are_counted_together() -> None:
    with served(LocalEndpoint(never), bodies=Bodies(most_together=1_000)) as url:
        assert post(url, "v2/local/run", {"input": {"prompt": "x" * 2_000}}).status_code == 503
        assert post(url, "v2/local/run", {"prompt": "x"}).status_code == 400


# Who may ask


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8080"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://localhost:5", "Host": "localhost:5"}, 200),
    ],
)
def test_other_names_and_other_sites_pages_get_no_answer(quiet: str, headers: dict[str, str], expected: int) -> None:
    for route in ("v2/local/health", "v1/models/x") if expected == 403 else ("v2/local/health",):
        answered = requests.get(f"{quiet}/{route}", headers=headers, timeout=60)
        assert answered.status_code == expected
        if expected == 403:
            assert answered.json()["error"]


def test_with_a_token_whoever_asks_must_have_it_but_for_the_page() -> None:
    with served(LocalEndpoint(never), token="a-token-of-mine") as url:
        for given in (None, "Bearer wrong", "Basic a-token-of-mine", "Bearer", "Bearer a-token-of-minE", "Bearer \xe9"):
            headers = {"Authorization": given} if given else {}
            answered = requests.get(f"{url}/v2/local/health", headers=headers, timeout=60)
            assert (answered.status_code, answered.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert requests.post(f"{url}/parameters", data=b"x", headers=headers, timeout=60).status_code == 401
        mine = {"Authorization": "Bearer a-token-of-mine", "Host": "a-name-of-this-machine"}
        assert requests.get(f"{url}/v2/local/health", headers=mine, timeout=60).status_code == 200
        assert requests.get(url, timeout=60).status_code == 200


# The page


def test_the_page_knows_where_it_is(quiet: str) -> None:
    answered = requests.get(quiet, headers={"Host": 'localhost:80"><script>'}, timeout=60)
    assert answered.status_code == 403
    answered = requests.get(quiet, timeout=60)
    assert '<meta name="endpoint" content="local">' in answered.text
    assert f'<meta name="api" content="{quiet}/v2/local">' in answered.text
    assert answered.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
    assert answered.headers["X-Content-Type-Options"] == "nosniff"
    assert answered.headers["Cache-Control"] == "no-cache"
    assert requests.get(f"{quiet}/v2/local/health", timeout=60).headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    "path",
    [
        "../app.py",
        "..%2fapp.py",
        "%2e%2e/app.py",
        "%2fetc%2fpasswd",
        "/etc/passwd",
        "",
        "no.js",
        "a%00.js",
        "..\\app.py",
    ],
)
def test_only_files_of_the_page_are_to_be_had(quiet: str, path: str) -> None:
    host = urlsplit(quiet).netloc
    with closing(http.client.HTTPConnection(host, timeout=60)) as connection:  # which leaves dots as they are
        connection.request("GET", f"/page/{path}")
        assert connection.getresponse().status == 404


def test_files_of_the_page_have_their_types(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "index.html").write_text("{{ endpoint }}")
    (tmp_path / "parts" / "a.js").write_text("let a")
    (tmp_path / "secret.txt").write_text("not of a page")
    with served(LocalEndpoint(never), page=tmp_path) as url:
        answered = requests.get(f"{url}/page/parts/a.js", timeout=60)
        assert (answered.text, answered.headers["Content-Type"]) == ("let a", "text/javascript; charset=utf-8")
        assert requests.get(f"{url}/page/secret.txt", timeout=60).status_code == 404


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_a_picture_tells_what_made_it(quiet: str, format: str) -> None:
    file = base64.b64decode(handler({"input": {**SMALL, "output_format": format}})["images"][0])
    carried = requests.post(f"{quiet}/parameters", data=file, timeout=60).json()
    assert (carried["model"], carried["input"]["seed"]) == ("flux-shapes", 5)
    again = handler({"input": carried["input"]})
    assert base64.b64decode(again["images"][0]) == file


def test_a_picture_that_tells_nothing_is_refused_in_a_sentence(quiet: str) -> None:
    plain, animated = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(plain, "PNG")
    Image.new("L", (8, 8)).save(animated, "GIF", save_all=True, append_images=[Image.new("L", (8, 8), 9)])
    for file, words in ((plain.getvalue(), "carries no request"), (animated.getvalue(), "is no picture in PNG"),
                        (b"", "is no picture in PNG"), (plain.getvalue()[:40], "")):  # fmt: skip
        answered = requests.post(f"{quiet}/parameters", data=file, timeout=60)
        assert answered.status_code == 422
        assert words in answered.json()["error"]


# What is kept


def fake(event: object, job: Job) -> dict[str, Any]:
    """An answer of as many characters as the prompt says, or the failure that it names."""
    assert isinstance(event, dict)
    prompt = event["input"]["prompt"]
    if prompt == "broken":
        return DeviceFailed("it broke").to_response(include_traceback=False)
    if prompt == "raises":
        raise RuntimeError("a secret of ours")
    return {"status": "success", "text": "x" * int(prompt)}


def is_known(url: str, id: str) -> bool:
    return bool(requests.get(f"{url}/v2/local/status/{id}", timeout=60).ok)


def test_results_are_bounded_in_number_in_bytes_and_in_time() -> None:
    with served(LocalEndpoint(fake, most_results=3)) as url:
        ids = [runsync(url, prompt="1")["id"] for _ in range(5)]
        assert [is_known(url, id) for id in ids] == [False, False, True, True, True]
    with served(LocalEndpoint(fake, most_result_bytes=100_000)) as url:
        ids = [runsync(url, prompt="30000")["id"] for _ in range(5)]
        assert [is_known(url, id) for id in ids] == [False, False, True, True, True]
    with served(LocalEndpoint(fake, result_seconds=0.5)) as url:
        id = run(url, prompt="1")
        until_gone = time.monotonic() + 30
        while is_known(url, id):
            assert time.monotonic() < until_gone
            time.sleep(0.05)


def test_a_result_larger_than_all_that_is_kept_reaches_nobody_and_says_so() -> None:
    with served(LocalEndpoint(fake, most_result_bytes=100)) as url:
        assert post(url, "v2/local/runsync", {"input": {"prompt": "1000"}}).status_code == 404


def test_jobs_in_hand_are_bounded() -> None:
    bounded: tuple[dict[str, Any], ...] = ({"most_jobs": 2}, {"most_job_bytes": 60})
    for bounds in bounded:
        go = threading.Event()

        def wait(event: object, job: Job, go: threading.Event = go) -> dict[str, Any]:
            go.wait(60)
            return {"status": "success"}

        with served(LocalEndpoint(wait, **bounds)) as url:
            ids = [run(url, prompt="x") for _ in range(2)]
            refused = post(url, "v2/local/run", {"input": {"prompt": "x"}})
            assert refused.status_code == 429
            assert "takes no more now" in refused.json()["error"]
            go.set()
            for id in ids:
                until(url, id, is_over)
            assert runsync(url, prompt="x")["status"] == "COMPLETED"


def test_a_device_that_failed_ends_the_process() -> None:
    failed = threading.Event()
    with served(LocalEndpoint(fake, device_failed=failed.set)) as url:
        answered = runsync(url, prompt="broken")
        assert answered["status"] == "FAILED"
        assert "refresh_worker" not in answered["output"]
        assert failed.wait(30)
        assert runsync(url, prompt="raises")["error"].startswith("internal_error: RuntimeError")


# A deployed endpoint


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    """RunPod, and behind it the real worker."""
    held = StandIn()
    with worker(held, tmp_path_factory.mktemp("worker") / "log", PROGRESS_INTERVAL="0.1"):
        yield held
    held.close()


def test_a_deployed_endpoint_answers_through_this_server(stand_in: StandIn) -> None:
    with served(deployed(ENDPOINT, "rpa_of_this_server", f"http://127.0.0.1:{stand_in.port}/v2")) as url:
        root = f"{url}/v2/{ENDPOINT}"
        done = requests.post(f"{root}/runsync", json={"input": SMALL}, timeout=60).json()
        assert done["output"]["images"] == handler({"input": SMALL})["images"]
        id = requests.post(f"{root}/run", json={"input": {**ENDLESS, "preview": True}}, timeout=60).json()["id"]
        deadline = time.monotonic() + 60
        while "preview" not in (state := requests.get(f"{root}/status/{id}", timeout=60).json()).get("output", {}):
            assert time.monotonic() < deadline, state
        assert requests.post(f"{root}/cancel/{id}", timeout=60).json()["status"] == "CANCELLED"
        assert requests.get(f"{root}/status/no-such-job", timeout=60).status_code == 404
        assert "jobs" in requests.get(f"{root}/health", timeout=60).json()
        refused = requests.post(f"{root}/run", json={"input": SMALL, "s3Config": {}}, timeout=60)
        assert (refused.status_code, refused.json()["error"][:9]) == (400, "s3Config:")
        failed = requests.post(f"{root}/runsync", json={"input": {"prompt": "x", "width": 7}}, timeout=60).json()
        assert failed["error"].startswith("invalid_request: width")


def test_a_deployed_worker_says_once_what_it_can_do(stand_in: StandIn) -> None:
    with served(deployed(ENDPOINT, "rpa_of_this_server", f"http://127.0.0.1:{stand_in.port}/v2")) as url:
        before = len(stand_in.jobs)
        asked = [
            requests.post(f"{url}/v2/{ENDPOINT}/runsync", json={"input": {"describe": True}}, timeout=60).json()
            for _ in range(3)
        ]
        assert asked[0]["output"]["describe"]["model"] == "flux-shapes"
        assert asked == asked[:1] * 3
        assert len(stand_in.jobs) == before + 1


def test_openais_client_draws_on_a_deployed_endpoint(stand_in: StandIn) -> None:
    with served(deployed(ENDPOINT, "rpa_of_this_server", f"http://127.0.0.1:{stand_in.port}/v2")) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        fields = {"num_inference_steps": 100, "seed": 1}
        *partial, done = client.images.generate(
            prompt="a red circle", stream=True, partial_images=2, n=4, extra_body=fields
        )
        assert done.type == "image_generation.completed"
        assert "image_generation.partial_image" in {event.type for event in partial}
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.generate(prompt="a red circle", n=9)
        assert (caught.value.code, caught.value.param) == ("invalid_request", "n")


def test_an_endpoint_that_cannot_be_asked_is_refused_in_a_sentence() -> None:
    for id, key in (("local", "rpa_x"), ("a b", "rpa_x"), ("abc", None)):
        with pytest.raises(InvalidSettings, match="--endpoint"):
            deployed(id, key)


# The process


def started(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "web.py", *arguments], cwd=ROOT, env={**os.environ, **environment}, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip


def test_what_cannot_start_says_why_in_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        ended = started("--port", str(other.getsockname()[1]))
    assert ended.returncode == 1
    assert re.fullmatch(
        r"error: --host 127.0.0.1 --port \d+: address already in use; give another --port.*\n", ended.stderr
    )
    ended = started("--host", EVERYWHERE)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"error: --host {EVERYWHERE} lets others reach this server, so it wants a token")
    ended = started("--host", EVERYWHERE, "--port", "0", WEB_TOKEN="short")
    assert (ended.returncode, ended.stderr[:45]) == (1, "error: the token must have 8 characters at le")
    assert "short" not in ended.stderr
    assert "error: argument --port" in started("--port", "99999").stderr


@contextmanager
def process(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """python web.py on the shipped model, and its address."""
    log = tmp_path / "log"
    with log.open("wb") as out:
        held = subprocess.Popen([sys.executable, "web.py", "--port", "0"], cwd=ROOT, stdout=out, stderr=out)
        try:
            deadline = time.monotonic() + 180
            while not (found := re.search(r"^the page is at (http://127.0.0.1:\d+)/$", log.read_text(), re.MULTILINE)):
                assert held.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            yield held, found[1]
        finally:
            held.kill()
            held.wait(30)
    assert "a red circle" not in log.read_text(), "a prompt"
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_soon_and_whoever_waits_gets_an_answer(tmp_path: Path, number: signal.Signals) -> None:
    with process(tmp_path) as (held, url), concurrent.futures.ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(runsync, url, **ENDLESS)
        while not requests.get(f"{url}/v2/local/health", timeout=60).json()["jobs"]["inProgress"]:
            time.sleep(0.02)
        held.send_signal(number)
        assert held.wait(30) == 0
        assert waiting.result(30)["status"] == "CANCELLED"


def test_the_token_of_the_environment_is_one_that_a_header_carries() -> None:
    assert web_token({"WEB_TOKEN": " a-token-of-mine "}) == "a-token-of-mine"
    assert web_token({}) is None
