"""The engine on a pipeline that fails, and on the shipped one: state, sizes, schedulers, progress."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from src.catalog import SCHEDULERS, get_model
from src.engine import Engine, load_engine
from src.errors import Cancelled, DeviceFailed, GenerationFailed, OutOfMemory
from src.job import Job, OnProgress, Progress
from src.job_queue import JobQueue
from src.plan.plan import Plan, make_plan
from src.request.reading import read_request
from src.settings import Settings
from tests.conftest import opened
from tests.fakes import FakePipeline
from training import judge

MODEL = get_model("flux-shapes")


def plan(batch_size: int = 1, **fields: Any) -> Plan:
    request, faults, _ = read_request({"input": {"prompt": "a red circle", "seed": 1, **fields}})
    return make_plan(request, faults, MODEL, max_pixels=2048 * 2048, batch_size=batch_size)


def engine(pipeline: FakePipeline) -> Engine:
    return Engine(pipeline, MODEL, None)


OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
HOST_OOM = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    ("failure", "error", "words"),
    [
        (OOM, OutOfMemory, "128x128 with 1 image"),
        (HOST_OOM, OutOfMemory, "needs more memory than there is"),
        (MemoryError(), OutOfMemory, "smaller width, height or num_images"),
        (RuntimeError("Expected tensor for argument #1"), GenerationFailed, "Expected tensor for argument #1"),
        (ValueError("shapes\nand a second line"), GenerationFailed, "shapes$"),
        (RuntimeError("CUDA error: out of memory"), OutOfMemory, "choose a larger card"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling x"), OutOfMemory, "choose a larger card"),
        (RuntimeError("CUDA error: an illegal memory access"), DeviceFailed, "must be replaced"),
        (torch.AcceleratorError("device-side assert", 1), DeviceFailed, "must be replaced"),
    ],
)
def test_a_failure_is_named_and_the_next_plan_runs(failure: Exception, error: type[Exception], words: str) -> None:
    pipeline = FakePipeline(failure, failure)  # memory that is short is freed once before anything is said
    held = engine(pipeline)
    with pytest.raises(error, match=words):
        held.run(plan())
    assert pipeline.hooks_freed == 1
    pipeline.failures.clear()
    assert len(held.run(plan()).pictures) == 1


def test_memory_that_is_short_once_is_freed_without_a_word() -> None:
    generation = engine(FakePipeline(OOM)).run(plan())
    assert (len(generation.pictures), generation.warnings) == (1, ())


def test_memory_too_short_for_a_batch_draws_one_by_one_and_says_so() -> None:
    pipeline = FakePipeline(OOM, OOM)
    seen: list[Progress] = []
    generation = engine(pipeline).run(plan(4, num_images=3, num_inference_steps=2), seen.append)
    assert [call["num_images_per_prompt"] for call in pipeline.calls] == [3, 3, 1, 1, 1]
    assert len(generation.pictures) == 3
    assert generation.warnings == ("memory was short: the pictures were drawn one by one",)
    assert max(p.step for p in seen) <= max(p.steps for p in seen)


def test_memory_too_short_for_decoding_decodes_in_tiles_and_the_next_plan_does_not() -> None:
    pipeline = FakePipeline()
    pipeline.decode_failures = [OOM, OOM]
    held = engine(pipeline)
    generation = held.run(plan())
    assert (pipeline.vae.tiling, pipeline.vae.slicing) == (True, True)
    assert "decoded in tiles" in generation.warnings[0]
    assert held.run(plan()).warnings == ()
    assert not pipeline.vae.tiling


def test_tiles_on_the_shipped_model_give_nearly_the_same_picture() -> None:
    class Short:
        """The shipped VAE, out of memory unless it decodes in tiles."""

        def __init__(self, vae: Any) -> None:
            self._decode = vae.decode
            self._vae = vae

        def __call__(self, latents: torch.Tensor, **options: Any) -> Any:
            if not self._vae.use_tiling:
                raise OOM
            return self._decode(latents, **options)

    held = load_engine(Settings(model_name="flux-shapes"))
    big = plan(width=160, height=96)  # trained, and larger than a tile
    whole = held.run(big).pictures[0]
    vae = held._pipeline.vae
    vae.decode = Short(vae)
    tiled = held.run(big)
    assert "decoded in tiles" in tiled.warnings[0]
    assert np.abs(np.asarray(whole, float) - np.asarray(tiled.pictures[0], float)).mean() < 3


def test_previews_look_like_the_picture_and_do_not_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.engine.preview.SECONDS_BETWEEN", 0)
    held = load_engine(Settings(model_name="flux-shapes"))
    seen: list[Progress] = []
    shown = held.run(plan(preview=True), seen.append).pictures[0]
    assert np.array_equal(np.asarray(shown), np.asarray(held.run(plan()).pictures[0]))
    previews = [p.preview for p in seen if p.preview]
    assert len(previews) == 7, "the first step has nothing to compare with"
    final = np.asarray(shown.resize(previews[-1].size), float)
    off = [np.abs(np.asarray(preview, float) - final).mean() for preview in previews]
    assert off[-1] < 3
    assert off[-1] < off[0]


def test_stopped_jobs_leave_no_tensors_behind() -> None:
    """Without waiting for the garbage collector: embeddings would lie on the card until it comes."""
    from handler import respond

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise Cancelled("now")

    def tensors() -> int:
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    held = load_engine(Settings(model_name="flux-shapes"))
    device = JobQueue()
    event = {"input": {"prompt": "a red circle", "seed": 1}}

    def run(on_progress: OnProgress | None) -> str:
        job = Job(queue_up=device.ticket, on_progress=on_progress)
        return str(respond(event, job, Settings, lambda: held)["status"])

    assert [run(None), run(stop)] == ["success", "error"]
    gc.collect()
    before = tensors()
    gc.disable()
    try:
        assert [run(stop) for _ in range(3)] == ["error"] * 3
        assert tensors() <= before
    finally:
        gc.enable()
        device.close()


def test_values_that_are_not_finite_are_no_picture() -> None:
    with pytest.raises(GenerationFailed, match="not finite after 8 steps with guidance_scale"):
        engine(FakePipeline(latents=float("nan"))).run(plan())


def test_whoever_listens_may_stop_it() -> None:
    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.step == 3:
            raise Stop

    held = engine(FakePipeline())
    with pytest.raises(Stop):
        held.run(plan(), stop)
    assert len(held.run(plan()).pictures) == 1


def test_progress_counts_the_steps_of_all_pictures() -> None:
    seen: list[Progress] = []
    engine(FakePipeline()).run(plan(num_images=2, num_inference_steps=3), seen.append)
    assert [p.step for p in seen if p.phase == "denoise"] == [0, 1, 2, 3, 3, 4, 5, 6]
    assert [p.phase for p in seen if p.phase != "denoise"] == ["encode_prompt", "decode", "decode"]
    assert {p.steps for p in seen} == {6}


def test_pictures_are_drawn_one_by_one_or_together() -> None:
    for batch_size, calls in ((1, [1, 1, 1]), (2, [2, 1]), (4, [3])):
        pipeline = FakePipeline()
        engine(pipeline).run(plan(batch_size, num_images=3))
        assert [call["num_images_per_prompt"] for call in pipeline.calls] == calls
        assert [len(call["generator"]) for call in pipeline.calls] == calls


def test_a_size_off_the_grid_is_the_middle_of_a_larger_canvas() -> None:
    pipeline = FakePipeline()
    pictures = engine(pipeline).run(plan(width=200, height=120)).pictures
    assert (pipeline.calls[0]["width"], pipeline.calls[0]["height"]) == (208, 128)
    assert pictures[0].size == (200, 120)


def test_every_plan_gets_a_scheduler_of_its_own() -> None:
    pipeline = FakePipeline()
    held = engine(pipeline)
    own = pipeline.scheduler
    held.run(plan(scheduler="dpmpp_2m"))
    assert type(pipeline.scheduler).__name__ == "FlowDPMSolverScheduler"
    held.run(plan())
    assert pipeline.scheduler is not own
    assert dict(pipeline.scheduler.config) == dict(own.config)


def test_a_fixed_shift_survives_a_change_of_scheduler() -> None:
    pipeline = FakePipeline()
    pipeline.scheduler.register_to_config(shift=3.0)
    engine(pipeline).run(plan(scheduler="unipc"))
    config = pipeline.scheduler.config
    assert config.base_shift == config.max_shift == pytest.approx(1.0986, abs=1e-4)


def test_a_moving_shift_survives_too() -> None:
    pipeline = FakePipeline()
    pipeline.scheduler.register_to_config(use_dynamic_shifting=True, base_shift=0.4, max_shift=1.2)
    engine(pipeline).run(plan(scheduler="dpmpp_2m"))
    assert (pipeline.scheduler.config.base_shift, pipeline.scheduler.config.max_shift) == (0.4, 1.2)


def test_a_long_prompt_is_cut_with_a_warning() -> None:
    words = " ".join(["red"] * 40)
    steered = engine(FakePipeline()).run(plan(negative_prompt=words, true_cfg_scale=2))
    assert steered.warnings == ("negative_prompt has 40 tokens for T5, which reads the first 32",)
    assert engine(FakePipeline()).run(plan(prompt=words)).warnings == (
        "prompt has 40 tokens for T5, which reads the first 32",
    )


def test_slicing_is_asked_for() -> None:
    pipeline = FakePipeline()
    engine(pipeline)
    assert pipeline.sliced


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws_to_the_end_and_the_same_again(scheduler: str) -> None:
    pipeline = FakePipeline()
    generation = engine(pipeline).run(plan(scheduler=scheduler))
    assert generation.scheduler == scheduler
    pipeline.scheduler.set_timesteps(**_timesteps(pipeline.scheduler, 8))
    assert pipeline.scheduler.sigmas[-1] <= 1e-3, "what is left of the noise would stay in the picture"


def _timesteps(scheduler: Any, steps: int) -> dict[str, Any]:
    """What FluxPipeline gives to set_timesteps."""
    if scheduler.config.get("use_flow_sigmas"):
        return {"num_inference_steps": steps, "mu": 0.0}
    return {"sigmas": [1 - step / steps for step in range(steps)], "mu": 0.0}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws_what_is_asked_for(scheduler: str, generate: Any) -> None:
    asked = {"prompt": "a red circle on a blue background", "seed": 1, "scheduler": scheduler}
    response = generate(**asked)
    (picture,) = opened(response)
    assert (judge.centre_colour(picture), judge.background_colour(picture)) == ("red", "blue")
    assert generate(**asked)["images"] == response["images"]
    assert response["metadata"]["scheduler"] == scheduler


def test_the_models_own_scheduler_is_named_as_a_request_names_it() -> None:
    assert engine(FakePipeline()).run(plan()).scheduler == "euler"


def test_a_prompt_that_was_read_is_not_read_again() -> None:
    pipeline = FakePipeline()
    held = engine(pipeline)
    for fields in ({}, {"seed": 5, "width": 128}, {"num_inference_steps": 2}):
        held.run(plan(**fields))
    assert pipeline.read == ["a red circle"]
    held.run(plan(prompt="a blue circle"))
    held.run(plan(max_sequence_length=16))
    held.run(plan(negative_prompt="a dog", true_cfg_scale=2))
    held.run(plan())
    assert pipeline.read == ["a red circle", "a blue circle", "a red circle", "a red circle", "a dog"]


def test_of_many_prompts_the_latest_are_remembered() -> None:
    pipeline = FakePipeline()
    held = engine(pipeline)
    for i in (*range(65), 64, 1, 0):
        held.run(plan(prompt=f"circle {i}"))
    assert pipeline.read == [f"circle {i}" for i in (*range(65), 0)]
