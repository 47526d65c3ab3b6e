"""FLUX.2-klein-KV: references are read in the first step and kept for the others, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from handler import respond
from src.engine import Engine, load_engine, load_engines
from src.engine.acceleration import COMPILED, Compiled
from src.engine.lora_slots import LoraSlots
from src.engine.placed_pipeline import PlacedPipeline
from src.errors import Cancelled, InvalidSettings
from src.job import Job, Progress
from src.plan.plan import Plan, make_plan
from src.request.adapters import Adapter
from src.request.reading import read_request
from src.request.schema import Lora
from src.serving.warm_up import warm_up
from src.settings import Settings
from tests.conftest import base64_of, opened
from tests.small_models import all_placements, small, weights_of
from tests.test_compiled import fresh_compiler  # noqa: F401 - a fixture
from tests.test_together import CPU

SIZE = 96
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)) for seed in (0, 1)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small("klein-kv", tmp_path_factory.mktemp("kv"))


@pytest.fixture(scope="module")
def held(folder: Path) -> Engine:
    return load_engine(Settings(model_name=str(folder)))


def plan(held: Engine, references: list[Image.Image], adapters: tuple[Adapter, ...] = (), **fields: Any) -> Plan:
    said = {"prompt": "a red circle", "seed": 5, "width": SIZE, "height": SIZE, "num_inference_steps": 4, **fields}
    sent = {"init_images": ["sent"] * len(references)} if references else {}
    request, faults, _ = read_request({"input": {**said, **sent}})
    pictures = {"init_image": tuple(references)} if references else {}
    return make_plan(request, faults, held.model, pictures, adapters, max_pixels=SIZE * SIZE, batch_size=2)


def pixels(held: Engine, references: list[Image.Image], **fields: Any) -> list[bytes]:
    return [picture.tobytes() for picture in held.run(plan(held, references, **fields)).pictures]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_its_pictures_are_diffusers_own(count: int, held: Engine, folder: Path) -> None:
    pipeline = diffusers.Flux2KleinKVPipeline.from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(
        prompt="a red circle",
        image=PICTURES[:count] or None,
        width=SIZE,
        height=SIZE,
        generator=torch.Generator("cpu").manual_seed(5),
    ).images[0]
    assert pixels(held, PICTURES[:count]) == [picture.tobytes()]


def test_an_adapter_draws_as_it_does_merged_also_what_was_read_of_references(
    held: Engine, folder: Path, tmp_path: Path
) -> None:
    pipeline = diffusers.Flux2KleinKVPipeline.from_pretrained(folder, dtype=torch.float32)
    generator, halves = torch.Generator().manual_seed(1), dict[str, torch.Tensor]()
    for name, layer in pipeline.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and "blocks.0." in name:
            down = torch.randn(2, layer.in_features, generator=generator) * 0.3
            up = torch.randn(layer.out_features, 2, generator=generator) * 0.3
            halves |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
            layer.weight.data += up @ down
    save_file(halves, tmp_path / "adapter.safetensors")
    pipeline.save_pretrained(tmp_path / "merged")
    merged = load_engine(Settings(model_name=str(tmp_path / "merged")))
    file = tmp_path / "adapter.safetensors"
    adapter = Adapter("adapter", file, Lora(path=file.name, scale=1.0), "loras")
    assert held.check_adapters([adapter]) == ([], [])
    for references in ([], PICTURES):
        adapted, truth, plain = (
            np.frombuffer(engine.run(drawn).pictures[0].tobytes(), np.uint8).astype(int)
            for engine, drawn in (
                (held, plan(held, references, adapters=(adapter,))),
                (merged, plan(merged, references)),
                (held, plan(held, references)),
            )
        )
        assert np.abs(adapted - truth).max() <= 2
        assert np.abs(plain - truth).max() > 20


def test_what_a_picture_has_read_is_not_left_to_the_next(held: Engine) -> None:
    def stop(progress: Progress) -> None:
        if progress.phase == "denoise" and progress.step == 2:
            raise Cancelled("stopped")

    before = pixels(held, PICTURES[:1])
    for references in (PICTURES[1:], PICTURES):
        with pytest.raises(Cancelled):
            held.run(plan(held, references), stop)
        assert pixels(held, PICTURES[:1]) == before
    assert pixels(held, []) not in (before, pixels(held, PICTURES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bytes_wherever_its_weights_are(dtype: torch.dtype, folder: Path) -> None:
    """Adaptive norms of references have a timestep of their own, which no scheduler announces."""
    plain, thrifty = (load_engine(Settings(model_name=str(folder))) for _ in range(2))
    for engine in (plain, thrifty):
        engine._pipeline.to(dtype)
    placements = [found for found in all_placements(weights_of(folder)) if found.modulation_cache]
    least = min(placements, key=lambda found: found.resident)
    thrifty._placed_pipeline = PlacedPipeline(thrifty._pipeline, least, CPU)
    for references in ([], PICTURES[:1], PICTURES, PICTURES[:1]):
        assert pixels(thrifty, references) == pixels(plain, references)
    assert pixels(thrifty, PICTURES, scheduler="heun") == pixels(plain, PICTURES, scheduler="heun")


def test_pictures_of_a_batch_are_those_of_their_seeds(held: Engine) -> None:
    for references in ([], PICTURES):
        several = [np.frombuffer(each, np.uint8) for each in pixels(held, references, num_images=2)]
        alone = [np.frombuffer(pixels(held, references, seed=seed)[0], np.uint8) for seed in (5, 6)]
        for one, other in zip(several, alone, strict=True):
            assert np.abs(one.astype(int) - other).max() <= 3


def test_steps_can_be_guessed_though_the_first_reads_more(held: Engine) -> None:
    exact, fast = (pixels(held, PICTURES, num_inference_steps=9, speed=speed) for speed in ("exact", "fast"))
    assert fast != exact
    assert fast == pixels(held, PICTURES, num_inference_steps=9, speed="fast")
    assert pixels(held, PICTURES, num_inference_steps=9) == exact


def test_guidance_is_warned_of_and_never_handed_to_the_pipeline(held: Engine) -> None:
    fields = {"prompt": "x", "width": 64, "height": 64, "guidance_scale": 3, "init_image": base64_of(PICTURES[0])}
    response = respond({"input": fields}, Job(), Settings, lambda: held)
    assert response["status"] == "success", response
    assert len(opened(response)) == 1
    (warning,) = [said for said in response["metadata"]["warnings"] if "guidance_scale" in said]
    assert warning.startswith("guidance_scale has no effect on")


def test_the_warm_up_edits_too(held: Engine) -> None:
    """What reads references, and what has them kept, are graphs of their own."""
    drawn = list[str]()

    def on_device(work: Any) -> float:
        drawn.append(work.args[0].mode)
        return 1.0

    assert len(list(warm_up(held, Settings(warmup_sizes=((SIZE, SIZE),)), on_device))) == 1
    assert drawn == ["editing", "text-to-image"]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_edits_run_the_graphs_of_the_warm_up_whatever_they_refer_to(folder: Path, held: Engine, tmp_path: Path) -> None:
    run = list[Any]()

    def backend(graph: Any, _: Any) -> Any:
        def call(*inputs: Any) -> Any:
            run.append(graph)
            return graph.forward(*inputs)

        return call

    fast = load_engine(Settings(model_name=str(folder)))
    slots = LoraSlots(fast._pipeline.transformer, (), CPU, modulation=True)
    compiled = Compiled(fast._pipeline, tmp_path / "kept", slots, backend)
    for references in ([], PICTURES[:1]):
        compiled.warm_up(lambda references=references: fast.run(plan(fast, references)))  # type: ignore[misc]
    assert compiled.state == COMPILED
    for references in ([], PICTURES[:1], PICTURES):
        del run[:]
        assert pixels(fast, references) == pixels(held, references)
        assert len(run) == 2 * 4 + 1, "two blocks in each of four steps, and the decoder"


def test_cards_that_share_a_picture_are_refused(folder: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"PARALLEL=picture: .* keeps what it has read of its references"):
        load_engines(Settings(model_name=str(folder), parallel="picture"), on=(CPU, CPU))
