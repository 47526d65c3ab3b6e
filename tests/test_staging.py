"""Weights read from their files and brought to where they live: the shipped model's, through a card that is slow."""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from handler import respond
from src.engine import load_engine, loading, offload, staging
from src.engine.components import load_networks
from src.engine.placed_pipeline import place
from src.engine.staging import THREADS, Staging, mapped
from src.errors import Refused
from src.job import Job
from src.settings import ROOT, Settings
from src.stages import START
from src.weights.file_parts import FilePart, FileReader, MappedFiles
from src.weights.files import Source
from src.weights.host import HostMemory
from src.weights.placement import GB, Machine, Weights, Work, block_of, choose_placement, in_order

SHAPES = ROOT / "models" / "flux-shapes"
CPU = torch.device("cpu")


class SlowCard:
    """Copies nothing until it is waited for; pinned memory is the host's."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []
        self.sent = 0  # bytes
        self._under_way: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._lock = Lock()
        self.between = False

    def pinned(self, size: int) -> torch.Tensor:
        self.buffers.append(torch.zeros(size, dtype=torch.uint8))
        return self.buffers[-1]

    def begin(self) -> None:
        self.between = True

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], object]:
        assert self.between
        mine = list(pairs)
        with self._lock:
            self._under_way += mine

        def wait() -> None:
            with self._lock:
                for here, there in mine:
                    there.copy_(here)
                    self.sent += here.nbytes
                self._under_way = [pair for pair in self._under_way if all(pair is not one for one in mine)]

        return wait

    def end(self) -> None:
        for here, there in self._under_way:
            there.copy_(here)
            self.sent += here.nbytes
        self._under_way = []
        self.between = False


class NotingReader(FileReader):
    """Knows what was asked for, and how much the system's cache holds of it."""

    def __init__(self, *, drop_behind: bool) -> None:
        super().__init__(drop_behind=drop_behind)
        self.requests: list[tuple[str, int, int]] = []  # file, offset, bytes
        self.held = [0]  # bytes, after each request and each drop
        self._lock = Lock()

    def request(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        count = super().request(descriptor, views, offset)
        with self._lock:
            self.requests.append((os.readlink(f"/proc/self/fd/{descriptor}"), offset, count))
            self.held.append(self.held[-1] + count)
        return count

    def drop(self, descriptor: int, offset: int, size: int) -> None:
        super().drop(descriptor, offset, size)
        with self._lock:
            self.held.append(self.held[-1] - size)


def networks() -> dict[str, Any]:
    """Of the shipped model, in the type that its files have: nothing of them is read yet."""
    pipeline = diffusers.FluxPipeline.from_pretrained(SHAPES, dtype=torch.bfloat16)
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def in_file() -> dict[str, dict[str, torch.Tensor]]:
    """The same weights, as their files have them."""
    folders = ("transformer", "vae", "text_encoder", "text_encoder_2")
    return {name: load_file(next((SHAPES / name).glob("*.safetensors"))) for name in folders}


def same(network: nn.Module, tensors: dict[str, torch.Tensor]) -> bool:
    """transformers' networks have a name of their own for a weight that others share."""
    own = network.state_dict()
    return all(torch.equal(own[name], tensor) for name, tensor in tensors.items() if name in own)


@pytest.mark.parametrize("card", [None, SlowCard()])
def test_weights_come_as_their_files_have_them_through_a_few_buffers(card: SlowCard | None) -> None:
    reader, files = NotingReader(drop_behind=False), in_file()
    bringing = Staging(CPU, reader, card, chunk=4096)
    found = networks()
    weights = [weight for network in found.values() for weight in network.parameters()]
    assert len(mapped(weights)) == len(weights), "nothing of them was read"
    for network in found.values():
        bringing.bring(network.parameters())
    assert mapped(weights) == []
    assert all(same(network, files[name]) for name, network in found.items())
    assert all(weight.data_ptr() % 64 == 0 for weight in weights)
    assert bringing.bytes == sum(weight.nbytes for weight in weights)
    assert sum(count for *_, count in reader.requests) == bringing.bytes
    assert max(count for *_, count in reader.requests) == 4096
    if card:
        assert card.sent == bringing.bytes
        assert {buffer.nbytes for buffer in card.buffers} == {4096}
        assert len(card.buffers) == THREADS * len(found)
    before = len(reader.requests)
    bringing.bring(weights)
    assert len(reader.requests) == before, "they are where they live"


def test_small_weights_share_a_request_and_files_are_read_from_front_to_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "THREADS", 1)  # several begin in order, and end as they come
    reader = NotingReader(drop_behind=False)
    Staging(CPU, reader).bring(networks()["transformer"].parameters())
    assert len(reader.requests) <= 2, "a file of less than a chunk"
    reader.requests.clear()
    Staging(CPU, reader, chunk=1 << 16).bring(networks()["transformer"].parameters())
    assert len(reader.requests) > 100
    assert reader.requests == sorted(reader.requests)


