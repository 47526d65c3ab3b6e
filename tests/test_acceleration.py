"""Compiled blocks, attention kernels, guessed steps, smaller weights: what each changes of a picture, and what not."""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from importlib.metadata import PackageNotFoundError
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from handler import respond
from src.catalog import MODELS, QUANTIZATIONS, SPEEDS
from src.engine import Engine, load_engine
from src.engine.acceleration import _set_attention
from src.engine.pipelines import pipeline_class
from src.engine.quantization import Quantizer, _chosen
from src.errors import InvalidSettings, ModelUnavailable, WorkerError
from src.job import Job, Progress
from src.plan.plan import Plan, make_plan
from src.request.reading import read_request
from src.response.encode import read_parameters
from src.settings import ROOT, Settings
from tests.conftest import base64_of, opened
from tests.small_models import small
from training.scenes import every_prompt

OUTLINE = {"lora_path": "flux-shapes-outline/pytorch_lora_weights.safetensors", "lora_scale": 1}
PROMPT = "a large red circle on a blue background"


def load(model_name: str = "flux-shapes", **fields: Any) -> Engine:
    return load_engine(Settings(model_name=model_name, **fields))


def ask(engine: Engine, **fields: Any) -> dict[str, Any]:
    event = {"input": {"prompt": PROMPT, "seed": 1, **fields}}
    return respond(event, Job(), lambda: Settings(lora_dir=ROOT / "models"), lambda: engine)


def drawn(engine: Engine, **fields: Any) -> np.ndarray[Any, Any]:
    response = ask(engine, **fields)
    assert response["status"] == "success", response
    return np.asarray(opened(response)[0], float)


def several(engine: Engine, **fields: Any) -> np.ndarray[Any, Any]:
    """Eight pictures: of any single one a few pixels of an edge decide."""
    prompts = (PROMPT, *(prompt for prompt, _ in islice(every_prompt(), 0, None, 40)))
    return np.stack([drawn(engine, prompt=prompt, **fields) for prompt in prompts])


