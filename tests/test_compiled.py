"""Compiled blocks: how many graphs there are, what runs them, and what runs as it is."""

from __future__ import annotations

import gc
import logging
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import torch.fx.experimental._config as shapes_config
from peft.utils.integrations import init_empty_weights
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.adapters import SLOT, one_linear
from handler import respond
from src.engine import Engine
from src.engine.acceleration import Compiled
from src.engine.block_timing import lists_of_blocks
from src.engine.lora_slots import SLOTS, LoraSlots, SlotLinear
from src.errors import DeviceFailed
from src.job import Job
from src.plan.decisions import decide_calls
from src.serving.loop import Worker
from src.settings import ROOT, Settings
from src.weights.placement import block_of
from tests.conftest import base64_of, opened
from tests.fakes import never
from tests.small_models import SHAPES, all_placements, weights_of
from tests.test_acceleration import OUTLINE, PROMPT, ask, decibels, drawn, load, plan


@pytest.fixture(scope="module")
def plain() -> Engine:
    return load()


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


class Backend:
    """A compiler that leaves graphs as they are; counts how often those of blocks and of decoders are made and run."""

    def __init__(self) -> None:
        self.made = self.run = self.decoders_made = self.decoders_run = 0
        self.graphs: list[torch.fx.GraphModule] = []  # of blocks

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        decodes = any("conv" in str(node.target) for node in graph.graph.nodes)
        self.made += not decodes
        self.decoders_made += decodes
        self.graphs += [] if decodes else [graph]

        def run(*inputs: torch.Tensor) -> Any:
            self.run += not decodes
            self.decoders_run += decodes
            return graph(*inputs)

        return run


