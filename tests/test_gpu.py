"""What only a card can show; what the CPU can show too is drawn there as well, on pretended cards."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_bench import block_calls
from benchmarks.gpu_ways import AS_SERVED, WAYS
from src.catalog import Model
from src.engine import Engine, load_engine
from src.engine.machine import context_memory
from src.errors import OutOfMemory
from src.plan.plan import make_plan
from src.request.adapters import Adapter
from src.request.reading import read_request
from src.request.schema import Lora
from src.settings import ROOT, Settings
from src.weights.placement import GB, Machine, Work, smallest
from tests.conftest import opened
from tests.small_models import small, weights_of
from training import judge

ON_CARD = torch.cuda.is_available()
MAJOR = torch.cuda.get_device_capability()[0] if ON_CARD else 0
card = pytest.mark.skipif(not ON_CARD, reason="no CUDA card")
SMALL = {"width": 128, "height": 128, "num_inference_steps": 2, "max_sequence_length": 32}
PROMPT = "a red circle on a blue background"
PIXELS = (
    1024 * 1024
)  # what the placements leave room for: the libraries' workspaces fit into it, the pictures are smaller
OUTLINE = ROOT / "models" / "flux-shapes-outline" / "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """No cap of one test, none of its weights and nothing that it compiled is left to the next."""
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()
    gc.collect()
    if ON_CARD:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FLUX.1: on a card so large that a limit is far above what the libraries take of torch's allocator."""
    layers, heads = (6, 16) if ON_CARD else (3, 2)
    return small(
        "dev",
        tmp_path_factory.mktemp("wide"),
        num_layers=layers,
        num_single_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=64,
        axes_dims_rope=(16, 24, 24),
    )


def draw(
    engine: Engine, prompt: str = PROMPT, adapters: tuple[Adapter, ...] = (), **fields: Any
) -> np.ndarray[Any, Any]:
    """The pictures' values, [pictures, height, width, 3]."""
    request, faults, _ = read_request({"input": {**SMALL, "prompt": prompt, "seed": 1, **fields}})
    plan = make_plan(request, faults, engine.model, adapters=adapters, max_pixels=2048 * 2048)
    return np.stack([np.asarray(picture, float) for picture in engine.run(plan).pictures])