def decibels(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """Peak signal-to-noise ratio; infinite where they are equal."""
    error = float(((one - other) ** 2).mean())
    return 10 * np.log10(255**2 / error) if error else float("inf")


def plan(engine: Engine, **fields: Any) -> Plan:
    request, faults, _ = read_request({"input": {"prompt": PROMPT, "seed": 1, **fields}})
    return make_plan(request, faults, engine.model, max_pixels=2048**2)


@pytest.fixture(scope="module")
def plain() -> Engine:
    return load()


def test_attention_backends_go_by_name(plain: Engine) -> None:
    assert decibels(drawn(load(attention_backend="_native_math")), drawn(plain)) > 90
    with pytest.raises(WorkerError, match=r"ATTENTION_BACKEND=fastest: .*native"):
        load(attention_backend="fastest")


def test_who_asks_for_a_description_does_not_look_at_layers_that_may_be_changing(
    plain: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changing() -> Any:
        raise RuntimeError("OrderedDict mutated during iteration")

    monkeypatch.setattr(plain.transformer, "modules", changing)
    assert plain.loaded().acceleration["attention"] == "native"


def computed_steps(engine: Engine, **fields: Any) -> int:
    """How many steps the last of the blocks was really asked in."""
    calls = []
    block = engine._pipeline.transformer.single_transformer_blocks[-1]
    hook = block.attn.register_forward_hook(lambda *_: calls.append(1))
    response = ask(engine, **fields)
    hook.remove()
    assert response["status"] == "success", response
    return len(calls)


@pytest.mark.parametrize(("speed", "computed", "least"), [("balanced", (5, 16), 40), ("fast", (5, 12), 35)])
def test_guessed_steps_are_asked_for_and_named(
    plain: Engine, speed: str, computed: tuple[int, int], least: float
) -> None:
    for steps, most in zip((8, 28), computed, strict=True):
        assert computed_steps(plain, num_inference_steps=steps) == steps
        assert computed_steps(plain, num_inference_steps=steps, speed=speed) <= most
        exact, guessed = (drawn(plain, num_inference_steps=steps, speed=way) for way in ("exact", speed))
        assert least < decibels(exact, guessed) < float("inf")
    response = ask(plain, speed=speed)
    assert response["metadata"]["speed"] == speed
    event = read_parameters(opened(response)[0])
    assert event is not None
    assert event["input"]["speed"] == speed
    few = ask(plain, speed=speed, num_inference_steps=3)
    assert few["metadata"]["warnings"] == [f"speed {speed} has no effect on 3 steps: the first 3 are computed"]


def test_guessed_steps_leave_nothing_to_the_next_request(plain: Engine) -> None:
    exact, fast = drawn(plain), drawn(plain, speed="fast")
    for _ in range(2):
        assert np.array_equal(drawn(plain), exact)
        assert np.array_equal(drawn(plain, speed="fast"), fast)

        def stop(progress: Progress) -> None:
            if progress.step == 5:
                raise TimeoutError

        answer = respond({"input": {"prompt": PROMPT, "speed": "fast"}}, Job(on_progress=stop), Settings, lambda: plain)
        assert answer["status"] == "error"
        assert np.array_equal(drawn(plain, speed="fast", width=192), drawn(plain, speed="fast", width=192))


def test_guessed_steps_go_with_every_mode_but_not_with_two_directions_mixed(plain: Engine) -> None:
    start = {"init_image": ask(plain)["images"][0], "strength": 0.9}
    assert decibels(drawn(plain, **start, speed="fast"), drawn(plain, **start)) > 30
    away = {"negative_prompt": "a square", "true_cfg_scale": 2}
    assert decibels(drawn(plain, **away, speed="balanced"), drawn(plain, **away)) > 25
    refused = ask(plain, **start, **away, speed="fast")
    (fault,) = refused["errors"]
    assert fault["field"] == "speed"
    assert "cannot be fast in image-to-image with true_cfg_scale above 1; allowed: exact" in fault["message"]


def test_the_catalog_knows_which_pipelines_tell_two_directions_apart() -> None:
    for model in MODELS:
        for row in model.modes.values():
            source = inspect.getsource(pipeline_class(row.class_name))
            assert row.cache_context == bool(re.search("cache_context|_Guidance", source)), row.class_name
    assert SPEEDS["exact"] is None


LITTLE = {"width": 128, "height": 128, "num_inference_steps": 4, "max_sequence_length": 32}


@pytest.fixture(scope="module")
def fitting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose rows are multiples of 64, which bitsandbytes' path for some processors wants."""
    return small("schnell", tmp_path_factory.mktemp("fitting") / "m", num_attention_heads=4, num_single_layers=5)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_smaller_weights_are_smaller_and_named_and_nearly_right(kind: str, fitting: Path) -> None:
    plain, engine = load(model_name=str(fitting)), load(model_name=str(fitting), quantization=kind)
    placement = engine._placed_pipeline.placement
    assert placement is not None
    assert placement.mode == kind
    assert sum(block_bytes(engine)) < sum(block_bytes(plain)) * (QUANTIZATIONS[kind].itemsize / 4 + 0.05)
    assert 35 < decibels(drawn(engine, **LITTLE), drawn(plain, **LITTLE)) < float("inf")
    response = ask(engine, **LITTLE)
    assert response["metadata"]["quantization"] == kind
    event = read_parameters(opened(response)[0])
    assert event is not None
    assert event["quantization"] == kind
    assert ask(plain, **LITTLE)["metadata"]["quantization"] is None


@pytest.mark.slow
def test_smaller_weights_draw_what_was_asked_for_with_adapters_too(plain: Engine) -> None:
    engine = load(quantization="fp8")
    assert float("inf") > decibels(several(engine), several(plain)) > 40
    assert decibels(several(engine, **OUTLINE), several(plain, **OUTLINE)) > 40
    assert decibels(drawn(engine, **OUTLINE), drawn(engine)) < 30, "the adapter counts"


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_smaller_weights_draw_in_every_mode(kind: str, plain: Engine, fitting: Path) -> None:
    sent = base64_of(opened(ask(plain))[0])
    exact, engine = load(model_name=str(fitting)), load(model_name=str(fitting), quantization=kind)
    inpainting = {"init_image": sent, "mask_image": sent, "preserve_unmasked": False}
    for fields in ({"init_image": sent}, inpainting):
        assert decibels(drawn(engine, **LITTLE, **fields), drawn(exact, **LITTLE, **fields)) > 30


def test_smaller_weights_draw_with_a_controlnet(plain: Engine) -> None:
    fields = {"control_image": base64_of(opened(ask(plain))[0]), "preprocess": True}
    assert decibels(drawn(load(quantization="fp8"), **fields), drawn(plain, **fields)) > 20


class Careless:
    """A library that loses a fifth of what it is given."""

    name = "torchao"

    def quantize(self, layer: torch.nn.Linear, device: torch.device) -> torch.nn.Module:
        with torch.no_grad():
            layer.weight += 0.2 * layer.weight.std() * torch.randn(layer.weight.shape)
        return layer

    def restore(self, transformer: Any, weights: dict[str, Any]) -> None:
        transformer.load_state_dict(weights, assign=True)


def test_a_library_that_quantizes_wrongly_here_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.engine.quantization._BACKENDS", {"fp8": Careless()})
    with pytest.raises(InvalidSettings, match=LOSES) as caught:
        load(quantization="fp8")
    assert "and 0.06 is allowed; torchao" in str(caught.value)


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_one_layer_at_a_time_is_held_in_both_forms(kind: str, fitting: Path) -> None:
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(fitting / "transformer")
    originals = [weakref.ref(transformer.get_submodule(name).weight) for name in _chosen(transformer)]
    alive = []
    check = Quantizer._check

    class Watched(Quantizer):
        def _check(self, name: str, layer: torch.nn.Module, answer: torch.Tensor) -> None:
            alive.append(sum(original() is not None for original in originals))
            check(self, name, layer, answer)

    Watched(kind, torch.device("cpu")).quantize(transformer)
    assert alive == list(range(len(originals) - 1, -1, -1))


LOSES = (
    r"QUANTIZATION=fp8: on this device \(cpu\) the layer transformer_blocks\.0\.\S+ with 160 inputs loses 0\.[12]\d of"
)


def test_kept_weights_that_are_not_as_they_were_are_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "quantized"
    expected = drawn(load(quantization="fp8", quantized_dir=folder))
    (file,) = folder.iterdir()
    kept = torch.load(file, weights_only=True)
    damaged: tuple[Any, ...] = (
        {**kept, "answers": {name: 2 * rows for name, rows in kept["answers"].items()}},
        kept["weights"],
        [],
    )
    for damage in damaged:
        torch.save(damage, file)
        with caplog.at_level(logging.WARNING, "worker"):
            assert np.array_equal(drawn(load(quantization="fp8", quantized_dir=folder)), expected)
        assert "is not used, and made anew" in caplog.text
        caplog.clear()
        assert np.array_equal(drawn(load(quantization="fp8", quantized_dir=folder)), expected)
        assert caplog.text == "", "what was made anew is kept"


def block_bytes(engine: Engine) -> list[int]:
    """Of the linears of the blocks, adaptive norms aside, as they are held."""
    sizes = []
    for name, layer in engine._pipeline.transformer.named_modules():
        if isinstance(layer, torch.nn.Linear) and "blocks." in name and ".norm" not in name:
            weight: Any = layer.weight
            parts = [weight.qdata, weight.scale] if hasattr(weight, "qdata") else [weight]
            sizes.append(sum(part.numel() * part.element_size() for part in parts))
    return sizes


def test_smaller_weights_and_adaptive_norms_ahead_go_together(fitting: Path) -> None:
    whole = load(model_name=str(fitting), memory_mode="nf4")
    narrow = load(model_name=str(fitting), memory_mode="nf4", memory_limit_gb=0.0195, max_pixels=128 * 128)
    assert narrow.loaded().placement["modulation_cache"]
    assert np.array_equal(drawn(narrow, **LITTLE), drawn(whole, **LITTLE))


def test_quantized_weights_are_kept_for_the_next_worker(fitting: Path, tmp_path: Path) -> None:
    (volume := tmp_path / "volume").mkdir()
    whole = (fitting / "transformer/diffusion_pytorch_model.safetensors").stat().st_size
    for kind in QUANTIZATIONS:
        first = load(model_name=str(fitting), quantization=kind, quantized_dir=volume / "quantized")
        (file,) = volume.glob(f"quantized/*-{kind}-*.pt")
        assert file.stat().st_size < 0.8 * whole, "of 4 bytes a value; adaptive norms are whole"
        written = file.stat().st_mtime_ns
        second = load(model_name=str(fitting), quantization=kind, quantized_dir=volume / "quantized")
        assert file.stat().st_mtime_ns == written
        assert block_bytes(second) == block_bytes(first)
        assert np.array_equal(drawn(second, **LITTLE), drawn(first, **LITTLE))
    load(quantization="fp8", quantized_dir=tmp_path / "no volume" / "quantized")
    assert not (tmp_path / "no volume").exists()


def test_without_the_library_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("src.engine.quantization.version", missing)
    with pytest.raises(ModelUnavailable, match=r"fp8 wants torchao: pip install -r requirements-quantization\.txt"):
        load(quantization="fp8")


def test_a_profile_chooses_what_the_other_settings_leave_open() -> None:
    assert Settings().placement_mode == "auto"
    assert Settings(profile="near").placement_mode == "fp8"
    assert Settings(profile="near", quantization="none").placement_mode == "auto"
    assert Settings(profile="fast", quantization="nf4").placement_mode == "nf4"
    assert Settings(profile="fast", memory_mode="stream").placement_mode == "stream"
    assert Settings(profile="Fast").profile == "fast"


@pytest.mark.parametrize("profile", ["near", "fast"])
def test_a_profile_is_named_and_used_where_a_request_says_nothing(profile: str, plain: Engine) -> None:
    settings = Settings(model_name="flux-shapes", profile=profile)
    engine = load_engine(settings)

    def answer(**fields: Any) -> dict[str, Any]:
        return respond({"input": {"prompt": PROMPT, "seed": 1, **fields}}, Job(), lambda: settings, lambda: engine)

    (picture,) = opened(response := answer())
    metadata = response["metadata"]
    assert (metadata["profile"], metadata["quantization"]) == (profile, "fp8")
    speed = {"near": "exact", "fast": "balanced"}[profile]
    assert metadata["speed"] == speed
    for asked in (response, answer(speed="exact")):
        event = read_parameters(opened(asked)[0])
        assert event is not None
        again = answer(**event["input"])
        assert again["metadata"]["speed"] == asked["metadata"]["speed"]
        assert again["images"] == asked["images"]
    assert 20 < decibels(np.asarray(picture, float), drawn(plain)) < float("inf")
    assert answer(speed="exact")["metadata"]["speed"] == "exact", "a request counts first"
    few = answer(num_inference_steps=2)["metadata"]
    assert few["warnings"] == []
    assert few["speed"] == "exact"
    mixed = {"init_image": base64_of(picture), "negative_prompt": "a square", "true_cfg_scale": 2}
    assert answer(**mixed)["status"] == "success", "where steps cannot be guessed they are computed"
    acceleration = answer(describe=True)["describe"]["acceleration"]
    assert acceleration == {"profile": profile, "products_in_8_bits": False, "attention": "native", "compiled": "off"}
    assert ask(plain)["metadata"]["profile"] == "exact"


class Transformer:
    """Takes the attention backends that are installed."""

    def __init__(self, *installed: str) -> None:
        self.installed = {"native", "_native_cudnn", *installed}
        self.backend = ""

    def set_attention_backend(self, name: str) -> None:
        if name not in self.installed:
            raise RuntimeError(f"{name}: pip install kernels")
        self.backend = name

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize(
    ("capability", "profile", "installed", "chosen"),
    [
        ((9, 0), "exact", (), "native"),  # torch chooses cuDNN by itself there, and another where that fails
        ((12, 0), "exact", (), "_native_cudnn"),
        ((8, 9), "near", ("sage_hub",), "native"),
        ((9, 0), "fast", ("_flash_3_hub", "sage_hub"), "_flash_3_hub"),
        ((8, 9), "fast", ("sage_hub",), "sage_hub"),
        ((12, 0), "fast", (), "_native_cudnn"),
        ((0, 0), "fast", ("sage_hub",), "native"),  # the CPU
    ],
)
def test_attention_goes_by_card_and_profile(
    capability: tuple[int, int], profile: str, installed: tuple[str, ...], chosen: str
) -> None:
    transformer = Transformer(*installed)
    _set_attention(transformer, Settings(profile=profile), capability)
    assert transformer.backend == chosen
    _set_attention(transformer, Settings(profile=profile, attention_backend="native"), capability)
    assert transformer.backend == "native", "ATTENTION_BACKEND counts first"
