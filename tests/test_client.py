"""The client against a stand-in for RunPod that answers by itself: routes, limits, faults, Python's interface."""

from __future__ import annotations

import asyncio
import http.server
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from client import AsyncClient, Client, EndpointFailing, EndpointUnusable, Forgotten, JobFailed, Transport, Unreachable
from client.errors import RETRYABLE
from client.queue import Job, Queue, failure_of
from client.transport import LIMITS, Limit, _Route, _seconds
from src.settings import ROOT
from tests import runpod_stand_in
from tests.answers import answer, picture_file
from tests.runpod_stand_in import ENDPOINT, Faults, StandIn

KEY = "rpa_a_key_that_nobody_may_see"


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    held = StandIn(simulate=answer)
    held.key = KEY
    yield held
    held.close()


def url(stand_in: StandIn) -> str:
    return f"http://127.0.0.1:{stand_in.port}/v2"


def with_transport(stand_in: StandIn, work: Any, **options: Any) -> Any:
    async def run() -> Any:
        async with Transport(ENDPOINT, KEY, url(stand_in), **options) as transport:
            return await work(transport)

    return asyncio.run(run())


# ---- transport


def test_the_routes_are_runpods(stand_in: StandIn) -> None:
    async def work(transport: Transport) -> None:
        id = await transport.run({"prompt": "a", "seed": 1})
        assert (await transport.status(id))["output"] == answer({"seed": 1})
        assert (await transport.cancel(id))["status"] == "COMPLETED"
        assert (await transport.health())["jobs"]["inQueue"] == 0
        with pytest.raises(Forgotten):
            await transport.status("no such/job")
        assert transport.calls == {"run": 1, "status": 2, "cancel": 1, "health": 1}

    with_transport(stand_in, work)


@pytest.mark.parametrize("kind", ["429", "500", "502", "503", "drop", "unanswered", "page", "empty", "garbage"])
def test_every_fault_of_a_route_is_got_over(stand_in: StandIn, kind: str) -> None:
    stand_in.client_faults = Faults(1.0, (kind,), in_a_row=1)

    async def work(transport: Transport) -> int:
        id = await transport.run({"prompt": "a", "seed": 1})
        assert (await transport.status(id))["status"] == "COMPLETED"
        assert (await transport.cancel(id))["status"] == "COMPLETED"
        return transport.sent_again

    sent_again = with_transport(stand_in, work)
    assert {route: count for (route, _), count in stand_in.client_faults.injected.items()} == {
        "run": 1, "status": 1, "cancel": 1,
    }  # fmt: skip
    assert sent_again == (kind in ("502", "drop", "unanswered", "page", "empty", "garbage"))
    assert len(stand_in.jobs) == 1 + (kind == "unanswered")


def test_after_a_429_the_route_rests_as_long_as_runpod_says(stand_in: StandIn) -> None:
    stand_in.client_faults = Faults(1.0, ("429",), in_a_row=1)

    async def work(transport: Transport) -> None:
        first = asyncio.create_task(transport.run({"prompt": "a", "seed": 1}))
        while not stand_in.calls["run"]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        await transport.run({"prompt": "a", "seed": 2})  # which knows nothing of the first
        await first

    with_transport(stand_in, work)
    first, *others = stand_in.calls["run"]
    assert all(later - first >= 1 for later in others)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert _seconds("7") == 7
    assert 8 < _seconds(format_datetime(datetime.now(UTC) + timedelta(seconds=10), usegmt=True)) <= 10
    assert _seconds(format_datetime(datetime.now(UTC) - timedelta(seconds=10))) == 0
    assert _seconds("") == _seconds("soon") == _seconds("-5") == _seconds("1e9") == 0


@pytest.mark.parametrize(
    ("endpoint", "key", "words"),
    [
        (ENDPOINT, "rpa_a_wrong_key_of_somebody", "does not know the API key"),
        ("another/endpoint", KEY, "has no such endpoint"),
    ],
)
def test_a_wrong_key_or_endpoint_ends_at_once_in_one_sentence(
    stand_in: StandIn, endpoint: str, key: str, words: str
) -> None:
    async def run() -> None:
        async with Transport(endpoint, key, url(stand_in)) as transport:
            await transport.run({"prompt": "a"})

    with pytest.raises(EndpointUnusable, match=words) as caught:
        asyncio.run(run())
    assert key not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(stand_in.calls["run"]) < 2


def test_an_address_that_never_answers_is_given_up(stand_in: StandIn) -> None:
    stand_in.close()
    with pytest.raises(Unreachable, match=r"gave no usable answer in \d tries: ClientConnectorError"):
        with_transport(stand_in, lambda transport: transport.run({"prompt": "a"}), patience=1.0)


