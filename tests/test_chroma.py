"""Chroma: T5 alone with its mask, guidance away from another prompt, adaptive norms that a small network answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from src.engine import Engine, load_engine, load_engines
from src.engine.placed_pipeline import PlacedPipeline
from src.errors import Cancelled, InvalidRequest, InvalidSettings
from src.job import Progress
from src.plan.plan import Plan, make_plan
from src.request.adapters import Adapter
from src.request.reading import read_request
from src.request.schema import Lora
from src.settings import Settings
from src.weights.placement import block_of
from tests.small_models import all_placements, small, weights_of
from tests.test_together import CPU

SIZE = 64
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
MASK = Image.new("L", (SIZE, SIZE), 255)
SENT: dict[str, dict[str, Image.Image]] = {
    "text-to-image": {},
    "image-to-image": {"init_image": PICTURE},
    "inpainting": {"init_image": PICTURE, "mask_image": MASK},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small("chroma", tmp_path_factory.mktemp("chroma"))


@pytest.fixture(scope="module")
def held(folder: Path) -> Engine:
    return load_engine(Settings(model_name=str(folder)))


def plan(held: Engine, mode: str = "text-to-image", adapters: tuple[Adapter, ...] = (), **fields: Any) -> Plan:
    said = {"prompt": "a red circle", "seed": 5, "width": SIZE, "height": SIZE}
    said |= {"num_inference_steps": 3, "max_sequence_length": 32, **fields}
    request, faults, _ = read_request({"input": {**said, **dict.fromkeys(SENT[mode], "sent")}})
    pictures = {name: (picture,) for name, picture in SENT[mode].items()}
    return make_plan(request, faults, held.model, pictures, adapters, max_pixels=SIZE * SIZE, batch_size=2)


def pixels(held: Engine, *given: Any, **fields: Any) -> list[bytes]:
    return [picture.tobytes() for picture in held.run(plan(held, *given, **fields)).pictures]


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("mode", SENT)
def test_its_pictures_are_diffusers_own(mode: str, guidance_scale: float, held: Engine, folder: Path) -> None:
    pipeline = getattr(diffusers, held.model.modes[mode].class_name).from_pretrained(folder, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.register_to_config(
        guidance_embeds=False
    )  # diffusers' inpainting asks, its transformer is mute
    strength = {"strength": 0.8} if mode != "text-to-image" else {}
    steered = {"negative_prompt": "blue"} if guidance_scale > 1 else {}
    named = {"init_image": "image"}
    picture = pipeline(
        prompt="a red circle",
        width=SIZE,
        height=SIZE,
        num_inference_steps=3,
        guidance_scale=guidance_scale,
        max_sequence_length=32,
        generator=torch.Generator("cpu").manual_seed(5),
        **{named.get(name, name): sent for name, sent in SENT[mode].items()},
        **strength,
        **steered,
    ).images[0]
    fields = {"guidance_scale": guidance_scale, **steered}
    assert pixels(held, mode, **fields) == [picture.tobytes()]


def test_pictures_of_a_batch_are_those_of_their_seeds(held: Engine) -> None:
    several = [np.frombuffer(each, np.uint8) for each in pixels(held, num_images=2)]
    alone = [np.frombuffer(pixels(held, seed=seed)[0], np.uint8) for seed in (5, 6)]
    for one, other in zip(several, alone, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 3


def test_what_is_cancelled_leaves_nothing_to_the_next(held: Engine) -> None:
    def stop(progress: Progress) -> None:
        if progress.phase == "denoise" and progress.step == 2:
            raise Cancelled("stopped")

    for mode in SENT:
        before = pixels(held, mode)
        with pytest.raises(Cancelled):
            held.run(plan(held, mode, seed=9), stop)
        assert pixels(held, mode) == before


def test_the_same_bytes_with_every_block_in_the_hosts_memory(held: Engine, folder: Path) -> None:
    weights = weights_of(folder)
    assert not any(found.modulation_cache for found in all_placements(weights)), "it has no adaptive norms to cache"
    assert not weights.transformer.modulation
    assert all(block_of(f"{name}.x") == name for name in weights.transformer.blocks)
    assert {name.partition(".")[0] for name in weights.transformer.blocks} == {
        "transformer_blocks",
        "single_transformer_blocks",
    }
    thrifty = load_engine(Settings(model_name=str(folder)))
    least = min(all_placements(weights), key=lambda found: found.resident)
    thrifty._placed_pipeline = PlacedPipeline(thrifty._pipeline, least, CPU)
    for mode in SENT:
        assert pixels(thrifty, mode, negative_prompt="blue") == pixels(held, mode, negative_prompt="blue")


def test_an_adapter_draws_as_it_does_merged_into_the_weights(held: Engine, folder: Path, tmp_path: Path) -> None:
    """Of all that trainers train of it, its distilled_guidance_layer among them."""
    pipeline = diffusers.ChromaPipeline.from_pretrained(folder, dtype=torch.float32)
    layers = [name for name, layer in pipeline.transformer.named_modules() if isinstance(layer, torch.nn.Linear)]
    targets = [name for name in layers if "blocks.1." in name or name.startswith("distilled_guidance_layer.layers.1")]
    assert any(name.startswith("distilled") for name in targets)
    generator = torch.Generator().manual_seed(1)
    halves: dict[str, torch.Tensor] = {}
    named: dict[str, Any] = dict(pipeline.transformer.named_modules())
    for name in targets:
        down = torch.randn(2, named[name].in_features, generator=generator) * 0.3
        up = torch.randn(named[name].out_features, 2, generator=generator) * 0.3
        trainers = name.replace("linear_1", "in_layer") if name.startswith("distilled") else name
        halves |= {f"transformer.{trainers}.lora_A.weight": down, f"transformer.{trainers}.lora_B.weight": up}
        named[name].weight.data += up @ down
    save_file(halves, tmp_path / "adapter.safetensors")
    pipeline.save_pretrained(tmp_path / "merged")
    merged = load_engine(Settings(model_name=str(tmp_path / "merged")))
    file = tmp_path / "adapter.safetensors"
    adapter = Adapter("adapter", file, Lora(path=file.name, scale=1.0), "loras")
    faults, warnings = held.check_adapters([adapter])
    assert not faults
    assert not warnings
    adapted, truth, plain = (
        np.frombuffer(found[0], np.uint8).astype(int)
        for found in (pixels(held, "text-to-image", (adapter,)), pixels(merged), pixels(held))
    )
    assert np.abs(adapted - truth).max() <= 2
    assert np.abs(plain - truth).max() > 20


def test_steps_are_guessed_where_nothing_is_steered_away_from(held: Engine) -> None:
    with pytest.raises(InvalidRequest, match="with guidance_scale above 1; allowed: exact, or guidance_scale 1"):
        plan(held, speed="fast")
    exact, fast = (pixels(held, num_inference_steps=9, guidance_scale=1, speed=speed) for speed in ("exact", "fast"))
    assert exact != fast


def test_what_cannot_take_its_mask_or_share_it_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidSettings, match="PARALLEL=picture: cards cannot share the transformer of"):
        load_engines(Settings(model_name=str(folder), parallel="picture"), on=(CPU, CPU))
    with pytest.raises(InvalidSettings, match="ATTENTION_BACKEND=_native_flash: "):
        load_engine(Settings(model_name=str(folder), attention_backend="_native_flash"))
