"""A stand-in for RunPod's control plane, over HTTP: the worker's side and the client's, with faults on purpose.

The real SDK takes jobs from it and posts results to it; the real `runpod` client runs, watches and cancels jobs.
"""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import runpod
from aiohttp import web

from src.response.openai import http_status
from src.settings import ROOT

FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT")
ENDPOINT = "flux"
# Every kind of fault that a request can meet before anything of it is done, and two that come afterwards.
REFUSALS = ("400", "401", "403", "404", "413")
ANSWERS = ("page", "empty", "nothing", "garbage", "huge")  # with HTTP 200, but for nothing
EVERY_KIND = ("429", "500", "502", "drop", "slow", *REFUSALS, *ANSWERS, "unanswered")
_HUGE = 100_000_000  # bytes
# What RunPod documents for an endpoint: requests in 10 seconds, and at once.
LIMITS = {"run": (1000, 200), "status": (2000, 400), "cancel": (100, 20)}


@dataclass
class JobRecord:
    """What happened to one job; `results` holds every final result that a worker posted."""

    id: str
    input: Any
    status: str = "IN_QUEUE"
    progress: list[tuple[float, Any]] = field(default_factory=list)
    results: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)
    workers: list[str] = field(default_factory=list)  # that it was handed to
    repeats: int = 0  # of a result whose answer was lost
    refused_bytes: list[int] = field(default_factory=list)
    ended: float | None = None  # by time.monotonic
    simulated: bool = False

    def public(self) -> dict[str, Any]:
        """As /status tells it."""
        posted: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.results:
            posted |= {name: self.results[-1][1][name] for name in ("output", "error") if name in self.results[-1][1]}
        elif self.progress:
            posted["output"] = self.progress[-1][1]
        return posted


class Faults:
    """Lets a share of the requests at each route fail, at most `in_a_row` times for one job or poll."""

    def __init__(
        self, rate: float, kinds: tuple[str, ...] = ("429", "500", "drop", "slow"), in_a_row: int = 2, seed: int = 0
    ) -> None:
        self.rate, self.kinds, self.in_a_row = rate, kinds, in_a_row
        self.injected: Counter[tuple[str, str]] = Counter()
        self._random = random.Random(seed)
        self._row: Counter[str] = Counter()

    def next(self, route: str, what: str) -> str | None:
        """The kind of fault for this request, or None."""
        key = f"{route} {what}"
        if self._random.random() >= self.rate or self._row[key] >= self.in_a_row:
            self._row[key] = 0
            return None
        self._row[key] += 1
        kind = self._random.choice(self.kinds)
        self.injected[route, kind] += 1
        return kind