def compiling(engine: Engine, kept: Path, backend: Callable[..., Any], ranks: tuple[int, ...] = ()) -> Engine:
    """The same model, whose blocks are compiled by `backend` while it is warmed up."""
    pipeline, held = engine._pipeline, engine._placed_pipeline
    cached = bool(held.placement and held.placement.modulation_cache)
    slots = LoraSlots(pipeline.transformer, ranks, held.device, modulation=not cached)
    compiled = Compiled(pipeline, kept, slots, backend)
    return Engine(pipeline, engine.model, None, placed_pipeline=held, compiled=compiled, choice=engine._ledger._choice)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_are_compiled_while_warmed_up_and_never_again(plain: Engine, tmp_path: Path) -> None:
    held, backend = load(memory_limit_gb=0.1, memory_mode="modulation_cache", max_pixels=256 * 256), Backend()
    engine = compiling(held, tmp_path / "no" / "kept.bin", backend)
    before = drawn(engine)
    assert backend.made == 0, "nobody waits who did not ask for a warm-up"
    engine.warm_up(plan(engine, num_inference_steps=2), 8)
    made = backend.made
    assert 2 <= made <= 4, "for each kind of block one, or one for the first and one for those that follow"
    assert backend.decoders_made == 1

    def compiled_calls(**fields: Any) -> int:
        ran = backend.run
        assert decibels(drawn(engine, **fields), drawn(plain, **fields)) > 90
        return backend.run - ran

    blocks = 8 * 7
    assert np.array_equal(drawn(engine), before)
    assert compiled_calls() == blocks
    assert compiled_calls(width=256, height=192) == blocks, "another size"
    assert compiled_calls(num_inference_steps=3, scheduler="unipc") == 3 * 7
    assert compiled_calls(**OUTLINE) == 0, "without slots blocks run as they are"
    assert compiled_calls(**{**OUTLINE, "lora_scale": 0.5}) == 0
    assert compiled_calls() == blocks, "adapters were put aside"
    assert backend.made == made
    assert backend.decoders_made == 1
    assert backend.decoders_run >= 5, "pictures of the size that was warmed up"


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", ["full", "modulation_cache"])
def test_compiled_blocks_fit_wherever_their_weights_go_later(mode: str, plain: Engine, tmp_path: Path) -> None:
    held, backend = load(memory_limit_gb=0.1, memory_mode=mode, max_pixels=256 * 256), Backend()
    engine = compiling(held, tmp_path / "no" / "kept.bin", backend)
    engine.warm_up(plan(engine, num_inference_steps=2), 8)
    made, placed_pipeline = backend.made, engine._placed_pipeline
    alike = [found for found in all_placements(weights_of(SHAPES)) if found.modulation_cache == (mode != "full")]
    for found in [next(each for each in alike if len(each.streamed["transformer"]) == count) for count in (3, 7, 0)]:
        ran = backend.run
        assert placed_pipeline.arrange(found)
        assert decibels(drawn(engine), drawn(plain)) > 90
        assert backend.run - ran == 8 * 7, found.summary()
    assert backend.made == made


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_batches_are_compiled_too_where_they_are_drawn(tmp_path: Path) -> None:
    backend = Backend()
    engine = compiling(load(), tmp_path / "no" / "kept.bin", backend)
    worker = Worker(never, Settings(batch_size=2, warmup_sizes=((64, 64),)))
    worker.warm_up(engine)
    worker.close()
    made = backend.made
    for batch_size, calls in ((2, 8 * 7), (1, 2 * 8 * 7)):
        ran = backend.run
        event = {"input": {"prompt": PROMPT, "seed": 1, "num_images": 2}}
        assert respond(event, Job(), partial(Settings, batch_size=batch_size), lambda: engine)["status"] == "success"
        assert backend.run - ran == calls
    assert backend.made == made


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiler_that_fails_costs_no_picture(
    plain: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("gcc: not found")

    engine = compiling(load(), tmp_path / "kept.bin", broken)
    with caplog.at_level(logging.WARNING, "worker"):
        engine.warm_up(plan(engine, num_inference_steps=2), 8)
    assert "torch.compile failed" in caplog.text
    assert "gcc: not found" in caplog.text
    assert np.array_equal(drawn(engine), drawn(plain))
    assert not (tmp_path / "kept.bin").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_memory_that_only_compiling_lacks_costs_no_start_and_is_not_tried_again(plain: Engine, tmp_path: Path) -> None:
    tried = []

    def hungry(*_: Any) -> Any:
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = compiling(load(), tmp_path / "kept.bin", hungry)
    for size in (64, 128):
        engine.warm_up(plan(engine, num_inference_steps=2, width=size), 8)
    assert len(tried) <= 2, "freed and tried once more"
    assert np.array_equal(drawn(engine), drawn(plain))


def compiled_blocks(kept: Path, ranks: tuple[int, ...] = ()) -> Compiled:
    """Of no blocks at all."""
    return compiled_decoder(torch.nn.Module(), kept, ranks=ranks)


def compiled_decoder(
    decoder: torch.nn.Module, kept: Path, backend: str | Callable[..., Any] = "inductor", ranks: tuple[int, ...] = ()
) -> Compiled:
    """Of no blocks, and of this decoder."""
    transformer = SimpleNamespace(
        transformer_blocks=[], single_transformer_blocks=[], requires_grad_=lambda _: None, dtype=torch.float32,
        named_modules=torch.nn.Module().named_modules,
    )  # fmt: skip
    pipeline = SimpleNamespace(transformer=transformer, vae=SimpleNamespace(decoder=decoder))
    return Compiled(pipeline, kept, LoraSlots(transformer, ranks, torch.device("cpu")), backend)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "error", [AssertionError("an assumption of inductor's"), KeyError("s0"), NotImplementedError()]
)
def test_whatever_a_compiler_raises_costs_no_start(error: Exception, tmp_path: Path) -> None:
    tried = []

    def draw() -> None:
        tried.append(1)
        if len(tried) == 1:
            raise error

    compiled = compiled_blocks(tmp_path / "kept.bin")
    for times in (2, 3):
        compiled.warm_up(draw)
        assert len(tried) == times


def compiled_layer(kept: Path, backend: Callable[..., Any]) -> tuple[Compiled, Callable[[], Any]]:
    """A decoder of one layer, and what calls it."""
    layer = torch.nn.Linear(2, 2)
    return compiled_decoder(layer, kept, backend), lambda: layer(torch.ones(1, 2))


@pytest.mark.usefixtures("fresh_compiler")
def test_the_thread_that_compiles_need_not_be_the_one_that_loaded(tmp_path: Path) -> None:
    seen = set[tuple[int, bool]]()

    def noting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        seen.add((torch._dynamo.config.recompile_limit, shapes_config.use_duck_shape))
        return graph.forward

    compiled, call = compiled_layer(tmp_path / "kept.bin", noting)
    with ThreadPoolExecutor(1) as device:
        device.submit(compiled.warm_up, call).result()
    assert compiled.state == "compiled"
    assert seen == {(256, False)}


