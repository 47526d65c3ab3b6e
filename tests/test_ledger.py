"""Who is on the card with the model and what leaves for whom: counted byte by byte, and with a real model."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.ledger import MACHINES, MODELS, CountedMemory, CountedWorker, choice_of, demands_on, fits, fits_alone
from handler import respond
from src.engine import Engine, load_engine
from src.job import Job
from src.settings import Settings
from src.weights.ledger import _PATIENCE, ExtraKind, Ledger, PlacementChoice
from src.weights.placement import GB, DoesNotFit, Placement, choose_placement
from tests.conftest import base64_of
from tests.small_models import controlnet, redux, small


@cache
def choice(model: str, machine: str) -> PlacementChoice:
    return choice_of(model, MACHINES[machine])


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    "model",
    [pytest.param(model, marks=[pytest.mark.slow] if model == "FLUX.1-schnell" else []) for model in MODELS],
)
def test_what_fits_by_itself_fits_in_any_order_and_leaves_nothing_behind(model: str, machine: str) -> None:
    chosen, demands = choice(model, machine), demands_on(model)
    try:
        start = CountedWorker(chosen)
    except DoesNotFit:
        return
    fitting = [demand for demand in demands.values() if fits_alone(chosen, demand)]
    assert all(fits_alone(chosen, demand) or machine == "16 GB" for demand in demands.values())
    for order in itertools.permutations(fitting):
        worker = fits(chosen, (*order, *order))
        assert worker is not None, (model, machine, order)
        for _ in range(_PATIENCE + 1):
            worker.job({})
        worker.ledger.let_idle_go()
        worker.job({})
        assert worker.memory.held == start.memory.held, "the placement of the start, and nothing else"
        assert worker.ledger.extra == 0


def test_with_the_placement_of_the_start_a_controlnet_does_not_fit() -> None:
    """What the ledger is for: README's ControlNet on demand, on the card that most people have."""
    card, demand = choice("FLUX.1-dev", "RTX 4090"), demands_on("FLUX.1-dev")["Union-Pro"]
    assert fits(card, [demand], ledger=False) is None
    assert fits(card, [demand]) is not None


def test_all_that_one_job_wants_stays_together() -> None:
    everything = {name: size for demand in demands_on("FLUX.1-dev").values() for name, size in demand.items()}
    worker = fits(choice("FLUX.1-dev", "RTX 4090"), [everything, everything])
    assert worker is not None
    assert worker.memory.held.keys() == {"model and picture", *everything}
    assert worker.ledger.placement is not None
    assert worker.ledger.placement.streamed["transformer"]


class Held:
    """A ledger on a card, what left it in which order, and where the model was brought."""

    def __init__(self, machine: str = "RTX 4090") -> None:
        self.left: list[str] = []
        self.arranged: list[Placement] = []
        self.room = True
        chosen = choice("FLUX.1-dev", machine)
        self.start = choose_placement(chosen.weights, chosen.machine, chosen.work)
        self.ledger = Ledger(self.start, chosen, self._arrange)

    def _arrange(self, placement: Placement) -> bool:
        if self.room:
            self.arranged.append(placement)
        return self.room

    def admit(self, name: str, kind: ExtraKind, gigabytes: float, *, kept: bool = False) -> None:
        self.ledger.admit(name, kind, int(gigabytes * GB), lambda: self.left.append(name), kept=kept)


def test_what_is_idle_leaves_first_and_the_cheapest_to_load_again_before_others() -> None:
    held = Held("A40")
    room = (0.96 * held.start.machine.memory - held.start.peak) / GB
    held.ledger.begin(("a", "b", "Redux", "net", "kept"))
    held.admit("kept", ExtraKind.CONTROLNET, 1, kept=True)
    held.admit("net", ExtraKind.CONTROLNET, 1)
    held.admit("Redux", ExtraKind.REDUX, 1)
    held.admit("a", ExtraKind.ADAPTER, 1)
    held.admit("b", ExtraKind.ADAPTER, 1)
    held.ledger.begin(("a",))  # used later than b
    held.ledger.begin(("c",))
    held.admit("c", ExtraKind.ADAPTER, room - 4.5)
    assert held.left == ["b"]
    held.admit("d", ExtraKind.ADAPTER, 2)
    assert held.left == ["b", "a", "Redux"]
    assert held.arranged == []
    held.admit("e", ExtraKind.ADAPTER, 3)
    assert held.left == ["b", "a", "Redux", "net"]
    assert len(held.arranged) == 1, "the rest is the model's to give"
    assert held.ledger.names == ("kept", "c", "d", "e")


