"""What of a job has the device's turn, and what is done before and after it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from handler import respond
from src.catalog import FAMILIES
from src.engine import Engine, load_engine
from src.engine.denoise import Decoded
from src.job import Job
from src.job_queue import JobQueue
from src.plan.plan import Plan, make_plan
from src.request.reading import read_request
from src.settings import ROOT, Settings
from tests.small_models import small

OUTLINE = {"lora_path": "flux-shapes-outline/pytorch_lora_weights.safetensors", "lora_scale": 1}


def reading_ahead(engine: Engine) -> Engine:
    """The same model as a card has it."""
    return Engine(engine._pipeline, engine.model, None, placed_pipeline=engine._placed_pipeline, reads_ahead=True)


def plan(engine: Engine, **fields: Any) -> Plan:
    request, faults, _ = read_request({"input": {"prompt": "a red circle", "seed": 1, **fields}})
    return make_plan(request, faults, engine.model, max_pixels=512**2)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return reading_ahead(load_engine(Settings(model_name="flux-shapes")))


@pytest.fixture
def device() -> Iterator[JobQueue]:
    queue = JobQueue()
    yield queue
    queue.close()


def noting(calls: list[str], call: Callable[..., Any]) -> Callable[..., Any]:
    def noted(*given: Any, **named: Any) -> Any:
        if named.get("prompt_embeds") is None:  # a pipeline asks once more, with what was read
            calls.append(threading.current_thread().name)
        return call(*given, **named)

    return noted


def test_prompts_noise_and_delivery_leave_the_turn(
    engine: Engine, device: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, drawn, delivered = list[str](), list[str](), list[str]()
    pipeline = engine._pipeline
    prepare = pipeline.prepare_latents

    @functools.wraps(prepare)
    def prepare_latents(*given: Any, **named: Any) -> Any:
        if (given[7] if len(given) > 7 else named.get("latents")) is None:
            drawn.append(threading.current_thread().name)
        return prepare(*given, **named)

    monkeypatch.setattr(pipeline, "encode_prompt", noting(read, pipeline.encode_prompt))
    monkeypatch.setattr(pipeline, "prepare_latents", prepare_latents)
    monkeypatch.setattr(Decoded, "pictures", noting(delivered, Decoded.pictures))
    here = threading.current_thread().name
    event = {"input": {"prompt": "a prompt that nobody has read", "seed": 3, "num_images": 2}}
    response = respond(event, Job(queue_up=device.ticket), Settings, lambda: engine)
    assert response["status"] == "success", response
    assert [name.partition("_")[0] for name in read] == ["prompts"]
    assert drawn == [here, here]
    assert delivered == [here, here]


def test_pictures_are_the_same_however_much_is_done_ahead(engine: Engine) -> None:
    for fields in ({}, {"num_images": 2}, {"width": 200, "height": 120}, {"negative_prompt": "x", "true_cfg_scale": 2}):
        made = plan(engine, **fields)
        whole = engine.run(made)
        split = engine.draw(made, noise=engine.prepare(made)).generation()
        assert [p.tobytes() for p in split.pictures] == [p.tobytes() for p in whole.pictures], fields


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_of_every_family_are_the_same(family: str, tmp_path: Path) -> None:
    held = reading_ahead(load_engine(Settings(model_name=str(small(family, tmp_path / family)))))
    if held.model.base.needs:
        assert not held.prepare(plan_with_pictures(held)), "their pictures draw from the generator first"
        return
    made = plan(held, width=64, height=96, num_inference_steps=2, max_sequence_length=64)
    whole = held.run(made).pictures[0]
    assert held.draw(made, noise=held.prepare(made)).generation().pictures[0].tobytes() == whole.tobytes()


def plan_with_pictures(engine: Engine) -> Plan:
    from PIL import Image

    from src.request.schema import PICTURES

    fields = dict.fromkeys(engine.model.base.needs, "sent")
    if "control_image" in fields:
        fields["control_type"] = engine.model.control_type or "canny"
    pictures = {name: (Image.new(PICTURES[name], (64, 64), "white"),) for name in engine.model.base.needs}
    request, faults, _ = read_request({"input": {"prompt": "x", "width": 64, "height": 64, **fields}})
    return make_plan(request, faults, engine.model, pictures, max_pixels=64 * 64)


def test_prompts_are_not_read_ahead_where_adapters_or_streaming_could_change_them_meanwhile(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[str]()
    narrow = reading_ahead(load_engine(Settings(model_name="flux-shapes", memory_limit_gb=0.0225, max_pixels=128**2)))
    assert not narrow._placed_pipeline.text_encoders_stay
    monkeypatch.setattr(narrow._pipeline, "encode_prompt", noting(read, narrow._pipeline.encode_prompt))
    narrow.prepare(plan(narrow))
    assert read == []


def test_jobs_with_and_without_adapters_side_by_side_have_their_own_pictures(engine: Engine, device: JobQueue) -> None:
    settings = Settings(lora_dir=ROOT / "models")

    def ask(number: int, queue: JobQueue | None) -> list[str]:
        fields = {"prompt": f"a red circle, number {number}", "seed": number, "num_inference_steps": 2}
        fields |= OUTLINE if number % 3 == 0 else {}
        job = Job(queue_up=queue.ticket) if queue else Job()
        response = respond({"input": fields}, job, lambda: settings, lambda: engine)
        assert response["status"] == "success", response
        images: list[str] = response["images"]
        return images

    with ThreadPoolExecutor(4) as jobs:
        together = list(jobs.map(lambda number: ask(number, device), range(12)))
    fresh = load_engine(Settings(model_name="flux-shapes"))
    for number, images in enumerate(together):
        fields = {"prompt": f"a red circle, number {number}", "seed": number, "num_inference_steps": 2}
        fields |= OUTLINE if number % 3 == 0 else {}
        alone = respond({"input": fields}, Job(), lambda: settings, lambda: fresh)
        assert images == alone["images"], number


def test_nobody_reads_ahead_while_a_turn_asks_the_tokenizers(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    class Asked:
        """A tokenizer that, when it is called, asks another thread whether it might call it too."""

        def __init__(self, tokenizer: Any) -> None:
            self._tokenizer = tokenizer

        def __getattr__(self, name: str) -> Any:
            return getattr(self._tokenizer, name)

        def __call__(self, *given: Any, **named: Any) -> Any:
            with ThreadPoolExecutor(1) as other:
                free.append(other.submit(engine._text_encoders.acquire, blocking=False).result())
            return self._tokenizer(*given, **named)

    free = list[bool]()
    for name in ("tokenizer", "tokenizer_2"):
        monkeypatch.setattr(engine._pipeline, name, Asked(getattr(engine._pipeline, name)))
    generation = engine.run(plan(engine, prompt=f"words that are far too many {'and more ' * 40}"))
    assert any("which reads the first" in warning for warning in generation.warnings)
    assert len(free) >= 4, "each to read, and to say what it did not"
    assert not any(free)


def test_what_fails_ahead_is_met_in_the_turn(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, failures = engine._pipeline.encode_prompt, [RuntimeError("a passing trouble")]

    def encode_prompt(*given: Any, **named: Any) -> Any:
        if failures:
            raise failures.pop()
        return encode(*given, **named)

    monkeypatch.setattr(engine._pipeline, "encode_prompt", encode_prompt)
    made = plan(engine, prompt="another prompt that nobody has read")
    noise = engine.prepare(made)
    assert not failures
    assert len(engine.draw(made, noise=noise).generation().pictures) == 1


def test_adaptive_norms_take_one_product_where_steps_need_not_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_engine(Settings(model_name="flux-shapes"))
    cached = load_engine(
        Settings(model_name="flux-shapes", memory_mode="modulation_cache", memory_limit_gb=0.1, max_pixels=128**2)
    )
    linear = cached._pipeline.transformer.transformer_blocks[0].norm1.linear
    shapes = list[tuple[int, ...]]()
    linear.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    for speed, asked in (("exact", [(1,)] * 8), ("balanced", [(8, 1)]), ("exact", [])):  # the first is remembered
        shapes.clear()
        made = plan(cached, speed=speed)
        pictures = [np.asarray(engine.run(made).pictures[0], float) for engine in (cached, plain)]
        assert [shape[:-1] for shape in shapes] == asked
        assert np.abs(pictures[0] - pictures[1]).max() <= (0 if speed == "exact" else 2)