@pytest.mark.usefixtures("fresh_compiler")
def test_blocks_that_cannot_be_compiled_for_one_card_leave_those_of_another_compiled(tmp_path: Path) -> None:
    def failing(*_: Any) -> Any:
        raise AssertionError("an assumption of inductor's")

    backend = Backend()
    first, call = compiled_layer(tmp_path / "kept.bin", backend)
    first.warm_up(call)
    second, call_second = compiled_layer(tmp_path / "kept.bin", failing)
    second.warm_up(call_second)
    assert (first.state, second.state.partition(":")[0]) == ("compiled", "failed")
    ran = backend.run
    call_second()
    assert backend.run == ran
    call()
    assert backend.run == ran + 1


@pytest.mark.usefixtures("fresh_compiler")
def test_a_device_that_fails_while_compiling_ends_the_worker(tmp_path: Path) -> None:
    def draw() -> None:
        raise DeviceFailed("it is gone")

    with pytest.raises(DeviceFailed):
        compiled_blocks(tmp_path / "kept.bin").warm_up(draw)


_COMPILING = """
import sys, torch
from tests.test_acceleration import load, plan
engine = load(compile=True, compile_cache_dir=sys.argv[1], lora_target_ranks=())
engine.warm_up(plan(engine, num_inference_steps=2), 8)
engine.keep_compiled()
from torch._dynamo.utils import counters
print("hits", counters["aot_autograd"]["autograd_cache_hit"], "misses", counters["aot_autograd"]["autograd_cache_miss"])
"""