def test_the_model_gets_faster_again_where_nobody_has_wanted_the_room_for_long() -> None:
    held = Held()
    held.ledger.begin(("net",))
    held.admit("net", ExtraKind.CONTROLNET, 6.6)
    slower = held.ledger.placement
    assert slower is not None
    assert slower.seconds(choice("FLUX.1-dev", "RTX 4090").work) > held.start.seconds(
        choice("FLUX.1-dev", "RTX 4090").work
    )
    for _ in range(_PATIENCE):
        held.ledger.begin(())
    assert (held.left, held.arranged) == ([], [slower])
    held.ledger.begin(("net",))
    for _ in range(_PATIENCE):
        held.ledger.begin(())
    assert held.left == [], "it was wanted in between"
    held.ledger.begin(())
    assert (held.left, held.arranged) == (["net"], [slower, held.start])


def test_memory_that_turns_out_to_be_short_is_given_and_not_counted_on_for_some_jobs() -> None:
    held = Held()
    held.ledger.begin(("net",))
    held.admit("net", ExtraKind.CONTROLNET, 6.6)
    held.ledger.begin(("net",))
    before = held.ledger.placement
    assert held.ledger.shrink()
    for _ in range(_PATIENCE):
        assert held.ledger.placement is not before
        held.ledger.begin(("net",))
    assert held.ledger.placement == before


def test_all_that_can_be_given_is_given_step_by_step() -> None:
    held = Held()
    held.ledger.begin(("a",))
    held.admit("idle", ExtraKind.ADAPTER, 0.1)
    held.ledger.begin(())
    assert held.ledger.give()
    assert held.left == ["idle"]
    needs = [held.start.needs]
    while held.ledger.give():
        assert held.ledger.placement is not None
        needs.append(held.ledger.placement.needs)
    assert needs == sorted(needs, reverse=True)
    assert 3 < len(needs) < 10
    for _ in range(_PATIENCE - 1):
        held.ledger.begin(())
    assert held.ledger.placement is not held.start
    held.ledger.begin(())
    assert held.ledger.placement is held.start


def test_what_could_not_come_back_is_not_tried_in_every_job() -> None:
    held = Held()
    held.ledger.begin(("net",))
    held.admit("net", ExtraKind.CONTROLNET, 6.6)
    slower = held.ledger.placement
    held.ledger.remove("net")
    held.room = False
    held.ledger.begin(())
    held.room = True
    for _ in range(_PATIENCE - 1):
        held.ledger.begin(())
    assert held.ledger.placement is slower
    held.ledger.begin(())
    assert held.ledger.placement is held.start


def test_without_a_placement_or_where_memory_is_shared_only_what_is_idle_leaves() -> None:
    chosen = choice("FLUX.2-klein-4B", "H100")
    shared = PlacementChoice(chosen.weights, replace(chosen.machine, shared=True), chosen.work, "auto")
    start = choose_placement(shared.weights, shared.machine, shared.work)
    for ledger in (Ledger(), Ledger(start, shared, lambda _: pytest.fail("it moved"))):
        left: list[str] = []
        ledger.admit("a", ExtraKind.ADAPTER, 300 * GB, partial(left.append, "a"))
        assert not ledger.give()
        ledger.done_with("a")
        assert ledger.give()
        assert left == ["a"]
        assert not ledger.give()


def test_a_counted_memory_holds_no_more_than_it_has() -> None:
    memory = CountedMemory(10)
    memory.allocate("a", 6)
    with pytest.raises(MemoryError):
        memory.allocate("b", 5)
    memory.free("a")
    memory.allocate("b", 10)


# A real model on a card that is pretended on the CPU

PICTURE = Image.new("RGB", (64, 64), "teal")
EVERYWHERE = {"width": 64, "height": 64, "num_inference_steps": 2, "max_sequence_length": 32, "seed": 5}