def decibels(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """PSNR of values from 0 to 255; infinite where they are the same."""
    error = float(((found - expected) ** 2).mean())
    return 10 * np.log10(255**2 / error) if error else np.inf


def narrow(model: Model, folder: Path, share: float) -> float:
    """A limit in gigabytes: of the way from the least that holds the model to all that it wants, so large a share."""
    work = Work(model.width, model.height, model.num_inference_steps, model.max_sequence_length, PIXELS)
    weights, machine = weights_of(folder, 2 if ON_CARD else 4), Machine("any", 1 << 50, 1 << 50, 1.0, 1.0)
    least, full = (smallest(weights, machine, work, mode) for mode in ("auto", "full"))
    context = context_memory(torch.device("cuda")) if ON_CARD else 0
    return (least + max(share, 0.01) * (full - least) + context) / GB


@contextmanager
def no_room_but(more: int) -> Iterator[None]:
    """Within it torch's allocator gets `more` bytes beside those that it has."""
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@card
@pytest.mark.gpu
def test_the_shipped_model_draws_in_bfloat16_and_tells_its_peak_memory(generate: Callable[..., dict[str, Any]]) -> None:
    response = generate(PROMPT, seed=1)
    (picture,) = opened(response)
    assert (judge.centre_colour(picture), judge.background_colour(picture)) == ("red", "blue")
    assert 0 < response["metadata"]["peak_memory"] < 1e9
    assert generate(PROMPT, seed=1)["images"] == response["images"]


@pytest.mark.parametrize(("mode", "share"), [("modulation_cache", None), ("stream", 0.5), ("auto", 0.5), ("auto", 0.0)])
def test_a_limited_card_gives_the_same_picture(mode: str, share: float | None, wide: Path) -> None:
    """Blocks pass through on a stream of their own, beside the computing."""
    common: dict[str, Any] = {"model_name": str(wide), "compile": False, "max_pixels": PIXELS}
    prompts = ("a red circle on blue", "a green star on white")
    plain = load_engine(Settings(**common))
    expected = [draw(plain, prompt, num_images=2) for prompt in prompts]
    model = plain.model
    del plain  # or its weights would count towards the limit
    gc.collect()
    limit = None if share is None else narrow(model, wide, share)
    engine = load_engine(Settings(**common, memory_mode=mode, memory_limit_gb=limit))
    if ON_CARD:
        assert engine.loaded().placement["device"] == torch.cuda.get_device_name()
        torch.cuda.reset_peak_memory_stats()
    if limit:
        assert engine.loaded().placement["streamed_blocks"]
    assert all(
        (draw(engine, prompt, num_images=2) == each).all() for prompt, each in zip(prompts, expected, strict=True)
    )
    if ON_CARD and limit:
        most = torch.cuda.max_memory_reserved() + context_memory(torch.device("cuda"))
        assert most <= 1.05 * limit * GB, "the context grows a little with the kernels that are first used"


@pytest.mark.parametrize(("kind", "package", "least"), [("fp8", "torchao", 30), ("nf4", "bitsandbytes", 25)])
def test_smaller_weights_draw_nearly_the_same(kind: str, package: str, least: float) -> None:
    if find_spec(package) is None or (kind == "nf4" and not ON_CARD):
        pytest.skip(f"{kind} wants {package}, and nf4 a card")
    expected = draw(load_engine(Settings(model_name="flux-shapes", compile=False)))
    found = draw(load_engine(Settings(model_name="flux-shapes", compile=False, quantization=kind)))
    assert least < decibels(found, expected) < np.inf


def test_an_adapter_counts_for_its_picture_alone() -> None:
    engine = load_engine(Settings(model_name="flux-shapes", compile=False))
    adapter = Adapter("outline", OUTLINE, Lora(path="outline", scale=1.0), "loras")
    before, within, after = draw(engine), draw(engine, adapters=(adapter,)), draw(engine)
    assert (before == after).all()
    assert (before != within).any()


@card
@pytest.mark.gpu
def test_blocks_run_compiled_and_draw_nearly_the_same(tmp_path: Path) -> None:
    common = {"model_name": "flux-shapes", "compile_cache_dir": tmp_path / "compiled"}
    expected = draw(load_engine(Settings(**common, compile=False)))
    engine = load_engine(Settings(**common, compile=True))
    request, faults, _ = read_request({"input": {**SMALL, "prompt": "warm-up"}})
    engine.warm_up(make_plan(request, faults, engine.model, max_pixels=PIXELS), 4)
    calls, compiled = block_calls(engine._pipeline.transformer, lambda: draw(engine))
    assert calls == compiled > 0
    assert decibels(draw(engine), expected) > 30


@card
@pytest.mark.gpu
@pytest.mark.skipif(MAJOR < 8, reason="cuDNN's attention wants Ampere or later")
def test_cudnn_s_attention_draws_nearly_the_same() -> None:
    native, cudnn = (
        draw(load_engine(Settings(model_name="flux-shapes", compile=False, attention_backend=backend)))
        for backend in ("native", "_native_cudnn")
    )
    assert decibels(cudnn, native) > 30


@card
@pytest.mark.gpu
def test_a_picture_that_is_too_large_is_refused_and_the_next_one_is_as_before() -> None:
    engine = load_engine(Settings(model_name="flux-shapes", compile=False))
    before = draw(engine)
    with no_room_but(32 << 20), pytest.raises(OutOfMemory, match="2048x2048 with 1 image"):
        draw(engine, width=2048, height=2048)
    assert (draw(engine) == before).all()


@card
@pytest.mark.gpu
def test_the_ladder_goes_to_its_end(tmp_path: Path) -> None:
    """All that is left out wants a package or a setting that is not here, and nothing falls back."""
    file = tmp_path / "gpu.json"
    gpu.main(["--models", "flux-shapes", "--output", str(file)])
    rows = {row["way"]: row for row in json.loads(file.read_text())["models"]["flux-shapes"]["ways"]}
    assert list(rows) == [way.name for way in WAYS]
    assert {name: row["error"] for name, row in rows.items() if "error" in row} == {}
    assert {row["left_out"].split()[1] for row in rows.values() if "left_out" in row} <= {"wants", "version"}
    assert "fell_back" not in rows[AS_SERVED]
    for name in ("adaptive norms ahead", "diffusers' model offload"):
        assert rows[name].get("max_difference", 0) == 0, "what saves memory changes no byte"
