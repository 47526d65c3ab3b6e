"""Weights where a placement wants them: the same pictures to the byte, and absent where they are said to be absent."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from handler import respond
from src.catalog import get_model
from src.engine import Engine, load_engine
from src.engine.offload import Home, OffloadedWeights, Offloader, _Slot
from src.engine.placed_pipeline import PlacedPipeline
from src.errors import ModelUnavailable
from src.job import Job, Progress
from src.plan.plan import make_plan
from src.request.reading import read_request
from src.settings import ROOT, Settings
from src.weights.placement import Placement, Weights, is_modulation
from tests.small_models import all_placements, small, weights_of
from training.scenes import every_prompt

SHAPES = ROOT / "models" / "flux-shapes"
CPU = torch.device("cpu")
PROMPTS = [prompt for prompt, _ in every_prompt()][::13][:20]
SCHEDULERS = ("euler", "dpmpp_2m", "heun")
SMALL = {"width": 64, "height": 64, "num_inference_steps": 2}
# Ways to place flux-shapes: adaptive norms ahead, how many of the transformer's 7 and T5's 2 blocks stream.
WAYS = {
    "modulation_cache": (True, 0, 0),
    "streaming": (False, 7, 2),
    "some_streaming": (False, 2, 0),
    "mixture": (True, 3, 1),
    "all_away": (True, 7, 2),
}


@cache
def weights() -> Weights:
    return weights_of(SHAPES)


def placement(way: tuple[bool, int, int]) -> Placement:
    return next(
        found
        for found in all_placements(weights())
        if way
        == (found.modulation_cache, len(found.streamed["transformer"]), len(found.streamed.get("text_encoder_2", ())))
    )


def engine_of(way: str) -> tuple[Engine, Placement | None]:
    pipeline = diffusers.FluxPipeline.from_pretrained(SHAPES, dtype=torch.float32)
    model = get_model("flux-shapes")
    found = placement(WAYS[way]) if way in WAYS else None
    return Engine(pipeline, model, None, placed_pipeline=PlacedPipeline(pipeline, found, CPU)), found


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter in it that changes adaptive norms, attention, and what stands beside the blocks."""
    folder = tmp_path_factory.mktemp("loras")
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(SHAPES / "transformer")
    generator, layers = torch.Generator().manual_seed(0), {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and (is_modulation(name) or name.endswith(("attn.to_q", "x_embedder"))):
            for half, shape in (("A", (2, layer.in_features)), ("B", (layer.out_features, 2))):
                layers[f"transformer.{name}.lora_{half}.weight"] = 0.2 * torch.randn(shape, generator=generator)
    save_file(layers, folder / "everywhere.safetensors")
    return folder


def asking(engine: Engine, folder: Path) -> Callable[..., list[str]]:
    settings = Settings(lora_dir=folder, lora_cache_dir=folder / "cache")

    def ask(prompt: str, *, adapter: bool = False, **fields: Any) -> list[str]:
        if adapter:
            fields |= {"lora_path": "everywhere.safetensors", "lora_scale": 0.9}
        event = {"input": {"prompt": prompt, "seed": 5, **fields}}
        response = respond(event, Job(), lambda: settings, lambda: engine)
        assert response["status"] == "success", response
        images: list[str] = response["images"]
        return images

    return ask


def weights_in(engine: Engine) -> list[nn.Parameter]:
    return [w for name in weights().networks for w in getattr(engine._pipeline, name).parameters()]


def absent(of: Iterable[nn.Parameter]) -> int:
    """Bytes of the weights that take no memory."""
    return sum(w.nbytes for w in of if w.untyped_storage().nbytes() <= w.itemsize < w.nbytes)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_same_bytes_whatever_lives_where(way: str, adapters: Path) -> None:
    plain, engine = asking(engine_of("plain")[0], adapters), asking(engine_of(way)[0], adapters)
    for scheduler, adapter in itertools.product(SCHEDULERS, (False, True)):
        wish: dict[str, Any] = {"scheduler": scheduler, "adapter": adapter, "num_images": 1 + adapter}
        assert engine(PROMPTS[0], **wish) == plain(PROMPTS[0], **wish)
    assert plain(PROMPTS[0], adapter=True) != plain(PROMPTS[0]), "or nothing was shown"


@pytest.mark.slow
def test_the_plain_way_is_diffusers_itself_also_for_prompts_that_are_remembered() -> None:
    engine, _ = engine_of("plain")
    pipeline = diffusers.FluxPipeline.from_pretrained(SHAPES, dtype=torch.float32)
    PlacedPipeline(pipeline, None, CPU)  # weights begin where ours do
    pipeline.set_progress_bar_config(disable=True)
    for scheduler in SCHEDULERS:
        for prompt in PROMPTS * 2:
            request, faults, _ = read_request({"input": {"prompt": prompt, "seed": 5, "scheduler": scheduler, **SMALL}})
            plan = make_plan(request, faults, engine.model, max_pixels=128 * 128)
            (ours,) = engine.run(plan).pictures
            pipeline.scheduler = engine._pipeline.scheduler
            with torch.inference_mode():
                generator = torch.Generator().manual_seed(5)
                (theirs,) = pipeline(prompt, max_sequence_length=32, generator=generator, **SMALL).images
            assert ours.tobytes() == theirs.tobytes(), (scheduler, prompt)
        assert len(engine._prompts._remembered) == len(PROMPTS)


@pytest.mark.parametrize("heads", [2, 4, 6])
def test_the_same_bytes_for_models_of_any_width_wherever_their_files_begin(heads: int, tmp_path: Path) -> None:
    """A safetensors file's tensors are mapped from odd addresses, where some processors' products round otherwise."""
    folder = small("dev", tmp_path / "m", num_attention_heads=heads)
    plain = load_engine(Settings(model_name=str(folder)))
    least = min(all_placements(weights_of(folder)), key=lambda found: found.resident)
    thrifty = load_engine(Settings(model_name=str(folder)))
    thrifty._placed_pipeline = PlacedPipeline(thrifty._pipeline, least, CPU)
    for prompt in PROMPTS[:4]:
        event = {"input": {"prompt": prompt, "seed": 1, "max_sequence_length": 32, **SMALL}}
        one, other = (respond(event, Job(), Settings, partial(itemgetter(0), [held])) for held in (plain, thrifty))
        assert one["images"] == other["images"]


@pytest.mark.slow
def test_the_same_bytes_over_many_prompts(adapters: Path) -> None:
    plain = asking(engine_of("plain")[0], adapters)
    engines = {
        way: asking(engine_of(way)[0], adapters) for way in ("modulation_cache", "streaming", "mixture", "all_away")
    }
    assert len(set(PROMPTS)) == 20
    for adapter, scheduler, prompt, count in itertools.product((False, True), SCHEDULERS, PROMPTS, (1, 4)):
        wish: dict[str, Any] = {"scheduler": scheduler, "adapter": adapter, "num_images": count, **SMALL}
        expected = plain(prompt, **wish)
        for way, engine in engines.items():
            assert engine(prompt, **wish) == expected, (way, prompt, wish)


def test_with_guidance_away_from_a_prompt_and_in_batches(adapters: Path) -> None:
    wish = {"negative_prompt": "a blue square", "true_cfg_scale": 3, "num_inference_steps": 4}
    plain, engine = (asking(engine_of(way)[0], adapters) for way in ("plain", "mixture"))
    assert engine(PROMPTS[1], **wish) == plain(PROMPTS[1], **wish)
    assert engine(PROMPTS[1]) == plain(PROMPTS[1])
    event = {"input": {"prompt": PROMPTS[2], "seed": 1, "num_images": 4}}
    pictures = [
        [
            respond(event, Job(), settings, partial(itemgetter(0), engine_of(way)))
            for settings in (lambda: Settings(batch_size=4), Settings)
        ]
        for way in ("plain", "mixture")
    ]
    assert [each["images"] for each in pictures[0]] == [each["images"] for each in pictures[1]]


@pytest.mark.parametrize("way", WAYS)
def test_what_the_placement_says_is_absent_is_absent(way: str, adapters: Path) -> None:
    engine, found = engine_of(way)
    assert found is not None
    held = weights_in(engine)  # before adapters join them

    def check() -> None:
        assert absent(held) == found.offloaded
        assert sum(w.nbytes for w in held) - found.offloaded == found.resident

    check()
    if found.modulation_cache:
        linears = [each for name, each in engine._pipeline.transformer.named_modules() if is_modulation(name)]
        assert len(linears) == 2 * 2 + 5 + 1
        assert all(absent(layer.parameters()) == sum(w.nbytes for w in layer.parameters()) for layer in linears)
    ask = asking(engine, adapters)
    during: list[int] = []
    event = {"input": {"prompt": PROMPTS[0], "seed": 1}}

    def look(progress: Progress) -> None:
        if progress.phase == "denoise":
            during.append(absent(held))

    assert respond(event, Job(on_progress=look), Settings, lambda: engine)["status"] == "success"
    assert set(during) == {found.offloaded}, "between two steps too"
    check()
    ask(PROMPTS[0], adapter=True)
    check()
    offloader = engine._placed_pipeline._offloader
    assert offloader is not None
    assert sum(slot.memory.nbytes for slot in offloader._slots) <= found.slots + 2 * 256 * 40, "a little for alignment"


def test_a_stopped_or_failed_picture_leaves_the_next_one_as_it_was(adapters: Path) -> None:
    engine, found = engine_of("mixture")
    assert found is not None
    held, ask = weights_in(engine), asking(engine, adapters)
    before = ask(PROMPTS[3])

    class Stop(Exception):
        pass

    for failing in ("step", "block"):
        hook = None
        if failing == "block":

            def fail(*_: Any) -> None:
                raise RuntimeError("in the middle of a block")

            hook = engine._pipeline.transformer.transformer_blocks[0].ff.register_forward_hook(fail)

        def stop(progress: Progress) -> None:
            if progress.phase == "denoise" and progress.step == 3:
                raise Stop

        event = {"input": {"prompt": PROMPTS[4], "seed": 1, "lora_path": "everywhere.safetensors"}}
        answer = respond(event, Job(on_progress=stop), lambda: Settings(lora_dir=adapters), lambda: engine)
        assert answer["status"] == "error"
        if hook:
            hook.remove()
        assert absent(held) == found.offloaded
        assert ask(PROMPTS[3]) == before


def test_weights_go_where_another_placement_wants_them_between_two_pictures(adapters: Path) -> None:
    engine, plain = engine_of("mixture")[0], asking(engine_of("plain")[0], adapters)
    placed_pipeline, ask, held = engine._placed_pipeline, asking(engine, adapters), weights_in(engine)
    expected = {adapter: plain(PROMPTS[0], adapter=adapter) for adapter in (False, True)}
    every = [placement(way) for way in WAYS.values()]
    for number, found in enumerate((*every, every[1], *every[::-1])):
        assert placed_pipeline.arrange(found)
        assert absent(held) == found.offloaded
        adapter = number % 2 == 0
        assert ask(PROMPTS[0], adapter=adapter) == expected[adapter], found.summary()
        assert absent(held) == found.offloaded


def test_what_finds_no_room_on_its_way_back_stays_away(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, found = engine_of("all_away")
    assert found is not None
    held, ask = weights_in(engine), asking(engine, adapters)
    before, come_back, came = ask(PROMPTS[0]), Home.come_back, 0

    def short(home: Home) -> None:
        nonlocal came
        came += 1
        if came > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        come_back(home)

    wanted = placement(WAYS["some_streaming"])
    with monkeypatch.context() as patch:
        patch.setattr(Home, "come_back", short)
        assert not engine._placed_pipeline.arrange(wanted)
    assert absent(held) == found.offloaded
    assert engine._placed_pipeline.placement is found
    assert ask(PROMPTS[0]) == before
    assert engine._placed_pipeline.arrange(wanted)
    assert absent(held) == wanted.offloaded
    assert ask(PROMPTS[0]) == before


def test_what_cannot_leave_changes_no_picture(adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, found = engine_of("some_streaming")
    assert found is not None
    held, ask, placed_pipeline = weights_in(engine), asking(engine, adapters), engine._placed_pipeline
    before, leave, wanted = ask(PROMPTS[0]), Home.leave, placement(WAYS["all_away"])
    leaving = [home for home in placed_pipeline._wanted(wanted) if home.memory is None]

    def short(home: Home) -> None:
        if home.memory is None and [each.memory for each in leaving].count(None) == 1:  # the last
            raise MemoryError("the host's memory is full")
        leave(home)

    with monkeypatch.context() as patch:
        patch.setattr(Home, "leave", short)
        with pytest.raises(MemoryError):
            placed_pipeline.arrange(wanted)
    assert found.offloaded < absent(held)
    assert ask(PROMPTS[0]) == before
    assert placed_pipeline.arrange(wanted)
    assert absent(held) == wanted.offloaded
    assert ask(PROMPTS[0]) == before


def test_an_adaptive_norm_outside_of_blocks_may_be_the_only_one_that_left(
    adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, found = engine_of("some_streaming")
    assert found is not None
    ask, placed_pipeline = asking(engine, adapters), engine._placed_pipeline
    before, home = ask(PROMPTS[0]), placed_pipeline._modulation["norm_out.linear"]
    monkeypatch.setattr(placed_pipeline, "_wanted", lambda _: placed_pipeline._away | {home})
    assert placed_pipeline.arrange(found)
    assert absent(weights_in(engine)) > found.offloaded
    assert ask(PROMPTS[0]) == before


def test_text_encoders_that_found_no_room_on_their_way_back_are_not_said_to_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine, _ = engine_of("some_streaming")  # of the transformer alone
    assert engine._placed_pipeline.text_encoders_stay

    def short(_: Home) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Home, "come_back", short)
        assert not engine._placed_pipeline.arrange(
            replace(placement(WAYS["streaming"]), streamed={"transformer": (0,), "text_encoder_2": (0, 1)})
        )
    assert not engine._placed_pipeline.text_encoders_stay


@pytest.mark.parametrize("roomy", [True, False])
def test_homes_are_kept_where_the_host_has_room_for_them(roomy: bool) -> None:
    engine, found = engine_of("all_away")
    assert found is not None
    placed_pipeline, least = engine._placed_pipeline, placement(WAYS["some_streaming"])
    homes = [block.own for blocks in placed_pipeline._blocks.values() for block in blocks]
    kept = [home.memory for home in homes if home.memory is not None]
    machine = replace(least.machine, host_memory=least.machine.host_memory if roomy else least.offloaded)
    assert placed_pipeline.arrange(replace(least, machine=machine))
    assert len([home for home in homes if home.memory is not None]) == (len(kept) if roomy else 2)
    assert placed_pipeline.arrange(found)
    again = [home.memory for home in homes if home.memory is not None]
    assert [a is b for a, b in zip(again, kept, strict=True)].count(True) == (len(kept) if roomy else 2)


def test_the_settings_decide_and_describe_tells() -> None:
    engine = load_engine(Settings(model_name="flux-shapes", memory_mode="modulation_cache", max_pixels=128 * 128))
    summary = engine.loaded().placement
    assert (summary["mode"], summary["device"], summary["modulation_cache"]) == ("modulation_cache", "the CPU", True)
    assert summary["in_host_memory_gb"] > 0
    limited = load_engine(Settings(model_name="flux-shapes", memory_limit_gb=0.03, max_pixels=128 * 128))
    summary = limited.loaded().placement
    assert summary["memory_gb"] == 0.03
    assert summary["expected_peak_gb"] <= 0.03
    assert summary["streamed_blocks"]
    with pytest.raises(ModelUnavailable, match=r"flux-shapes: its weights take 0\.02\d GB, and with MEMORY_MODE=full"):
        load_engine(Settings(model_name="flux-shapes", memory_mode="full", memory_limit_gb=0.01))


def test_offload_as_diffusers_does_it_gives_the_same_picture(adapters: Path) -> None:
    engine = load_engine(Settings(model_name="flux-shapes", memory_mode="model_offload", memory_limit_gb=1))
    ask, plain = asking(engine, adapters), asking(engine_of("plain")[0], adapters)
    for fields in ({}, {"init_image": ask(PROMPTS[1])[0]}, {}):
        assert ask(PROMPTS[0], **fields) == plain(PROMPTS[0], **fields)


def test_offload_reaches_a_controlnet_in_every_request(adapters: Path) -> None:
    engine = load_engine(Settings(model_name="flux-shapes", memory_mode="model_offload", memory_limit_gb=1))
    ask = asking(engine, adapters)
    sent = ask(PROMPTS[1])[0]
    for prompt in PROMPTS[:3]:
        ask(prompt, control_image=sent, preprocess=True, num_inference_steps=2)
        assert hasattr(engine._views["FluxControlNetPipeline"].controlnet, "_hf_hook")


class Doubling(nn.Module):
    """A chain of blocks, and what was in memory when each was at work."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_two_slots_carry_any_number_of_blocks_and_the_next_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    chain, x = Doubling(5), torch.ones(1, 8)
    expected = chain(x)
    offloader = Offloader(CPU)
    for block in chain.blocks:
        offloader.stream(block, Home(block.parameters(), CPU))
    assert sum(weights.size for weights in offloader._offloaded) == 5 * 256
    for _ in range(2):  # the first time nobody knows what comes next
        assert torch.equal(chain(x), expected)
    assert len(offloader._slots) == 2
    fills: list[OffloadedWeights] = []
    fill = _Slot.fill

    def noted(slot: _Slot, weights: OffloadedWeights) -> None:
        fills.append(weights)
        fill(slot, weights)

    monkeypatch.setattr(_Slot, "fill", noted)
    assert torch.equal(chain(x), expected)
    assert fills == [*offloader._offloaded[1:], offloader._offloaded[0]], "each came once, before its turn"