class Worker:
    """A small FLUX of random weights, with a ControlNet, Redux and two adapters that its jobs may want."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.settings = Settings(
            model_name=str(folder / "model"), redux_model=str(folder / "redux"), lora_dir=folder / "loras",
            lora_cache_dir=folder / "cache", max_pixels=64 * 64, **settings,
        )  # fmt: skip
        self.engine: Engine = load_engine(self.settings)
        files = self.engine._controlnets._files
        find = files.find
        local = {"Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro": str(folder / "net")}
        self.engine._controlnets._files.find = (  # type: ignore[method-assign]
            lambda name, repo, *arguments, **options: find(
                local.get(name, name), local.get(repo, repo), *arguments, **options
            )
        )

    def ask(self, **fields: Any) -> list[str]:
        event = {"input": {"prompt": "a red circle", **EVERYWHERE, **fields}}
        response = respond(event, Job(), lambda: self.settings, partial(itemgetter(0), [self.engine]))
        assert response["status"] == "success", response
        assert response["metadata"]["warnings"] == []
        images: list[str] = response["images"]
        return images


WANTED: dict[str, dict[str, Any]] = {
    "nothing": {},
    "ControlNet": {"control_image": base64_of(PICTURE), "control_type": "canny", "preprocess": True},
    "adapters": {"loras": [{"path": "one.safetensors"}, {"path": "two.safetensors", "scale": 0.5}]},
    "Redux": {"image_prompt": base64_of(PICTURE)},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ledger")
    small("dev", made / "model")
    controlnet(made / "net", 7)
    redux(made / "redux")
    (made / "loras").mkdir()
    generator = torch.Generator().manual_seed(3)
    layers = {}
    for block, layer in itertools.product(("transformer_blocks.0", "transformer_blocks.1"), ("attn.to_q", "attn.to_k")):
        for half in "AB":
            shape = (4, 160) if half == "A" else (160, 4)
            layers[f"transformer.{block}.{layer}.lora_{half}.weight"] = torch.randn(shape, generator=generator)
    for name in ("one", "two"):
        save_file({key: value * len(name) for key, value in layers.items()}, made / "loras" / f"{name}.safetensors")
        layers = {key: value.flip(0).contiguous() for key, value in layers.items()}
    return made


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, list[str]]:
    """What each job draws where nothing of the model ever moves."""
    worker = Worker(folder)
    drawn = {wanted: worker.ask(**fields) for wanted, fields in WANTED.items()}
    assert len({*map(tuple, drawn.values())}) == len(drawn), "or nothing was shown"
    return drawn


# Megabytes of cards: in 28.8 the model alone fits whole, in 31 with some of its company; in 23 a part of it streams
# from the start, and a ControlNet does not fit by the estimates.
CARDS_MB = (28.8, 31, 23)


def moved(worker: Worker) -> tuple[Any, ...]:
    """Where the model is now."""
    summary = worker.engine.loaded().placement
    return summary["modulation_cache"], tuple(summary["streamed_blocks"].items())


@pytest.mark.parametrize("megabytes", CARDS_MB)
@pytest.mark.parametrize("orders", [2, pytest.param(24, marks=pytest.mark.slow)])
def test_the_same_bytes_in_any_order_of_jobs(
    megabytes: float, orders: int, folder: Path, plain: dict[str, list[str]]
) -> None:
    worker = Worker(folder, memory_limit_gb=megabytes / 1000)
    places = [moved(worker)]
    every = list(itertools.permutations(WANTED))
    for order in every[:: len(every) // orders]:
        for wanted in order:
            worker.engine._prompts._remembered.clear()  # or Redux and the text encoders would have nothing to do
            assert worker.ask(**WANTED[wanted]) == plain[wanted], (order, wanted)
            places.append(moved(worker))
    assert len(set(places)) > 1, "or nothing ever moved"


def test_what_moved_for_others_comes_back_when_they_are_gone(folder: Path, plain: dict[str, list[str]]) -> None:
    worker = Worker(folder, memory_limit_gb=0.0288)
    start, held = moved(worker), worker.engine._pipeline
    own = [weight for part in (held.transformer, held.text_encoder_2) for weight in part.parameters()]
    assert start == (False, ())
    assert worker.ask(**WANTED["ControlNet"]) == plain["ControlNet"]
    assert moved(worker) != start
    assert sum(absent(weight) for weight in own) > 4_000_000
    assert worker.engine.loaded().placement["expected_peak_gb"] <= 0.029
    for _ in range(_PATIENCE + 2):
        assert worker.ask() == plain["nothing"]
    assert worker.engine.loaded().controlnets == ()
    assert moved(worker) == start
    assert not any(map(absent, own))
    assert not any(layer._forward_pre_hooks for layer in held.transformer.modules()), "and nothing is left in the way"


def absent(weight: torch.Tensor) -> int:
    """Its bytes where it takes no memory."""
    return weight.nbytes if weight.untyped_storage().nbytes() <= weight.itemsize < weight.nbytes else 0


def test_a_controlnet_that_is_kept_has_its_room_from_the_start() -> None:
    engine = load_engine(Settings(model_name="flux-shapes", memory_limit_gb=1, controlnets=("flux-shapes-canny",)))
    ledger, start = engine._ledger, engine.loaded().placement
    assert ledger.placement is not None
    assert ledger.names == ("flux-shapes-canny",)
    assert ledger.placement.extra == ledger.extra > 1_000_000
    assert not ledger.let_idle_go()
    assert engine.loaded().placement == start


OOM = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Short:
    """A network's forward with too little memory for it until `enough` says so."""

    def __init__(self, forward: Any, enough: Any) -> None:
        self._forward = forward
        self._enough = enough
        self.failures = 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self._enough():
            self.failures += 1
            raise OOM
        return self._forward(*arguments, **options)