def test_what_runpod_does_not_take_is_said_with_its_words(stand_in: StandIn) -> None:
    stand_in.client_faults = Faults(1.0, ("413",), in_a_row=9)
    with pytest.raises(JobFailed, match="rejected: RunPod did not take the request: HTTP 413"):
        with_transport(stand_in, lambda transport: transport.run({"prompt": "a"}))


def test_the_limits_are_runpods_and_a_route_keeps_below_them_in_any_ten_seconds() -> None:
    assert {route: tuple(LIMITS[route]) for route in runpod_stand_in.LIMITS} == runpod_stand_in.LIMITS

    async def work() -> tuple[list[float], int]:
        route, times, most, now = _Route(Limit(2_200, 3)), list[float](), 0, 0

        async def call() -> None:
            nonlocal most, now
            async with route:
                now += 1
                most = max(most, now)
                times.append(time.monotonic())
                await asyncio.sleep(0)
                now -= 1

        await asyncio.gather(*(call() for _ in range(700)))
        return times, most

    times, most = asyncio.run(work())
    assert most == 3
    burst = sum(at - times[0] < 0.05 for at in times)
    assert burst <= 220  # as much as comes at once, and then ten times that within ten seconds
    assert 700 - burst <= 181 * (times[-1] - times[0])


# ---- queue


def outcomes(stand_in: StandIn, seeds: range, **options: Any) -> tuple[dict[int, Any], Queue[Any]]:
    """What became of a job for each of `seeds`."""

    async def work(transport: Transport) -> tuple[dict[int, Any], Queue[Any]]:
        async def receive(job: Job, status: dict[str, Any]) -> Any:
            return status["output"]["metadata"]["seeds"]

        queue = Queue(transport, receive, **options)
        jobs = [Job(seed, lambda seed=seed: {"prompt": "a", "seed": seed}) for seed in seeds]  # type: ignore[misc]
        return {job.key: found async for job, found in queue.run(jobs)}, queue

    found: tuple[dict[int, Any], Queue[Any]] = with_transport(stand_in, work)
    return found


def failing(times: int, error: str, seeds: range = range(1)) -> Any:
    """Answers of a worker whose first `times` tries of each seed fail."""
    asked: Counter[int] = Counter()

    def simulate(input: dict[str, Any]) -> dict[str, Any]:
        asked[input["seed"]] += 1
        return {"status": "error", "error": error} if asked[input["seed"]] <= times else answer(input)

    return simulate


def test_no_more_jobs_are_open_than_asked_for_and_few_calls_are_made(stand_in: StandIn) -> None:
    stand_in._seconds_a_job = 0.1
    found, _ = outcomes(stand_in, range(60), concurrency=20)
    assert found == {seed: [seed] for seed in range(60)}
    assert len(stand_in.jobs) == 60
    assert len(stand_in.calls["status"]) < 60 * 5, "RunPod's own client asks 20 jobs each second"
    ends = sorted(job.ended or 0 for job in stand_in.jobs.values())
    for i, at in enumerate(sorted(stand_in.calls["run"])):
        assert i - sum(end < at for end in ends) <= 20 + 1


@pytest.mark.parametrize("code", sorted(RETRYABLE))
def test_a_job_that_failed_for_reasons_of_the_worker_is_sent_again(stand_in: StandIn, code: str) -> None:
    stand_in._simulate = failing(2, f"{code}: something hinders the worker")
    lost: list[str] = []
    found, _ = outcomes(stand_in, range(1), lost=lambda job, failure: lost.append(failure.code))
    assert found == {0: [0]}
    assert lost == [code, code]
    assert len(stand_in.jobs) == 3


def test_it_is_sent_three_times_in_all(stand_in: StandIn) -> None:
    stand_in._simulate = failing(9, "out_of_memory: too little")
    found, _ = outcomes(stand_in, range(1))
    assert (found[0].code, str(found[0]), found[0].retryable) == ("out_of_memory", "out_of_memory: too little", True)
    assert len(stand_in.jobs) == 3


def test_a_request_that_is_wrong_is_not_sent_again(stand_in: StandIn) -> None:
    stand_in._simulate = failing(9, "invalid_request: width: must be a multiple of 8: 63")
    found, _ = outcomes(stand_in, range(1))
    assert str(found[0]) == "invalid_request: width: must be a multiple of 8: 63"
    assert len(stand_in.jobs) == 1