def test_no_page_of_a_mapping_is_touched() -> None:
    """But for those that the libraries touch: one where each tensor begins."""
    if not Path("/proc/self/smaps").exists():
        pytest.skip("the system does not say which pages are in memory")
    transformer = networks()["transformer"]
    mappings = [weight.data for weight in transformer.parameters()]
    before = touched(mappings)
    Staging(CPU).bring(transformer.parameters())
    assert touched(mappings) == before
    assert all(map(torch.equal, mappings, transformer.parameters()))
    assert touched(mappings) > before, "now they are"


def touched(mappings: list[torch.Tensor]) -> int:
    """KiB of the file mapping that holds the first of `mappings` which are in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if "-" in line.split()[0] and holds(line, mappings[0].data_ptr()))
    return int(next(line for line in lines if line.startswith("Rss:")).split()[1])


def test_what_was_read_is_dropped_behind_where_memory_is_short() -> None:
    for drop_behind in (True, False):
        reader = NotingReader(drop_behind=drop_behind)
        bringing = Staging(CPU, reader, SlowCard(), chunk=4096)
        for network in networks().values():
            bringing.bring(network.parameters())
        most, left = max(reader.held), reader.held[-1]
        assert (most <= THREADS * 4096, left == 0) == (drop_behind, drop_behind)


def test_whatever_else_there_is_to_copy_is_copied() -> None:
    card = SlowCard()
    bringing = Staging(CPU, card=card, chunk=256)
    sources = [
        torch.randn(33, 7), torch.randn(7, 33).T, torch.randn(5).bfloat16(), torch.tensor(3.0), torch.empty(0, 4),
        torch.zeros(()).expand(4, 4), torch.randn(6, 6)[:, :3],
    ]  # fmt: skip
    there = [torch.full(source.shape, 9.0) for source in sources]
    there[2] = torch.zeros(5, dtype=torch.bfloat16)
    bringing.fill(zip(sources, there, strict=True))
    assert all(map(torch.equal, sources, there))
    other = torch.zeros(5)
    bringing.fill([(sources[2], other)])
    assert torch.equal(other, sources[2].float())


def test_a_weight_that_two_layers_share_is_brought_once_and_stays_shared(tmp_path: Path) -> None:
    save_file({"weight": torch.randn(8, 8)}, tmp_path / "weights.safetensors")
    first, second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    first.weight = second.weight = nn.Parameter(load_file(tmp_path / "weights.safetensors")["weight"])
    bringing = Staging(CPU)
    bringing.bring([*first.parameters(), *second.parameters()])
    assert bringing.bytes == first.weight.nbytes
    assert first.weight is second.weight
    assert mapped(first.parameters()) == []


def test_a_file_that_became_shorter_is_said(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(bytes(100))
    with pytest.raises(Refused, match=f"{file} became shorter while it was read: download it again"):
        FileReader().read(FilePart(file, 50), [memoryview(bytearray(51))])


def test_a_read_that_brings_little_at_a_time_fills_every_place(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(bytes(range(200)))

    class Trickle(FileReader):
        def request(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            first = next(view for view in views if view.nbytes)
            return super().request(descriptor, [first[:7]], offset)

    places = [bytearray(size) for size in (3, 0, 40, 7, 1)]
    Trickle().read(FilePart(file, 100), [memoryview(place) for place in places])
    assert b"".join(places) == bytes(range(100, 151))


def test_mappings_are_found_by_their_addresses(tmp_path: Path) -> None:
    file = tmp_path / "with blanks.bin"
    file.write_bytes(bytes(8192))
    maps = tmp_path / "maps"
    maps.write_text(
        "00400000-00402000 r--p 00001000 08:01 1 /no/such/file\n"
        f"00402000-00404000 rw-p 00000000 08:01 2                    {file}\n"
        "00404000-00405000 rw-p 00000000 00:00 0 [heap]\n"
        f"00500000-00502000 rw-p 00001000 08:01 2 {file}\n"
    )
    files = MappedFiles(maps)
    assert files.find(0x402010, 100) == FilePart(file, 16)
    assert files.find(0x402010, 8192) is None, "more than is mapped"
    assert files.find(0x500000, 4096) == FilePart(file, 4096)
    assert files.find(0x501000, 4096) is None, "more than the file has"
    assert [files.find(address, 1) for address in (0x1000, 0x400010, 0x404010, 0x600000)] == [None] * 4
    assert MappedFiles(tmp_path / "none").find(0x402010, 1) is None


# A whole model


def drawn(engine: Any) -> list[str]:
    event = {"input": {"prompt": "a red star on black", "seed": 3, "width": 128, "height": 128}}
    response = respond(event, Job(), Settings, lambda: engine)
    assert response["status"] == "success", response
    images: list[str] = response["images"]
    return images


@pytest.mark.parametrize("way", [{}, {"memory_limit_gb": 0.023}, {"memory_mode": "model_offload"}])
def test_where_memory_is_short_the_weights_are_streamed_and_the_picture_is_the_same(
    way: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "worker")
    settings = Settings.model_validate({"model_name": "flux-shapes", "max_pixels": 128 * 128, **way})
    lines = {}
    pictures = []
    for free in (1 << 40, 0):
        START.seconds.clear()  # of other tests
        caplog.clear()
        monkeypatch.setattr(loading, "host_memory", lambda free=free: HostMemory(1 << 40, free))
        pictures.append(drawn(load_engine(settings)))
        every = [vars(line)["facts"] for line in caplog.records if "start:" in line.msg]
        lines[free] = {facts["stage"]: facts for facts in every}
    assert pictures[0] == pictures[1]
    assert [lines[free]["read"]["streamed"] for free in lines] == [False, True]
    for found in lines.values():
        assert found["read"]["bytes"] == sum(file.stat().st_size for file in SHAPES.glob("*/*.safetensors"))
        assert found["read"]["bytes_per_second"] > 0
        assert ("bytes_per_second" in found["load"]) == ("memory_limit_gb" in way), "offloaded ones are copied"


@pytest.mark.slow
def test_kept_quantized_weights_are_streamed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "worker")
    monkeypatch.setattr(loading, "host_memory", lambda: HostMemory(1 << 40, 0))
    settings = Settings(model_name="flux-shapes", quantization="fp8", quantized_dir=tmp_path)
    pictures, read = [], []
    for _ in range(2):
        START.seconds.clear()  # of other tests
        pictures.append(drawn(load_engine(settings)))
        (line,) = (record for record in caplog.records if "weights read in" in record.getMessage())
        read.append(vars(line)["facts"]["bytes"])
        caplog.clear()
    assert pictures[0] == pictures[1]
    (kept,) = tmp_path.glob("*.pt")
    whole = next((SHAPES / "transformer").glob("*.safetensors"))
    assert read[1] - read[0] == kept.stat().st_size - whole.stat().st_size


def test_files_of_another_type_leave_the_systems_cache_behind_the_load(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for file in SHAPES.glob("*/*"):
        copied = folder / file.relative_to(SHAPES)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(file.read_bytes())
        with copied.open("rb+") as stream:
            os.fsync(stream.fileno())  # what is not written yet cannot be dropped
    index = json.loads((SHAPES / "model_index.json").read_text())
    files = sorted(folder.glob("*/*.safetensors"))
    if cached(files[0]) < 0.9:
        pytest.skip("the system does not keep files in memory here, or does not say so")
    for short in (False, True):
        list(load_networks(index, folder, torch.float32, but_for=(), short=short))
        assert [cached(file) < 0.5 for file in files] == [short] * len(files)


def cached(file: Path) -> float:
    """The share of a file's pages that the system has in its cache: 0 where it does not say."""
    size = file.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), size, flags=mmap.MAP_PRIVATE) as mapping:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages)
    return 0 if failed else sum(page & 1 for page in pages) / len(pages)