def test_where_memory_is_short_for_a_picture_what_is_idle_leaves_without_a_word(
    folder: Path, plain: dict[str, list[str]]
) -> None:
    worker = Worker(folder, memory_limit_gb=1)
    for wanted in ("ControlNet", "Redux", "adapters"):
        worker.ask(**WANTED[wanted])
    ledger, transformer = worker.engine._ledger, worker.engine._pipeline.transformer
    assert len(ledger.names) == 4
    forward = transformer.forward
    transformer.forward = Short(forward, lambda: not ledger.names)
    assert worker.ask() == plain["nothing"], "the adapters that left count for nothing"
    assert transformer.forward.failures == 1
    assert worker.engine.loaded().adapters == worker.engine.loaded().controlnets == ()
    transformer.forward = forward
    assert all(worker.ask(**WANTED[wanted]) == plain[wanted] for wanted in WANTED)


def test_an_adapter_that_leaves_while_none_counts_brings_no_other_back(
    folder: Path, plain: dict[str, list[str]]
) -> None:
    worker = Worker(folder)
    worker.ask(**WANTED["adapters"])
    ledger, transformer = worker.engine._ledger, worker.engine._pipeline.transformer
    forward = transformer.forward

    def leaving(*arguments: Any, **options: Any) -> Any:
        if len(ledger.names) == 2:
            ledger._let_go(ledger.names[0])
        return forward(*arguments, **options)

    transformer.forward = leaving
    assert worker.ask() == plain["nothing"]
    assert len(ledger.names) == 1


def test_nobody_reads_ahead_until_an_adapter_has_left_the_text_encoders(folder: Path) -> None:
    worker = Worker(folder)
    worker.ask(**WANTED["adapters"])
    adapters, pipeline, seen = worker.engine._adapters, worker.engine._pipeline, list[bool]()
    name, delete = worker.engine._ledger.names[0], pipeline.delete_adapters
    adapters._of_text_encoders.add(name)

    def deleting(name: str) -> None:
        delete(name)
        seen.append(adapters.change_text_encoders)

    pipeline.delete_adapters = deleting
    worker.engine._ledger._let_go(name)
    assert seen == [True]
    assert not adapters.change_text_encoders


def test_adapters_that_a_leader_s_next_picture_does_not_want_are_idle_in_its_followers_too(folder: Path) -> None:
    worker = Worker(folder)
    worker.ask(**WANTED["adapters"])
    worker.engine.use_adapters(())
    assert worker.engine._ledger.let_idle_go()
    assert worker.engine.loaded().adapters == ()


def test_then_more_of_the_model_streams_and_only_then_pictures_change_their_ways(
    folder: Path, plain: dict[str, list[str]]
) -> None:
    worker = Worker(folder, memory_limit_gb=0.0288)
    start, transformer = moved(worker), worker.engine._pipeline.transformer
    transformer.forward = Short(transformer.forward, lambda: moved(worker) != start)
    assert worker.ask() == plain["nothing"]
    assert transformer.forward.failures == 2
    assert worker.engine.loaded().placement["mode"] != "full"


def test_a_network_that_finds_no_room_gets_what_the_model_can_give(folder: Path, plain: dict[str, list[str]]) -> None:
    worker = Worker(folder, memory_limit_gb=1)
    worker.ask(**WANTED["adapters"])
    ledger, nets = worker.engine._ledger, worker.engine._controlnets
    read = nets._read
    nets._read = Short(read, lambda: ledger.names == ("Union-Pro",) and moved(worker)[1])  # type: ignore[method-assign]
    assert worker.ask(**WANTED["ControlNet"]) == plain["ControlNet"]
    nets._read = Short(read, lambda: False)  # type: ignore[method-assign]
    nets._loaded.clear()
    ledger.remove("Union-Pro")
    event = {"input": {"prompt": "a red circle", **EVERYWHERE, **WANTED["ControlNet"]}}
    answer = respond(event, Job(), lambda: worker.settings, lambda: worker.engine)
    assert answer["error_code"] == "out_of_memory"
    assert "there is no room for the ControlNet Union-Pro on this card" in answer["error"]
    assert ledger.names == ()
