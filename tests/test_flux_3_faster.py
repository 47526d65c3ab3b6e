"""What makes FLUX.3 faster or smaller: guessed steps, compiled blocks with slots, other weights, other attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from src.catalog import SPEEDS
from src.engine import Engine, load_engine
from src.engine.acceleration import attention_of
from src.engine.block_timing import lists_of_blocks
from src.engine.quantization import _chosen
from src.plan.plan import Plan
from src.settings import Settings
from tests.conftest import base64_of
from tests.small_models import small
from tests.test_adapter_layouts import Ask
from tests.test_compiled import Backend, compiling, fresh_compiler  # noqa: F401 - a fixture
from tests.test_family import PICTURE

EDIT = {"init_image": base64_of(PICTURE)}
LISTS = ["mode_blocks.image", "mode_blocks.image_cond", "txt_mode_blocks", "single_transformer_blocks"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("flux_3")
    return {family: small(family, folder / family) for family in ("flux.3", "flux.3-base")}


@pytest.fixture(scope="module")
def engines(folders: dict[str, Path]) -> dict[str, Engine]:
    return {family: load_engine(Settings(model_name=str(folder))) for family, folder in folders.items()}


class Calls:
    """Counts how often blocks compute, and the last layer."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks = 0
        for blocks in lists_of_blocks(engine.transformer).values():
            for block in blocks:
                monkeypatch.setattr(block, "forward", self._noting(block.forward))

    def _noting(self, forward: Any) -> Any:
        def run(*inputs: Any, **named: Any) -> Any:
            self.blocks += 1
            return forward(*inputs, **named)

        return run


@pytest.mark.parametrize("family", ["flux.3", "flux.3-base"])
def test_guessed_steps_compute_no_block_and_leave_nothing(
    family: str, engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ask, calls = Ask(engines[family], tmp_path), Calls(engines[family], monkeypatch)
    assert list(lists_of_blocks(engines[family].transformer)) == LISTS
    for more in ({}, EDIT):
        fields: dict[str, Any] = {"num_inference_steps": 9, "init_image": None, **more}
        exact = ask.pixels(**fields)
        every, calls.blocks = calls.blocks, 0
        fast = ask.pixels(**fields, speed="fast")
        guessed, calls.blocks = calls.blocks, 0
        row = SPEEDS["fast"]
        assert row is not None
        computed = sum(
            step < row.computed_first or (step - row.computed_first) % row.interval == 0 for step in range(9)
        )
        assert guessed == every * computed // 9
        assert (ask.pixels(**fields, speed="fast") == fast).all()
        assert (ask.pixels(**fields) == exact).all()
        assert (fast != exact).any()
        calls.blocks = 0


def test_guessed_steps_are_those_of_diffusers_lite_mode(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where that knows the blocks: on FLUX.1."""
    engine = load_engine(Settings(model_name="flux-shapes"))
    ask = Ask(engine, tmp_path)
    fields = {"num_inference_steps": 8, "speed": "fast"}
    ours = ask.pixels(**fields)

    @contextmanager
    def lite(pipeline: Any, plan: Plan) -> Iterator[None]:
        row = SPEEDS[plan.sampling.speed]
        assert row is not None
        pipeline.transformer.enable_cache(
            diffusers.TaylorSeerCacheConfig(
                cache_interval=row.interval,
                disable_cache_before_step=row.computed_first,
                taylor_factors_dtype=pipeline.transformer.dtype,
                use_lite_mode=True,
            )
        )
        yield
        pipeline.transformer.disable_cache()

    monkeypatch.setattr("src.engine.denoise.step_cache", lite)
    assert (ask.pixels(**fields) == ours).all()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_are_compiled_once_a_class_with_slots_for_adapters(folders: dict[str, Path], tmp_path: Path) -> None:
    plain, backend = load_engine(Settings(model_name=str(folders["flux.3"]))), Backend()
    engine = compiling(load_engine(Settings(model_name=str(folders["flux.3"]))), tmp_path / "none", backend, ranks=(8,))
    down = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    names = (
        "mode_blocks.image_cond.0.attn.to_q",
        "single_transformer_blocks.0.attn.to_v",
        "txt_mode_blocks.0.attn.to_k",
    )
    tensors = {
        f"transformer.{name}.lora_{part}.weight": (down if part == "A" else down.T.contiguous()) / 3
        for name in names
        for part in "AB"
    }
    save_file(tensors, tmp_path / "adapter.safetensors")
    here, there = (Ask(each, tmp_path) for each in (engine, plain))

    def warm_up() -> None:
        here.pixels(init_image=None)
        here.pixels()

    assert engine._compiled is not None
    engine._compiled.warm_up(warm_up)
    assert engine._compiled.state == "compiled"
    made = backend.made
    for fields in ({}, {"init_image": None}, {"width": 96, "height": 64}):
        drawn = []
        for adapter in ({}, {"lora_path": "adapter.safetensors", "lora_scale": 1}):
            ran = backend.run
            one, other = here.pixels(**fields, **adapter), there.pixels(**fields, **adapter)
            assert np.abs(one - other).max() <= 1, (fields, adapter)
            assert backend.run > ran, (fields, adapter)
            drawn.append(one)
        assert np.abs(drawn[0] - drawn[1]).max() > 3, "or nothing was proven"
    assert backend.made == made


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_smaller_weights_are_those_of_all_blocks(
    kind: str, tmp_path: Path, engines: dict[str, Engine], folders: dict[str, Path]
) -> None:
    whole = engines["flux.3"].transformer
    chosen = _chosen(whole)
    assert all(any(name.startswith(f"{kind}.") for kind in LISTS) for name in chosen)
    engine = load_engine(Settings(model_name=str(folders["flux.3"]), quantization=kind, quantized_dir=tmp_path))
    answer = Ask(engine, tmp_path).answer()
    assert answer["status"] == "success", answer
    assert answer["metadata"]["quantization"] == kind
    again = load_engine(Settings(model_name=str(folders["flux.3"]), quantization=kind, quantized_dir=tmp_path))
    assert Ask(again, tmp_path).answer()["images"] == answer["images"]


def test_another_attention_is_that_of_all_blocks(folders: dict[str, Path], tmp_path: Path) -> None:
    engine = load_engine(Settings(model_name=str(folders["flux.3"]), attention_backend="_native_math"))
    assert attention_of(engine.transformer) == "_native_math"
    backends = {
        module.processor._attention_backend for module in engine.transformer.modules() if hasattr(module, "processor")
    }
    assert len(backends) == 1
    assert Ask(engine, tmp_path).answer()["status"] == "success"