class StandIn:
    """Runs on a thread of its own; everything that tests read is plain data."""

    def __init__(
        self,
        faults: Faults | None = None,
        *,
        max_body: int = 20_000_000,
        refused: int = 400,
        poll_seconds: float = 5.0,
        way_seconds: float = 0.0,
        client_faults: Faults | None = None,
        forget_after: float = 1800.0,
        simulate: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        seconds_a_job: float = 0.0,
    ) -> None:
        """`way_seconds` is how long a request, and again its answer, is on its way.

        `client_faults` are those of /run, /status and /cancel. A result is forgotten `forget_after` seconds. `simulate`
        makes a job's output of its input where there is no worker, one after another in `seconds_a_job` each.
        """
        self.jobs: dict[str, JobRecord] = {}
        self.pings: list[dict[str, str]] = []
        self.most_in_hand = 0
        self.faults = faults or Faults(0)
        self.client_faults = client_faults or Faults(0)
        self.key = ""  # that clients must have, where it is set
        self.calls: defaultdict[str, list[float]] = defaultdict(list)  # of clients, by route: when they came
        self.over_limit: Counter[str] = Counter()  # calls that were more than RunPod takes
        self._at_once: Counter[str] = Counter()
        self._forget_after = forget_after
        self._simulate, self._seconds_a_job, self._free_at = simulate, seconds_a_job, 0.0
        self.polls = 0
        self._max_body = max_body
        self._refused = refused
        self._poll_seconds = poll_seconds
        self._way_seconds = way_seconds
        self._dark_until = 0.0
        self._unanswered: set[str] = set()
        self._queue: deque[str] = deque()
        self._encoded: dict[str, str] = {}  # jobs without a result, as they are handed out, ahead of their being taken
        self._stops: defaultdict[str, deque[str]] = defaultdict(deque)  # by worker
        self.odd: list[Any] = []  # handed out before the next job, as they are
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._ready = threading.Event()
        self._thread.start()
        assert self._ready.wait(10)

    # ---- for tests

    def environment(self, **more: str) -> dict[str, str]:
        """What RunPod sets in a worker's container, so that its SDK speaks with this."""
        worker = f"http://127.0.0.1:{self.port}/v2/{ENDPOINT}"
        return {
            **os.environ,
            "MODEL_NAME": "flux-shapes",
            "RUNPOD_WEBHOOK_GET_JOB": f"{worker}/job-take/$ID?gpu=none&key=rpa_in_the_query",
            "RUNPOD_WEBHOOK_POST_OUTPUT": f"{worker}/job-done/$RUNPOD_POD_ID/$ID?gpu=none&key=rpa_in_the_query",
            "RUNPOD_WEBHOOK_POST_STREAM": f"{worker}/job-stream/$RUNPOD_POD_ID/$ID?gpu=none",
            "RUNPOD_WEBHOOK_PING": f"{worker}/ping/$RUNPOD_POD_ID",
            "RUNPOD_PING_INTERVAL": "1000",
            "RUNPOD_AI_API_KEY": "rpa_secret_of_the_worker",
            "RUNPOD_ENDPOINT_ID": ENDPOINT,
            "RUNPOD_POD_ID": "worker-1",
            "RUNPOD_SKIP_GPU_CHECK": "true",
            "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
            **more,
        }

    def client(self) -> runpod.Endpoint:
        """The real client, at this door."""
        endpoint = runpod.Endpoint(ENDPOINT, api_key="rpa_secret_of_the_client")
        endpoint.rp_client.endpoint_url_base = f"http://127.0.0.1:{self.port}/v2"
        return endpoint

    def wait(self, *ids: str, seconds: float = 180) -> list[JobRecord]:
        """The jobs, once all of them are final."""
        deadline = time.monotonic() + seconds
        while not all(self.jobs[id].status in FINAL for id in ids):
            open_jobs = [id for id in ids if self.jobs[id].status not in FINAL]
            assert time.monotonic() < deadline, f"{len(open_jobs)} jobs are open: {open_jobs[:5]}"
            time.sleep(0.01)
        return [self.jobs[id] for id in ids]

    def submit(self, **fields: Any) -> str:
        """A job of these request fields, as /run would take it, without the way over HTTP."""
        return str(self._call(self._add({"input": fields})).id)

    def submit_as(self, id: str, input: Any) -> str:
        """A job of this id, or one of its own, and input, whatever they are."""
        return str(self._call(self._add({"input": input}, id)).id)

    def cancel(self, id: str) -> None:
        self._call(self._cancel_job(id))

    def darken(self, seconds: float) -> None:
        """Answer nothing for so long."""
        self._dark_until = time.monotonic() + seconds

    def in_hand(self, worker: str) -> list[str]:
        """The jobs that a worker has and has not answered."""
        return [id for id, job in self.jobs.items() if job.status == "IN_PROGRESS" and job.workers[-1] == worker]

    def hand_out_again(self, worker: str, but: Sequence[str] = ()) -> None:
        """Queue what a worker that is gone had in hand."""
        self._call(self._queue_again([id for id in self.in_hand(worker) if id not in but]))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    # ---- the server

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        application = web.Application(client_max_size=100_000_000)
        application.add_routes([
            web.post("/v2/{endpoint}/run", self._run),
            web.post("/v2/{endpoint}/runsync", self._runsync),
            web.get("/v2/{endpoint}/status/{id}", self._status),
            web.post("/v2/{endpoint}/cancel/{id}", self._cancel),
            web.get("/v2/{endpoint}/health", self._health),
            web.route("*", "/v2/{endpoint}/openai{route:/v1/.*}", self._openai),
            web.get("/v2/{endpoint}/job-take/{worker}", self._take),
            web.get("/v2/{endpoint}/job-take-batch/{worker}", self._take),
            web.post("/v2/{endpoint}/job-done/{worker}/{id}", self._done),
            web.post("/v2/{endpoint}/job-stream/{worker}/{id}", self._stream),
            web.get("/v2/{endpoint}/job-stop/{worker}", self._stop),
            web.get("/v2/{endpoint}/ping/{worker}", self._ping),
        ])  # fmt: skip
        # A poll whose worker is gone must not be answered with a job.
        runner = web.AppRunner(application, handler_cancellation=True, access_log=None)
        self._loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self._loop.run_until_complete(site.start())
        self.port = runner.addresses[0][1]
        self._changed = asyncio.Condition()
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(runner.cleanup())

    async def _fail(self, request: web.Request, route: str, what: str) -> web.Response | None:
        """The answer where this request is to fail, before anything of it is done."""
        kind = "drop" if time.monotonic() < self._dark_until else self.faults.next(route, what)
        match kind:
            case None:
                return None
            case "slow":
                await asyncio.sleep(1.0)
                return None
            case "unanswered" if route == "job-done":
                self._unanswered.add(what)
                return None
            case "drop" | "unanswered":
                return _dropped(request)
            case "page":
                return web.Response(text="<!DOCTYPE html><title>A gateway</title>", content_type="text/html")
            case "empty":
                return web.json_response([]) if route != "job-done" else web.Response(status=502)
            case "nothing":
                return web.Response(status=204 if route != "job-done" else 502)
            case "garbage":
                return web.Response(
                    text='{"jobs', content_type="application/json", status=200 if route != "job-done" else 503
                )
            case "huge":
                return web.Response(body=b"<" * _HUGE, content_type="application/json")
            case status:
                return web.Response(status=int(status))

    async def _add(self, body: Mapping[str, Any], id: str | None = None) -> JobRecord:
        job = JobRecord(id or f"{uuid.uuid4()}-{next(self._numbers)}", body["input"])
        self.jobs[job.id] = job
        self._encoded[job.id] = json.dumps({"id": job.id, "input": job.input})
        self._queue.append(job.id)
        await self._notify()
        return job

    async def _queue_again(self, ids: list[str]) -> None:
        for id in ids:
            self.jobs[id].status = "IN_QUEUE"
            self._queue.append(id)
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, ready: Any, seconds: float) -> bool:
        try:
            async with self._changed:
                await asyncio.wait_for(self._changed.wait_for(ready), seconds)
        except TimeoutError:
            return False
        return True

    # ---- the client's side

    async def _run(self, request: web.Request) -> web.StreamResponse:
        return await self._limited(request, "run", "", self._run_job)

    async def _status(self, request: web.Request) -> web.StreamResponse:
        return await self._limited(request, "status", request.match_info["id"], self._tell_status)

    async def _cancel(self, request: web.Request) -> web.StreamResponse:
        return await self._limited(request, "cancel", request.match_info["id"], self._cancel_by_client)

    async def _limited(
        self,
        request: web.Request,
        route: str,
        what: str,
        answer: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """The answer of a client's route, within RunPod's limits and with faults."""
        if request.match_info["endpoint"] != ENDPOINT:
            return web.json_response({"error": "endpoint not found"}, status=404)
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.Response(status=401)
        now = time.monotonic()
        calls, (in_10_seconds, at_once) = self.calls[route], LIMITS[route]
        calls.append(now)
        self._at_once[route] += 1
        try:
            recent = sum(1 for at in itertools.takewhile(lambda at: at > now - 10, reversed(calls)))
            if recent > in_10_seconds or self._at_once[route] > at_once:
                self.over_limit[route] += 1
                return web.Response(status=429, headers={"Retry-After": "1"})
            kind = self.client_faults.next(route, what)
            match kind:
                case None:
                    return await answer(request)
                case "429":
                    soon = email.utils.formatdate(time.time() + 2, usegmt=True)  # in whole seconds
                    return web.Response(status=429, headers={"Retry-After": random.choice(["1", soon])})
                case "drop":
                    return _dropped(request)
                case "unanswered":
                    await answer(request)
                    return _dropped(request)
                case "slow":
                    await asyncio.sleep(1.0)
                    return await answer(request)
                case "late":
                    answered = await answer(request)
                    await asyncio.sleep(1.0)
                    return answered
                case "page" | "empty" | "garbage":
                    return web.Response(text={"page": "<!DOCTYPE html>", "empty": "[]", "garbage": '{"id'}[kind])
                case status:
                    return web.Response(status=int(status))
        finally:
            self._at_once[route] -= 1

    async def _run_job(self, request: web.Request) -> web.Response:
        job = await self._add(await request.json())
        if self._simulate is not None:
            self._queue.remove(job.id)
            self._encoded.pop(job.id)
            job.simulated = True
            job.ended = self._free_at = max(self._free_at, time.monotonic()) + self._seconds_a_job
        return web.json_response({"id": job.id, "status": job.status})

    async def _runsync(self, request: web.Request) -> web.Response:
        job = await self._add(await request.json())
        await self._until(lambda: job.status in FINAL, 90)
        return web.json_response(job.public())

    async def _tell_status(self, request: web.Request) -> web.Response:
        id = request.match_info["id"]
        if failed := await self._fail(request, "status", id):
            return failed
        job = self.jobs.get(id)
        if job is None or (job.ended is not None and time.monotonic() > job.ended + self._forget_after):
            return web.json_response({"error": "job not found"}, status=404)
        if job.simulated and job.ended is not None and job.status not in FINAL and time.monotonic() >= job.ended:
            job.status = "COMPLETED"
        if job.simulated and job.status == "COMPLETED":
            assert self._simulate is not None
            return web.json_response({**job.public(), "output": self._simulate(job.input), "executionTime": 100})
        return web.json_response(job.public())

    async def _cancel_by_client(self, request: web.Request) -> web.Response:
        if request.match_info["id"] not in self.jobs:
            return web.json_response({"error": "job not found"}, status=404)
        await self._cancel_job(request.match_info["id"])
        return web.json_response(self.jobs[request.match_info["id"]].public())

    async def _cancel_job(self, id: str) -> None:
        job = self.jobs[id]
        if job.status == "IN_QUEUE" and not job.simulated:
            self._queue.remove(id)
        elif job.status == "IN_PROGRESS":
            self._stops[job.workers[-1]].append(id)
        if job.status not in FINAL:
            job.status, job.ended = "CANCELLED", time.monotonic()
        await self._notify()

    async def _health(self, _: web.Request) -> web.Response:
        counts = Counter(job.status for job in self.jobs.values())
        return web.json_response({"jobs": {"inQueue": counts["IN_QUEUE"], "inProgress": counts["IN_PROGRESS"]}})

    async def _openai(self, request: web.Request) -> web.Response:
        """RunPod's proxy for OpenAI's clients: a job of the route and its JSON; its answer comes without the list.

        What RunPod answers for a job that failed is not documented; here it is the error, with the status that fits.
        """
        asked: dict[str, Any] = {"openai_route": request.match_info["route"]}
        if request.method == "POST":
            asked["openai_input"] = await request.json()
        job = await self._add({"input": asked})
        await self._until(lambda: job.status in FINAL, 90)
        posted = job.results[-1][1]
        if "error" in posted:
            error = json.loads(posted["error"])
            return web.json_response({"error": error}, status=http_status(error))
        output = posted["output"]
        return web.json_response(output[0] if isinstance(output, list) else output)

    # ---- the worker's side

    async def _take(self, request: web.Request) -> web.Response:
        self.polls += 1
        name = request.match_info["worker"]
        await asyncio.sleep(self._way_seconds)
        if failed := await self._fail(request, "job-take", name):
            return failed
        await self._until(lambda: self._queue or self.odd, self._poll_seconds)
        if not (self._queue or self.odd) or request.transport is None or request.transport.is_closing():
            return web.Response(status=204)
        batch = "batch_size" in request.query
        taken: list[str] = []
        if batch:
            taken, self.odd = [json.dumps(odd) for odd in self.odd], []
        for _ in range(min(int(request.query.get("batch_size", 1)), len(self._queue))):
            job = self.jobs[self._queue.popleft()]
            job.status = "IN_PROGRESS"
            job.taken.append(time.time())
            job.workers.append(name)
            taken.append(self._encoded[job.id])
        in_hand = Counter(job.workers[-1] for job in self.jobs.values() if job.status == "IN_PROGRESS")
        self.most_in_hand = max(self.most_in_hand, *in_hand.values(), 0)
        await asyncio.sleep(self._way_seconds)
        text = f"[{','.join(taken)}]" if batch else taken[0] if taken else json.dumps(self.odd.pop(0))
        return web.Response(text=text, content_type="application/json")

    async def _done(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self._way_seconds)
        job = self.jobs[request.match_info["id"]]
        body = await request.read()
        if failed := await self._fail(request, "job-done", job.id):
            return failed
        assert unquote(request.headers["X-Request-ID"]) == job.id
        posted = json.loads(body)
        if posted.get("status") == "IN_PROGRESS":
            job.progress.append((time.time(), posted["output"]))
        elif len(body) > self._max_body:
            job.refused_bytes.append(len(body))
            return web.Response(status=self._refused)
        elif job.id in self._unanswered and job.results:
            job.repeats += 1
        else:
            job.results.append((time.time(), posted))
            self._encoded.pop(job.id, None)
            if job.status not in FINAL:
                job.status = "FAILED" if "error" in posted else "COMPLETED"
                job.ended = time.monotonic()
            await self._notify()
            if job.id in self._unanswered:
                return _dropped(request)
        await asyncio.sleep(self._way_seconds)
        return web.Response()

    async def _stream(self, request: web.Request) -> web.Response:
        return await self._fail(request, "job-stream", request.match_info["id"]) or web.Response()

    async def _stop(self, request: web.Request) -> web.Response:
        stops = self._stops[request.match_info["worker"]]
        if failed := await self._fail(request, "job-stop", request.match_info["worker"]):
            return failed
        await self._until(lambda: stops, self._poll_seconds)
        if request.transport is None or request.transport.is_closing() or not stops:
            return web.Response(status=204)
        ids = list(stops)
        stops.clear()
        return web.json_response({"jobsToStop": ids})

    async def _ping(self, request: web.Request) -> web.Response:
        self.pings.append(dict(request.query))
        return await self._fail(request, "ping", request.match_info["worker"]) or web.Response()


def _dropped(request: web.Request) -> web.Response:
    """The connection is closed, and nobody gets an answer."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


class WorkerProcess:
    """A worker's process under the stand-in, and what it wrote."""

    def __init__(self, environment: dict[str, str], log: Path, *command: str) -> None:
        self._worker_log, self._sdk_log = log, log.with_suffix(".sdk")  # stderr and stdout
        with self._worker_log.open("ab") as stderr, self._sdk_log.open("ab") as stdout:
            self.process = subprocess.Popen(
                [sys.executable, *(command or ("handler.py",))],
                cwd=ROOT, env=environment, stdout=stdout, stderr=stderr, start_new_session=True,
            )  # fmt: skip

    def text(self) -> str:
        """All that was written."""
        return self._sdk_log.read_text(errors="replace") + self._worker_log.read_text(errors="replace")

    def lines(self) -> list[dict[str, Any]]:
        """The worker's own log lines, which are JSON under RunPod."""
        found = []
        for line in self._worker_log.read_text(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def wait_for(self, text: str, seconds: float = 180) -> None:
        """Until `text` stands in the log."""
        deadline = time.monotonic() + seconds
        while text not in self.text():
            assert self.process.poll() is None, self.text()[-3000:]
            assert time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.02)

    def terminate(self, seconds: float = 180) -> int:
        """SIGTERM; the exit status."""
        self.process.terminate()
        return self.process.wait(seconds)


@contextmanager
def worker(stand_in: StandIn, log: Path, *command: str, **environment: str) -> Iterator[WorkerProcess]:
    """handler.py, or another `command` for Python, until the block ends."""
    held = WorkerProcess(stand_in.environment(**environment), log, *command)
    try:
        yield held
    finally:
        if held.process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                held.terminate(60)  # coverage writes what it saw at a clean end
        with suppress(ProcessLookupError):
            os.killpg(held.process.pid, signal.SIGKILL)  # the SDK's process for pings too
        held.process.wait(10)