def test_weights_go_to_a_card_network_by_network_and_the_offloaded_ones_stay_in_their_files() -> None:
    index = json.loads((SHAPES / "model_index.json").read_text())
    parameters = loading._check(Source(SHAPES, None)).sizes
    configurations = {part: json.loads((SHAPES / part / "config.json").read_text()) for part in ("transformer", "vae")}
    weights = Weights.of(parameters, configurations["transformer"], configurations["vae"], 2)
    work = Work(128, 128, 4, 32, 128 * 128)
    machine = Machine("a small card", int(0.0165 * GB), GB, 1e12, 1e9)
    placement = choose_placement(weights, machine, work, "stream")
    assert any(placement.streamed.values())
    card = SlowCard()
    bringing = Staging(CPU, card=card)
    sent = 0
    for name, network in load_networks(index, SHAPES, torch.bfloat16, but_for=()):
        place(name, network, placement, bringing)
        assert card.sent > sent, "before the next one is read"
        sent = card.sent
        left = {w for block in placement.streamed.get(name, ()) for w in nth_block(network, block).parameters()}
        assert set(mapped(network.parameters())) == left


def nth_block(network: nn.Module, index: int) -> nn.Module:
    names = in_order(block for name, _ in network.named_parameters() if (block := block_of(name)))
    return network.get_submodule(names[index])


