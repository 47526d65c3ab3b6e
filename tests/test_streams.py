"""Blocks that come and go on streams of their own, in random worlds: nothing is read or written out of order."""

from __future__ import annotations

import random
import re
from contextlib import nullcontext, suppress

import pytest
import torch
from torch import nn

from src.engine.offload import Home, OffloadedWeights, Offloader
from tests.streams import COMPUTING, COPYING, HOST, Race, SimulatedStreams, Watched

CPU = torch.device("cpu")


class Stop(Exception):
    """Raised in the middle of a block."""


class Layer(nn.Module):
    """Adds up all its weights; some of them may be away for themselves, as adaptive norms are."""

    def __init__(self, sizes: list[int], generator: torch.Generator) -> None:
        super().__init__()
        self.parts = nn.ParameterList(
            nn.Parameter(torch.randn(size, generator=generator), requires_grad=False) for size in sizes
        )
        self.stops = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = x + part.sum()
            if self.stops:
                raise Stop
        return x


class World:
    """Two networks that take turns, some of their weights away, on simulated streams."""

    def __init__(self, seed: int, streams: SimulatedStreams) -> None:
        self.random = random.Random(seed)
        self.streams = streams
        generator = torch.Generator().manual_seed(seed)
        sizes = [self.random.randint(1, 300) for _ in range(3)]
        self.networks = [
            [Layer(self.random.choices(sizes, k=self.random.randint(1, 3)), generator) for _ in range(count)]
            for count in (self.random.randint(1, 6), self.random.randint(1, 6))
        ]
        self.right = [self.called(network) for network in self.networks]
        self.homes = {layer: [Home([part], CPU) for part in layer.parts] for net in self.networks for layer in net}
        self.away: set[Home] = set()
        self.alone: dict[Layer, OffloadedWeights] = {}
        self.offloader = Offloader(CPU, streams)

    def called(self, network: list[Layer]) -> torch.Tensor:
        x = torch.zeros(4)
        for layer in network:
            x = layer(x)
        return x

    def arrange(self) -> None:
        """As a placed pipeline does between two pictures: other weights are away, and some of their homes are gone."""
        self.offloader.reset()
        homes = [home for homes in self.homes.values() for home in homes]
        wanted = {home for home in homes if self.random.random() < 0.6}
        for home in wanted - self.away:
            home.leave()
        for home in self.away - wanted:
            home.come_back()
        for home in homes:
            if home not in wanted and self.random.random() < 0.5:
                home.forget()
            elif home.memory is not None:
                self.streams.frees(home.memory, HOST)
        self.away, self.alone = wanted, {}
        for layer, homes in self.homes.items():
            if here := [home for home in homes if home in wanted]:
                if self.random.random() < 0.3:
                    self.alone[layer] = self.offloader.offload(*here)
                else:
                    self.offloader.stream(layer, *here)

    def draw(self) -> None:
        """One call of one network, which may stop in the middle."""
        number = self.random.randrange(2)
        network, layer = self.networks[number], None
        if self.random.random() < 0.2:
            layer = self.random.choice(network)
            layer.stops = True
        x = torch.zeros(4)
        with suppress(Stop):
            for each in network:
                with self.alone[each].onloaded() if each in self.alone else nullcontext():
                    x = each(x)
            assert torch.equal(x, self.right[number])
        if layer:
            layer.stops = False
        for slot in self.offloader._slots:
            if id(slot.memory) not in self.seen:
                self.seen.add(id(slot.memory))
                self.streams.frees(slot.memory, COMPUTING)

    def run(self) -> None:
        self.seen: set[int] = set()
        for _ in range(3):
            self.arrange()
            for _ in range(self.random.randint(1, 6)):
                with torch.inference_mode(self.random.random() < 0.5):
                    self.draw()
        self.arrange()
        if self.streams.error:
            raise self.streams.error


def race_in(seed: int, deaf: str | None = None) -> Race | None:
    streams = SimulatedStreams(deaf)
    with Watched(streams):
        try:
            World(seed, streams).run()
        except Race as race:
            return race
    assert streams.accesses > 10
    return None


@pytest.mark.parametrize("worlds", [range(20), pytest.param(range(20, 400), marks=pytest.mark.slow)])
def test_nothing_is_out_of_order_in_any_world(worlds: range) -> None:
    assert [(seed, race) for seed in worlds if (race := race_in(seed))] == []


NO_WAIT = {  # of whom, and what it does to memory
    COPYING: "a read of computing and a write of copying",  # a slot is filled while what it held is in use
    COMPUTING: "a write of copying and a read of computing",  # a block computes before its weights have arrived
    HOST: "a (write|read) of copying and a write of (computing|host)",  # memory is let go with a copy on its way
}


@pytest.mark.parametrize("deaf", NO_WAIT)
def test_a_wait_that_is_left_out_is_found(deaf: str) -> None:
    races = [str(race) for seed in range(12) if (race := race_in(seed, deaf))]
    assert len(races) > 6
    assert all(re.fullmatch(NO_WAIT[deaf], race) for race in races), races