def test_a_new_job_that_runpod_does_not_know_yet_is_not_sent_again(stand_in: StandIn) -> None:
    stand_in.client_faults = Faults(1.0, ("404",), in_a_row=2)
    stand_in.client_faults._row["run "] = 2
    found, _ = outcomes(stand_in, range(1))
    assert found == {0: [0]}
    assert len(stand_in.jobs) == 1
    assert stand_in.client_faults.injected["status", "404"] == 2


def test_what_runpod_has_forgotten_is_sent_again(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.queue._NEW", 0.0)
    stand_in._forget_after = -1
    found, _ = outcomes(stand_in, range(2))
    assert {failure.code for failure in found.values()} == {"forgotten"}
    assert len(stand_in.jobs) == 6


def test_where_job_after_job_fails_no_more_are_sent(stand_in: StandIn) -> None:
    stand_in._simulate = failing(9, "internal_error: a bug")
    with pytest.raises(EndpointFailing, match="the last 20 jobs all failed for reasons of the worker"):
        outcomes(stand_in, range(300))
    assert len(stand_in.jobs) < 80


@pytest.mark.parametrize(
    ("status", "words", "retryable"),
    [
        ({"status": "COMPLETED"}, "no_output: RunPod has no output for the job", False),
        ({"status": "TIMED_OUT"}, "timed_out: RunPod ended the job with TIMED_OUT", True),
        ({"status": "FAILED", "error": "worker exited: code 137"}, "failed: worker exited: code 137", True),
        ({"status": "FAILED", "error": {"a": 1}}, "failed: {'a': 1}", True),
        ({"status": "FAILED", "error": "timed_out: the job took longer than"}, "timed_out: the job took longer", False),
        ({"status": "FAILED", "error": "device_failed: CUDA error"}, "device_failed: CUDA error", True),
        ({"status": "CANCELLED"}, "cancelled: RunPod ended the job with CANCELLED", False),
    ],
)
def test_every_end_without_an_output_has_a_code_and_a_reason(
    status: dict[str, Any], words: str, retryable: bool
) -> None:
    failure = failure_of(status)
    assert failure is not None
    assert str(failure).startswith(words)
    assert failure.retryable is retryable


# ---- Python's interface


def test_generate_gives_pictures_with_their_seeds(stand_in: StandIn) -> None:
    with Client(ENDPOINT, KEY, url=url(stand_in)) as client:
        pictures = client.generate({"prompt": "a red star", "seed": 5, "num_images": 2})
        assert [picture.seed for picture in pictures] == [5, 6]
        assert pictures[1].file == picture_file(6)
        assert pictures[0].image.size == (8, 8)
        assert (pictures[0].suffix, pictures.metadata["seeds"], pictures.seconds) == ("png", [5, 6], 0.1)
        assert client.health()["jobs"]["inQueue"] == 0
        client.generate({"prompt": "a red star"})
        assert isinstance(list(stand_in.jobs.values())[1].input["seed"], int)


def test_a_wrong_request_raises_before_anything_is_sent(stand_in: StandIn) -> None:
    with Client(ENDPOINT, KEY, url=url(stand_in)) as client:
        with pytest.raises(JobFailed, match=r"invalid_request: nme: is not a field.*; width: must be") as caught:
            client.generate({"prompt": "a", "width": 63, "nme": 1})
        assert caught.value.code == "invalid_request"
    assert not stand_in.jobs


def test_map_keeps_the_order_and_gives_errors_in_their_places(stand_in: StandIn) -> None:
    requests = [{"prompt": "a", "seed": i} if i != 4 else {"prompt": ""} for i in range(12)]
    with Client(ENDPOINT, KEY, url=url(stand_in), concurrency=5) as client:
        found = list(client.map(requests, return_exceptions=True))
        assert [f.metadata["seeds"][0] if not isinstance(f, JobFailed) else f.code for f in found] == [
            *range(4), "invalid_request", *range(5, 12),
        ]  # fmt: skip
        with pytest.raises(JobFailed, match="invalid_request"):
            list(client.map(requests))


def test_who_stops_early_has_open_jobs_cancelled(stand_in: StandIn) -> None:
    stand_in._seconds_a_job = 0.3
    with Client(ENDPOINT, KEY, url=url(stand_in), concurrency=6) as client:
        for pictures in client.map({"prompt": "a", "seed": i} for i in range(100)):
            assert pictures[0].seed == 0
            break
    statuses = Counter(job.status for job in stand_in.jobs.values())
    assert len(stand_in.jobs) < 12
    assert statuses["CANCELLED"] >= 3
    assert statuses["IN_QUEUE"] == statuses["IN_PROGRESS"] == 0


@pytest.mark.parametrize("kinds", [(), ("late",)])
def test_a_cancelled_task_cancels_its_job_once_the_id_has_come(stand_in: StandIn, kinds: tuple[str, ...]) -> None:
    stand_in._seconds_a_job = 60
    stand_in.client_faults = Faults(float(bool(kinds)), kinds, in_a_row=9)

    async def work() -> None:
        async with AsyncClient(ENDPOINT, KEY, url=url(stand_in)) as client:
            task = asyncio.create_task(client.generate({"prompt": "a"}))
            while not stand_in.jobs:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(work())
    assert [job.status for job in stand_in.jobs.values()] == ["CANCELLED"]


def test_pictures_of_a_bucket_are_fetched_without_the_key(stand_in: StandIn) -> None:
    asked: list[Any] = []

    class Bucket(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers.get("Authorization")))
            self.send_response(200 if "6" not in self.path else 404)
            self.end_headers()
            self.wfile.write(picture_file(5))

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def simulate(input: dict[str, Any]) -> dict[str, Any]:
            found = answer(input)
            seeds = found["metadata"]["seeds"]
            urls = [f"http://127.0.0.1:{server.server_port}/{seed}.png?signature=secret" for seed in seeds]
            return {**found, "images": [None] * len(seeds), "image_urls": urls}

        stand_in._simulate = simulate
        with Client(ENDPOINT, KEY, url=url(stand_in)) as client:
            assert client.generate({"prompt": "a", "seed": 5})[0].file == picture_file(5)
            with pytest.raises(JobFailed, match=r"gone: a picture is not to be had at http://127.*/6.png: HTTP 404"):
                client.generate({"prompt": "a", "seed": 6})
        server.shutdown()
    assert asked[0] == ("/5.png?signature=secret", None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": ["no base64!"]}, "no_pictures: the picture of seed 5 is no base64"),
        ({"images": ["AAAA"]}, "no_pictures: the file of seed 5 is no picture"),
        ({"images": 5}, "no_pictures: the output is not an answer with pictures"),
        ({"metadata": None}, "no_pictures: the output is not an answer with pictures"),
    ],
)
def test_an_answer_without_pictures_is_an_error(stand_in: StandIn, change: dict[str, Any], words: str) -> None:
    stand_in._simulate = lambda input: {**answer(input), **change}
    with Client(ENDPOINT, KEY, url=url(stand_in)) as client, pytest.raises(JobFailed, match=words):
        client.generate({"prompt": "a", "seed": 5})