# The host's memory of what is offloaded


def test_it_is_private_and_filled_before_it_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.Linear(2048, 2048)
    weight, bias = layer.weight.data.clone(), layer.bias.data.clone()
    pinned = []

    class Cudart:
        def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's own
            held = (ctypes.c_float * weight.numel()).from_address(address)
            assert torch.equal(torch.frombuffer(held, dtype=torch.float32), weight.flatten()), "nothing is in it yet"
            pinned.append((address, size))
            return 0

        def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
            return 0

    pin = offload._pin
    monkeypatch.setattr(torch.cuda, "cudart", Cudart)
    monkeypatch.setattr(offload, "_pin", lambda weights, _: pin(weights, torch.device("cuda")))
    left = offload.Home(layer.parameters(), CPU)
    left.leave()
    home = left.memory
    assert home is not None
    assert pinned == [(home.data_ptr(), home.nbytes)]
    assert torch.equal(home[weight.nbytes :][: bias.nbytes].view(torch.float32), bias)
    maps = Path("/proc/self/maps")
    if maps.exists():
        (rights,) = (line.split()[1] for line in maps.read_text().splitlines() if holds(line, home.data_ptr()))
        assert rights == "rw-p", "pages of this process alone"


def holds(line: str, address: int) -> bool:
    begin, end = (int(each, 16) for each in line.split(maxsplit=1)[0].split("-"))
    return begin <= address < end
