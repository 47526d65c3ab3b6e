"""Several engines behind one line of jobs: what each draws is what one alone draws, whatever the other is at."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from handler import respond
from src.engine import Engine, Engines, load_engine, load_engines
from src.engine.loading_lock import LoadingLock
from src.engine.lora import AdapterFile
from src.engine.machine import measure
from src.job import Job, Progress
from src.job_queue import JobQueue, current_device
from src.serving.loop import Worker
from src.settings import ROOT, Settings
from src.weights.placement import Machine, choose_placement
from tests.conftest import base64_of, opened
from tests.fakes import FakePipeline
from tests.test_engine import MODEL

OUTLINE = ROOT / "models" / "flux-shapes-outline"
SECONDS = 60  # that the other is waited for, where it never comes
CPU = torch.device("cpu")
SETTINGS = Settings(model_name="flux-shapes", lora_dir=OUTLINE, controlnets=("flux-shapes-canny",))
Meet = Callable[[Progress], None]


@pytest.fixture(scope="module")
def alone() -> Engine:
    return load_engine(SETTINGS)


@pytest.fixture(scope="module")
def two() -> Engines:
    return load_engines(SETTINGS, on=(CPU, CPU))


@pytest.fixture
def queue() -> Iterator[JobQueue]:
    held = JobQueue(2)
    yield held
    held.close()


def ask(engine: Engine | Engines, queue: JobQueue | None = None, meet: Meet | None = None, **fields: Any) -> Any:
    job = Job(queue_up=queue.ticket if queue else None, on_progress=meet)
    event = {"input": {"prompt": "a red circle on a blue background", **fields}}
    return respond(event, job, lambda: SETTINGS, lambda: engine)


def at_step(step: int, then: Callable[[], Any]) -> Meet:
    def meet(progress: Progress) -> None:
        if progress.phase == "denoise" and progress.step == step:
            then()

    return meet


def together(queue: JobQueue, two: Engines, *fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers to two jobs, each of which waits for the other in the midst of its steps."""
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as threads:
        meet = at_step(3, lambda: barrier.wait(SECONDS))
        asked: list[Future[Any]] = [threads.submit(ask, two, queue, meet, **each) for each in fields]
        return [each.result() for each in asked]


def pixels(response: dict[str, Any]) -> bytes:
    assert response["status"] == "success", response
    return opened(response)[0].tobytes()


def test_two_jobs_are_drawn_at_once_and_each_is_what_it_is_alone(two: Engines, queue: JobQueue, alone: Engine) -> None:
    jobs = {"seed": 1}, {"seed": 2, "scheduler": "heun", "prompt": "a green square"}
    drawn = together(queue, two, *jobs)
    assert [pixels(each) for each in drawn] == [pixels(ask(alone, **job)) for job in jobs]
    assert {each["metadata"]["device"] for each in drawn} == {"cpu"}


def test_a_scheduler_s_own_noise_is_that_of_its_seed_whatever_the_other_draws(
    two: Engines, queue: JobQueue, alone: Engine
) -> None:
    jobs: list[dict[str, Any]] = [{"seed": seed, "scheduler": "lcm"} for seed in (1, 2)]
    assert [pixels(each) for each in together(queue, two, *jobs)] == [pixels(ask(alone, **job)) for job in jobs]