@pytest.mark.slow
def test_what_was_compiled_is_kept_for_the_next_process(tmp_path: Path) -> None:
    folder = tmp_path / "volume" / "compile-cache"
    folder.parent.mkdir()
    response = []
    for home in ("one", "two"):
        environment = {"PATH": "/usr/bin:/bin", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / home), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(
            [sys.executable, "-c", _COMPILING, str(folder)],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        response.append(run.stdout.split())
    assert len(list(folder.glob("*.bin"))) == 1
    (hits, misses), (later_hits, later_misses) = ((int(words[1]), int(words[3])) for words in response)
    assert (hits, later_hits + later_misses) == (0, misses), response
    assert later_hits > later_misses, "most of it was found"


# Heads of 128 values, and a size of as many tokens as the transformer is wide: equal numbers are no equal things.
WIDTHS = {
    "FLUX.1": (24, (768, 1024)),
    "FLUX.2-klein-4B": (24, (768, 1024)),
    "FLUX.2-klein-9B": (32, (1024, 1024)),
    "FLUX.2-dev": (48, (1024, 1536)),
}
SIZES = ((1024, 1024), (768, 1024), (512, 512), (1344, 768), (1024, 1536))


def test_slots_have_values_while_another_engine_adds_layers() -> None:
    linear = torch.nn.Linear(2, 3)
    with init_empty_weights():  # as PEFT does for the whole process
        slot = SlotLinear(linear, 4, torch.float32, torch.device("cpu"))
    assert not slot.down.is_meta
    assert {name: tuple(each.shape) for name, each in slot.named_parameters(recurse=False)} == {
        "down": (4, 2),
        "up": (4, 3),
    }


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", WIDTHS)
def test_graphs_of_blocks_of_full_size_fit_pictures_of_every_size(name: str, tmp_path: Path) -> None:
    heads, warm = WIDTHS[name]
    layers = {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": heads, "guidance_embeds": True}
    kind = diffusers.FluxTransformer2DModel if name == "FLUX.1" else diffusers.Flux2Transformer2DModel
    with torch.device("meta"):  # shapes are all that graphs are made of
        transformer = kind(**layers).eval()
    backend = Backend()
    pipeline = SimpleNamespace(transformer=transformer, vae=SimpleNamespace(decoder=torch.nn.Module()))
    compiled = Compiled(pipeline, tmp_path / "none", LoraSlots(transformer, (), torch.device("meta")), backend)
    compiled.warm_up(partial(denoise, transformer, warm))
    made = backend.made
    for size in SIZES:
        ran = backend.run
        denoise(transformer, size)
        assert backend.run - ran == 4, size
    assert backend.made == made


def denoise(transformer: Any, size: tuple[int, int]) -> None:
    """One step of a picture of `size`, without values."""
    tokens, words = size[0] * size[1] // 256, 512
    own = {"pooled_projections": (1, 768)} if "pooled_projection_dim" in transformer.config else {}
    ids = 3 if own else 4
    shapes = {
        "hidden_states": (1, tokens, transformer.config.in_channels),
        "encoder_hidden_states": (1, words, transformer.config.joint_attention_dim),
        "timestep": (1,), "guidance": (1,), "img_ids": (tokens, ids), "txt_ids": (words, ids), **own,
    }  # fmt: skip
    with torch.inference_mode():
        transformer(**{name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def lora(file: Path, layers: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Path:
    """An adapter of random values for these layers, by the features that go in and out."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (into, out) in layers.items():
        tensors[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, into, generator=generator) / into**0.5
        tensors[f"transformer.{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.1 / rank**0.5
    save_file(tensors, file)
    return file


def linears(engine: Engine) -> dict[str, tuple[int, int]]:
    return {
        name: (layer.in_features, layer.out_features)
        for name, layer in engine._pipeline.transformer.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("cached", [False, True], ids=["norms in blocks", "norms ahead"])
def test_adapters_of_any_rank_and_layers_run_the_graphs_of_the_warm_up(cached: bool, tmp_path: Path) -> None:
    backend, plain = Backend(), load()
    held = load(memory_limit_gb=0.1, memory_mode="modulation_cache", max_pixels=256 * 256) if cached else load()
    every = linears(held)
    blocks = len(held._pipeline.transformer.transformer_blocks) + len(
        held._pipeline.transformer.single_transformer_blocks
    )
    engine = compiling(held, tmp_path / "none", backend, (4, 16))
    engine.warm_up(plan(engine, num_inference_steps=2), 8)
    made = backend.made

    def asked(*files: Path, steps: int = 2, scale: float = 0.8) -> dict[str, Any]:
        return {
            "loras": [{"path": file.name, "scale": scale} for file in files],
            "num_inference_steps": steps, "width": 64, "height": 64,
        }  # fmt: skip

    def answer(engine: Engine, **fields: Any) -> dict[str, Any]:
        event = {"input": {"prompt": PROMPT, "seed": 1, **fields}}
        return respond(event, Job(), lambda: Settings(lora_dir=tmp_path), lambda: engine)

    without = opened(answer(engine, **asked()))[0]
    for i in range(20):
        some = {name: size for j, (name, size) in enumerate(every.items()) if j % (i % 5 + 1) == 0}
        file = lora(tmp_path / f"{i}.safetensors", some, rank=1 + i % 16, seed=i)
        ran = backend.run
        response = answer(engine, **asked(file))
        assert response["status"] == "success", response
        assert response["metadata"]["warnings"] == []
        assert backend.run - ran == 2 * blocks, "no block ran as it is"
        (here,), (there,) = opened(response), opened(answer(plain, **asked(file)))
        assert decibels(np.asarray(here, float), np.asarray(there, float)) > 60
        assert here.tobytes() != without.tobytes(), "it counts"
    assert backend.made == made

    several = [tmp_path / f"{i}.safetensors" for i in (0, 3, 6)]  # ranks of 1, 4 and 7
    ran = backend.run
    (here,), (there,) = opened(answer(engine, **asked(*several))), opened(answer(plain, **asked(*several)))
    assert backend.run - ran == 2 * blocks
    assert decibels(np.asarray(here, float), np.asarray(there, float)) > 60
    assert opened(answer(engine, **asked()))[0].tobytes() == without.tobytes(), "they were put aside"
    assert backend.made == made


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_what_no_slot_holds_runs_as_it_is_and_is_named(tmp_path: Path) -> None:
    held, plain, backend = load(), load(), Backend()
    engine = compiling(held, tmp_path / "none", backend, (4,))
    engine.warm_up(plan(engine, num_inference_steps=2), 8)
    every = linears(engine)
    first = {name: size for name, size in every.items() if name.startswith("transformer_blocks.0.")}
    outside = {name: size for name, size in every.items() if name in ("x_embedder", "proj_out", "context_embedder")}
    lora(tmp_path / "wide.safetensors", first, rank=5, seed=0)
    lora(tmp_path / "outside.safetensors", outside, rank=5, seed=1)
    dora = load_file(lora(tmp_path / "thin.safetensors", first, rank=2, seed=2))
    magnitudes = {f"transformer.{name}.lora_magnitude_vector": torch.ones(out) for name, (_, out) in first.items()}
    save_file(dora | magnitudes, tmp_path / "dora.safetensors")

    def answer(engine: Engine, *names: str) -> tuple[np.ndarray[Any, Any], list[str]]:
        loras = [{"path": f"{name}.safetensors", "scale": 1} for name in names]
        fields = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 2, "width": 64, "height": 64, "loras": loras}
        response = respond({"input": fields}, Job(), lambda: Settings(lora_dir=tmp_path), lambda: engine)
        assert response["status"] == "success", response
        return np.asarray(opened(response)[0], float), response["metadata"]["warnings"]

    slower = "1 of 7 blocks ran uncompiled, which is slower: adapters have "
    for names, warning in (
        (["wide"], [f"{slower}ranks of 5 together, and LORA_TARGET_RANKS are 4 at most"]),
        (["thin", "wide"], [f"{slower}ranks of 7 together, and LORA_TARGET_RANKS are 4 at most"]),
        (["dora"], [f"{slower}a DoRA's magnitudes"]),
        (["outside"], []),
    ):
        ran = backend.run
        picture, warnings = answer(engine, *names)
        assert warnings == warning
        assert backend.run - ran == 2 * (7 - len(warning))
        assert decibels(picture, answer(plain, *names)[0]) > 60


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_slots_have_memory_only_while_adapters_are_asked_for(tmp_path: Path) -> None:
    backend, plain = Backend(), load()
    engine = compiling(load(), tmp_path / "none", backend, (4, 16))
    engine.warm_up(plan(engine, num_inference_steps=2), 8)
    made, slots, ledger = backend.made, engine._compiled.lora_slots, engine._ledger  # type: ignore[union-attr]
    every = linears(plain)
    features = sum(into + out for name, (into, out) in every.items() if block_of(name))
    for rank in (3, 4, 9, 2):
        lora(tmp_path / f"{rank}.safetensors", every, rank, seed=rank)
        ran = backend.run
        answer = partial(few_steps, tmp_path, f"{rank}.safetensors")
        assert decibels(answer(engine), answer(plain)) > 60
        assert backend.run - ran == 2 * 7
        held = ledger._extras[SLOTS]
        assert held.size == (4 if rank < 5 else 16) * features * 4
    assert backend.made == made
    ask(engine, num_inference_steps=1)
    assert ledger.let_idle_go()
    assert not slots.filled
    assert SLOTS not in ledger.names
    assert all(site.slot is None for site in slots._sites())
    ran = backend.run
    answer = partial(few_steps, tmp_path, "9.safetensors")
    assert decibels(answer(engine), answer(plain)) > 60
    assert backend.run - ran == 2 * 7, "they come back, and fit the same graphs"

    def short(_: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    ask(engine, num_inference_steps=1)
    slots.free()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slots, "_make", short)
        assert decibels(answer(engine), answer(plain)) > 60
    assert engine._adapters.warnings == (
        "blocks ran uncompiled, which is slower: there was no room for the slots of adapters",
    )


def few_steps(folder: Path, adapter: str, engine: Engine) -> np.ndarray[Any, Any]:
    fields = {"prompt": PROMPT, "seed": 1, "num_inference_steps": 2, "width": 64, "height": 64, "lora_path": adapter}
    response = respond({"input": fields}, Job(), lambda: Settings(lora_dir=folder), lambda: engine)
    assert response["status"] == "success", response
    return np.asarray(opened(response)[0], float)


@pytest.mark.usefixtures("fresh_compiler")
def test_slots_that_cannot_be_compiled_leave_the_blocks_compiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled, times = compiled_blocks(tmp_path / "kept.bin", (2, 4)), []

    def draw() -> None:
        times.append(compiled.lora_slots._empty)
        if times[-1] == 4:
            raise KeyError("s0")

    with caplog.at_level(logging.WARNING, "worker"):
        compiled.warm_up(draw)
        compiled.warm_up(draw)
    assert times == [None, 2, 4, None]
    assert (compiled.state, compiled.lora_slots.ranks) == ("compiled", ())
    assert "adapters run uncompiled: LORA_TARGET_RANKS=4: 's0'" in caplog.text


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_what_is_kept_grows_when_more_is_compiled(tmp_path: Path) -> None:
    kept = tmp_path / "volume" / "kept.bin"
    kept.parent.mkdir()

    def more(x: torch.Tensor) -> torch.Tensor:
        return x.cos() + 1

    def less(x: torch.Tensor) -> torch.Tensor:
        return x.sin() - 1

    sizes = []
    for work in ([more], [more, less], [more]):
        torch._dynamo.reset()
        with torch._inductor.utils.fresh_cache(), torch.compiler._cache.CacheArtifactManager.with_fresh_cache():
            compiled = compiled_blocks(kept)
            for each in work:
                compiled.warm_up(partial(torch.compile(each), torch.ones(8)))
            compiled.keep()
        sizes.append(kept.stat().st_size)
    assert sizes[0] < sizes[1] == sizes[2]


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_every_mode_runs_the_graphs_of_the_warm_up(tmp_path: Path) -> None:
    """Some pipelines say None for no arguments of attention, others {}; and a ControlNet's blocks are blocks too."""
    backend = Backend()
    engine = compiling(load(), tmp_path / "none", backend)
    engine.warm_up(plan(engine, num_inference_steps=2), 8)
    made, steps = backend.made, 4
    picture = base64_of(opened(ask(engine))[0])
    white = base64_of(Image.new("L", (128, 128), 255))
    pictures = {"init_image": picture, "mask_image": white, "control_image": picture}
    for mode, row in engine.model.modes.items():
        ran = backend.run
        response = ask(engine, num_inference_steps=steps, **{name: pictures[name] for name in row.needs})
        assert response["metadata"]["mode"] == mode
        calls = decide_calls(steps, row.strength if "strength" in row.takes else None, "euler")[0]
        blocks = 7 + 2 * row.controlnet  # flux-shapes-canny has two
        assert backend.run - ran == calls * blocks, mode
    assert backend.made == made


@pytest.mark.usefixtures("fresh_compiler")
def test_a_controlnet_that_leaves_frees_its_memory_at_once(tmp_path: Path) -> None:
    engine = compiling(load(), tmp_path / "none", Backend())
    ask(engine, num_inference_steps=1, control_image=base64_of(Image.new("RGB", (128, 128))))
    (network,) = engine._controlnets._loaded.values()
    block = weakref.ref(network.transformer_blocks[0])
    del network
    ask(engine, num_inference_steps=1)
    assert block() is not None, "it may be asked for again"
    gc.disable()  # who needs the memory cannot wait for it
    try:
        assert engine._ledger.let_idle_go()
        assert block() is None
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_profile_compiles_each_size_of_the_warm_up_once_more(tmp_path: Path) -> None:
    backend = Backend()
    held = load()
    slots = LoraSlots(held._pipeline.transformer, (), torch.device("cpu"))
    compiled = Compiled(held._pipeline, tmp_path / "none", slots, backend, static_shapes=True)
    engine = Engine(held._pipeline, held.model, None, compiled=compiled)
    plain = load()
    for width in (64, 96):
        engine.warm_up(plan(engine, num_inference_steps=2, width=width, height=64), 8)
    static = [graph for graph in backend.graphs if not has_symbols(graph)]
    assert len(static) >= 4, "two kinds of block for each of two sizes"
    made = backend.made
    for width in (64, 96, 128):
        ran = backend.run
        fields = {"width": width, "height": 64, "num_inference_steps": 2}
        assert decibels(drawn(engine, **fields), drawn(plain, **fields)) > 90
        assert backend.run - ran == 2 * 7
    assert backend.made == made


def has_symbols(graph: torch.fx.GraphModule) -> bool:
    """Whether it was made for shapes that may change."""
    shapes = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
    return any(isinstance(shape, torch.SymInt) for shape in shapes)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_a_warm_up_holds_the_cost_model_against_the_clock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = load(memory_limit_gb=0.1, memory_mode="stream", max_pixels=128 * 128)
    before, choice = drawn(held), held._ledger._choice
    assert choice is not None
    engine = compiling(held, tmp_path / "none", Backend())
    with caplog.at_level(logging.INFO, "worker"):
        for _ in range(2):
            engine.warm_up(plan(engine, num_inference_steps=2), 8)
    (line,) = [record.getMessage() for record in caplog.records if "warm-up" in record.getMessage()]
    placement = held._placed_pipeline.placement
    assert placement is not None
    assert f"and {placement.step_seconds:.4f} s were modelled" in line
    learnt = engine._ledger._choice
    assert learnt is not None
    assert learnt.machine.flops != choice.machine.flops, "the next placement is chosen by what was measured"
    for kind in lists_of_blocks(engine.transformer):
        assert re.search(rf"one of {kind} \d+\.\d\d ms \(\d+\.\d\d ms compiled\)", line)
    assert np.array_equal(drawn(engine), before)


@pytest.mark.slow
def test_a_slot_is_as_exact_as_the_layer_that_it_stands_for() -> None:
    """In bfloat16, against the merged weights in float64: padding adds nothing but zeros."""
    for rank in (1, 20, SLOT):
        found = one_linear(rank)
        assert found["slot"] < 1.02 * found["PEFT"]
        assert found["slot"] < 2 * found["the layer's own"]
