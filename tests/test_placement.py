"""Where weights are to live: models of full size by their configurations, cards from 8 to 141 GB."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import pytest

from benchmarks.full_size import FULL_SIZE, weigh
from src.catalog import MEMORY_MODES, get_model
from src.weights.placement import (
    GB,
    DoesNotFit,
    Machine,
    Network,
    Placement,
    Weights,
    Work,
    block_of,
    choose_placement,
    evenly,
    is_modulation,
    placements,
    smallest,
)

CARDS = (8, 10, 12, 16, 20, 24, 32, 40, 48, 80, 141)
EXACT = ("auto", "full", "modulation_cache", "stream", "model_offload", "sequential_offload")


def card(gigabytes: float, host: float = 160) -> Machine:
    """About as fast as such cards are: an RTX 4090 behind PCIe 4, an H100 behind PCIe 5."""
    flops, bandwidth = (7e14, 5e10) if gigabytes >= 80 else (1.5e14, 2.5e10)
    return Machine(f"a card of {gigabytes} GB", int(gigabytes * GB), int(host * GB), flops, bandwidth)


@cache
def weights_of(name: str) -> Weights:
    return weigh(name)


def work_of(name: str, max_pixels: int = 1024 * 1024) -> Work:
    model = get_model(name)
    return Work(model.width, model.height, model.num_inference_steps, model.max_sequence_length, max_pixels)


def on_the_card(weights: Weights, placement: Placement) -> int:
    """Bytes of the weights that stay, counted one by one."""
    total = 0
    for name, part in weights.networks.items():
        away = placement.streamed.get(name, ())
        for index, (block, size) in enumerate(part.blocks.items()):
            total += 0 if index in away else size
            if not (index in away or placement.modulation_cache):
                total += part.modulation.get(block, 0)
        total += part.outside + (0 if placement.modulation_cache else part.modulation.get("", 0))
    return total


@pytest.mark.parametrize(
    ("name", "billions", "gigabytes"),
    [
        ("FLUX.1-dev", 11.9, 33.7),
        ("FLUX.1-schnell", 11.9, 33.7),
        ("FLUX.2-dev", 32.2, 111.3),
        ("FLUX.2-klein-4B", 3.9, 16.0),
        ("FLUX.2-klein-9B", 9.1, 34.7),
        ("FLUX.3-klein", 5.55, 20.1),
        ("FLUX.3-klein-base", 5.55, 20.1),
    ],
)
def test_models_of_full_size_have_the_published_sizes(name: str, billions: float, gigabytes: float) -> None:
    weights = weights_of(name)
    assert weights.transformer.size / 2e9 == pytest.approx(billions, abs=0.05)
    assert weights.size / GB == pytest.approx(gigabytes, abs=0.05)


def test_the_adaptive_norms_of_flux_1_are_a_quarter_of_it() -> None:
    transformer = weights_of("FLUX.1-dev").transformer
    assert sum(transformer.modulation.values()) / 2e9 == pytest.approx(3.25, abs=0.005)
    assert len(transformer.blocks) == 19 + 38
    assert list(transformer.kinds.values()) == [2] * 19


@pytest.mark.parametrize(("gigabytes", "name"), list(itertools.product(CARDS, FULL_SIZE)))
def test_the_plan_fits_and_nothing_that_fits_is_faster(gigabytes: int, name: str) -> None:
    weights, work, machine = weights_of(name), work_of(name), card(gigabytes)
    if gigabytes * GB < smallest(weights, machine, work, "auto"):
        with pytest.raises(DoesNotFit, match=r"choose .* a card of \d+\.\d GB, or a smaller MAX_PIXELS"):
            choose_placement(weights, machine, work)
        return
    chosen = choose_placement(weights, machine, work)
    assert chosen.quantization is None, "not asked for"
    assert chosen.resident == on_the_card(weights, chosen)
    assert chosen.resident + chosen.offloaded == weights.size
    assert chosen.peak >= chosen.resident + chosen.slots
    assert chosen.peak <= machine.memory
    assert chosen.offloaded <= machine.host_memory
    for mode in EXACT:
        for other in placements(weights, machine, work, mode):
            if other.needs <= machine.memory and other.offloaded <= machine.host_memory:
                assert chosen.seconds(work) <= other.seconds(work)
    if gigabytes == 141:
        assert chosen.mode == "full"


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_larger_card_is_never_slower(name: str) -> None:
    weights, work = weights_of(name), work_of(name)
    machine = card(24)
    least = smallest(weights, machine, work, "auto") / GB
    sizes = [least, *(size for size in CARDS if size > least)]
    seconds = [
        choose_placement(weights, replace(machine, memory=int(size * GB) + 1), work).seconds(work) for size in sizes
    ]  # fmt: skip
    assert seconds == sorted(seconds, reverse=True)


@pytest.mark.parametrize(
    ("name", "gigabytes", "like"), [("FLUX.1-dev", 18, 24), ("FLUX.1-dev", 18, 80), ("FLUX.1-schnell", 16, 24)]
)
def test_the_promises_of_the_specification_hold_by_the_cost_model(name: str, gigabytes: int, like: int) -> None:
    """At most 1.1 times the time of everything resident, with a prompt that was read before; `like` is how fast."""
    weights, work, roomy = weights_of(name), work_of(name), replace(card(like), memory=80 * GB)
    narrow, full = (
        choose_placement(weights, replace(roomy, memory=gigabytes * GB), work),
        choose_placement(weights, roomy, work),
    )
    assert full.mode == "full"
    assert narrow.peak <= gigabytes * GB
    assert narrow.step_seconds <= 1.1 * full.step_seconds


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_every_mode_says_what_it_needs_and_needs_no_more(mode: str) -> None:
    weights, work = weights_of("FLUX.1-dev"), work_of("FLUX.1-dev")
    needed = smallest(weights, card(80), work, mode)
    enough = replace(card(80), memory=int(needed) + 1)
    found = choose_placement(weights, enough, work, mode)
    assert mode in (found.mode, "auto", "modulation_cache")
    with pytest.raises(DoesNotFit, match=f"MEMORY_MODE={mode} "):
        choose_placement(weights, replace(enough, memory=int(needed) - 1), work, mode)


def test_what_modes_do() -> None:
    weights, work = weights_of("FLUX.1-dev"), work_of("FLUX.1-dev")
    assert choose_placement(weights, card(48), work, "full").offloaded == 0
    cached = choose_placement(weights, card(48), work, "modulation_cache")
    assert (cached.offloaded, cached.mode) == (sum(weights.transformer.modulation.values()), "modulation_cache")
    streamed = choose_placement(weights, card(20), work, "stream")
    assert streamed.streamed["transformer"]
    assert not streamed.modulation_cache
    assert choose_placement(weights, card(20), work, "fp8").summary()["quantization"] == "fp8"
    assert (
        choose_placement(weights, card(12), work, "nf4").resident
        < choose_placement(weights, card(20), work, "fp8").resident
    )
    slow = [choose_placement(weights, card(48), work, mode).seconds(work) for mode in ("full", "model_offload")]
    assert slow[1] > slow[0]


def test_an_error_names_what_would_do() -> None:
    weights, work = weights_of("FLUX.1-dev"), work_of("FLUX.1-dev")
    with pytest.raises(DoesNotFit) as caught:
        choose_placement(weights, card(24), work, "full")
    text = str(caught.value)
    assert text.startswith(
        "its weights take 33.7 GB, and with MEMORY_MODE=full pictures of 1,048,576 pixels need 37.7 GB"
    )
    assert "a card of 24 GB has 24.0 GB free and its host 160.0 GB" in text
    assert "choose MEMORY_MODE=auto or modulation_cache or stream or sequential_offload or fp8 or nf4" in text


def test_a_host_without_room_parks_nothing() -> None:
    weights, work = weights_of("FLUX.1-dev"), work_of("FLUX.1-dev")
    assert choose_placement(weights, card(48, host=1), work).offloaded == 0
    with pytest.raises(DoesNotFit, match=r"and its host 1\.0 GB: choose a card of 37\.7 GB"):
        choose_placement(weights, card(24, host=1), work)


def test_on_a_cpu_parking_saves_nothing() -> None:
    weights, work = weights_of("FLUX.2-klein-4B"), work_of("FLUX.2-klein-4B")
    roomy = replace(card(24), name="the CPU", host_memory=24 * GB, shared=True)
    assert choose_placement(weights, roomy, work).mode == "full"
    with pytest.raises(
        DoesNotFit, match=r"the CPU has 16\.0 GB free: choose MEMORY_MODE=fp8 or nf4, or a card of 19\.\d GB"
    ):
        choose_placement(weights, replace(roomy, memory=16 * GB, host_memory=16 * GB), work)


def test_larger_pictures_and_controlnets_in_memory_need_more() -> None:
    weights, work = weights_of("FLUX.1-dev"), work_of("FLUX.1-dev")
    plain = smallest(weights, card(80), work, "full")
    assert smallest(weights, card(80), work_of("FLUX.1-dev", 4096 * 2048), "full") > plain
    assert smallest(weights, card(80), replace(work, batch_size=4), "full") > plain
    assert smallest(weights, card(80), replace(work, extra=GB), "full") == pytest.approx(plain + GB, rel=0.01)


def test_names_of_tensors_tell_blocks_and_adaptive_norms() -> None:
    assert block_of("transformer_blocks.7.norm1.linear.weight") == "transformer_blocks.7"
    assert block_of("encoder.block.3.layer.0.SelfAttention.q.weight") == "encoder.block.3"
    assert block_of("x_embedder.weight") is None
    adaptive = ["transformer_blocks.0.norm1_context.linear", "norm_out.linear", "double_stream_modulation_img.linear"]
    assert all(map(is_modulation, adaptive))
    assert not is_modulation("time_text_embed.timestep_embedder.linear_1")
    network = Network.of({"b.10.w": 3, "b.9.w": 2, "b.9.norm.linear.weight": 5, "outside": 7}, 2)
    assert list(network.blocks.items()) == [("b.9", 4), ("b.10", 6)]
    assert (network.modulation, network.outside, network.size) == ({"b.9": 10}, 14, 34)


def test_what_streams_is_spread_evenly() -> None:
    assert evenly(3, 9) == (1, 4, 7)
    assert evenly(0, 9) == ()
    assert evenly(9, 9) == tuple(range(9))