def test_an_adapter_that_is_read_once_counts_on_either_device(
    two: Engines, queue: JobQueue, alone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = AdapterFile.read

    def reading(file: AdapterFile) -> Any:
        read.append(threading.current_thread().name)
        return whole(file)

    monkeypatch.setattr(AdapterFile, "read", reading)
    adapter = {"lora_path": "pytorch_lora_weights.safetensors", "lora_scale": 1}
    jobs: list[dict[str, Any]] = [{"seed": seed, **adapter} for seed in (1, 2)]
    styled = [pixels(each) for each in together(queue, two, *jobs)]
    assert not [name for name in read if name.startswith("device")], "what the jobs' threads have read"
    assert styled == [pixels(ask(alone, **job)) for job in jobs]
    assert two.loaded().adapters == ("pytorch_lora_weights.safetensors",)
    assert [pixels(each) for each in together(queue, two, {"seed": 1}, {"seed": 2})] == [
        pixels(ask(alone, seed=seed)) for seed in (1, 2)
    ]


def test_a_controlnet_and_a_plain_picture_are_drawn_at_once(two: Engines, queue: JobQueue, alone: Engine) -> None:
    edges = base64_of(opened(ask(alone, seed=3))[0])
    jobs = {"seed": 1, "control_image": edges, "control_type": "canny"}, {"seed": 2}
    for both in (jobs, jobs[::-1]):  # on either
        assert [pixels(each) for each in together(queue, two, *both)] == [pixels(ask(alone, **job)) for job in both]


def test_who_is_cancelled_stops_alone(two: Engines, queue: JobQueue, alone: Engine) -> None:
    both, cancelled = threading.Barrier(2), threading.Event()

    def drawn() -> None:
        both.wait(SECONDS)
        assert cancelled.wait(SECONDS)

    def cancel() -> None:
        both.wait(SECONDS)
        job.cancel()

    with ThreadPoolExecutor(2) as threads:
        job = Job(queue_up=queue.ticket, on_progress=at_step(3, cancel))
        event = {"input": {"prompt": "a red circle"}}
        stopped = threads.submit(respond, event, job, lambda: SETTINGS, lambda: two)
        other = threads.submit(ask, two, queue, at_step(3, drawn), seed=5)
        assert stopped.result()["error_code"] == "cancelled"
        cancelled.set()
        assert pixels(other.result()) == pixels(ask(alone, seed=5))


def test_a_device_that_fails_ends_its_job_and_the_other_s_picture_is_whole(queue: JobQueue, alone: Engine) -> None:
    broken = Engine(FakePipeline(RuntimeError("CUDA error: an illegal memory access")), MODEL, None)
    both = threading.Barrier(2)

    def meet(progress: Progress) -> None:
        if progress.phase == "encode_prompt":
            both.wait(SECONDS)

    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(ask, Engines((alone, broken)), queue, meet) for _ in range(2)]
        answers = [each.result() for each in asked]
    assert sorted(answer["status"] for answer in answers) == ["error", "success"]
    (failed,) = (answer for answer in answers if answer["status"] == "error")
    assert (failed["error_code"], failed["refresh_worker"]) == ("device_failed", True)


def test_describe_names_every_device(two: Engines) -> None:
    described = ask(two, describe=True)["describe"]
    assert described["placement"]["devices"] == ["cpu", "cpu"]
    assert described["controlnets"]["flux-shapes-canny"]["loaded"]
    assert two.at_once == 2


def test_the_host_s_memory_is_shared_by_the_engines_that_are_still_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def choosing(weights: Any, machine: Machine, work: Any, mode: str) -> Any:
        seen.append(machine.host_memory)
        return choose_placement(weights, replace(machine, shared=True), work, mode)

    def measuring(*arguments: Any) -> Machine:
        return replace(measure(*arguments), host_memory=900)

    monkeypatch.setattr("src.engine.loading.choose_placement", choosing)
    monkeypatch.setattr("src.engine.loading.measure", measuring)
    load_engines(Settings(model_name="flux-shapes"), on=(CPU, CPU, CPU))
    assert seen == [300, 450, 900], "the homes of those before are in what is free no more"


def test_all_devices_are_warmed_up(two: Engines, monkeypatch: pytest.MonkeyPatch) -> None:
    warmed: list[Engine] = []

    def warm_up(engine: Engine, _: Any, steps: int) -> float:
        warmed.append(engine)
        return float(steps * len(warmed))

    monkeypatch.setattr(Engine, "warm_up", warm_up)
    assert two.warm_up(None, 4) == 8, "the slowest's"  # type: ignore[arg-type]
    assert len(set(warmed)) == 2


def test_nobody_draws_while_networks_are_loaded() -> None:
    lock, order = LoadingLock(), list[str]()

    def load() -> None:
        with lock.networks():
            order.append("loaded")

    with ThreadPoolExecutor(1) as threads:
        with lock.drawing(), lock.drawing(), lock.layers():
            loading = threads.submit(load)
            order.append("drawn")
        loading.result(SECONDS)
        with lock.drawing():
            order.append("drawn again")
    assert order == ["drawn", "loaded", "drawn again"]


def test_threads_that_own_no_device_use_the_first(queue: JobQueue) -> None:
    assert current_device() == 0
    both = threading.Barrier(2)

    def device() -> int:
        both.wait(SECONDS)
        return current_device()

    tickets = [queue.ticket(), queue.ticket()]
    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(lambda ticket: ticket.run(device), tickets)) == [0, 1]


def test_the_worker_s_loop_gives_each_device_a_job() -> None:
    both = threading.Barrier(2)

    def answer(event: object, job: Job) -> dict[str, Any]:
        def work() -> int:
            both.wait(SECONDS)
            return current_device()

        return {"status": "success", "device": job.on_device(work)}

    async def run() -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(worker.run({"id": id, "input": {}}) for id in "ab")))

    worker = Worker(answer, SETTINGS)
    worker.serve_devices(2)
    assert sorted(response["device"] for response in asyncio.run(run())) == [0, 1]
    worker.close()