def test_a_picture_that_the_worker_lost_is_named(stand_in: StandIn) -> None:
    stand_in._simulate = lambda input: {**answer(input), "images": [None, answer(input)["images"][1]]}
    with Client(ENDPOINT, KEY, url=url(stand_in)) as client:
        pictures = client.generate({"prompt": "a", "seed": 5, "num_images": 2})
    assert [picture.seed for picture in pictures] == [6]
    assert pictures.lost.keys() == {5}


def test_without_a_key_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_API_KEY", "")
    with pytest.raises(EndpointUnusable, match="there is no API key: give api_key, or set RUNPOD_API_KEY"):
        Client(ENDPOINT)
    monkeypatch.setenv("RUNPOD_API_KEY", "rpa_with\u2013dash")
    with pytest.raises(EndpointUnusable, match=r"RUNPOD_API_KEY holds the character U\+2013 in place 9 of 13"):
        Client(ENDPOINT)
    with pytest.raises(EndpointUnusable, match="the API key holds a character that no HTTP header can carry"):
        Client(ENDPOINT, "rpa_\nkey")


# What requirements-client.txt brings, and what those bring.
PACKAGES = {
    "aiohappyeyeballs", "aiohttp", "aiolimiter", "aiosignal", "annotated_types", "attr", "attrs", "dotenv",
    "frozenlist", "idna", "multidict", "PIL", "propcache", "pydantic", "pydantic_core", "tqdm", "typing_extensions",
    "typing_inspection", "yarl",
}  # fmt: skip
ALONE = f"""
import importlib.metadata
import sys

others = importlib.metadata.packages_distributions().keys() - {PACKAGES!r}

class Only:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in others:
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Only())
import client, client.batch
from pathlib import Path
assert client.batch.main([{str(ROOT / "examples" / "prompts.csv")!r}, "--dry-run"]) == 0
assert not {{"torch", "numpy", "runpod", "handler"}} & sys.modules.keys()
"""


def test_the_client_needs_its_own_requirements_alone() -> None:
    run = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "12 rows make 12 pictures in 12 jobs; nothing was sent." in run.stdout
