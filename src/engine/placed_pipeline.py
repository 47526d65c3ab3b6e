"""A pipeline whose weights are where a placement wants them, and go where another wants them between two pictures."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from src.engine.memory import free_memory, is_out_of_memory
from src.engine.modulation import ModulationCache
from src.engine.offload import Home, Offloader
from src.engine.staging import Staging
from src.weights.placement import Placement, block_of, in_order, is_modulation


def networks_of(pipeline: Any) -> dict[str, nn.Module]:
    """The components that hold weights, by name."""
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def place(name: str, network: nn.Module, placement: Placement | None, staging: Staging) -> None:
    """Bring the weights of the pipeline's network `name` to where they stay: all but those that are onloaded by turns.

    Without a placement they stay on the device where they are.
    """
    moved = set(_moved_by_turns(name, network, placement)) if placement else set()
    host = placement is None or placement.offload is not None
    weights = (weight for weight in network.parameters() if weight not in moved)
    staging.bring((w for w in weights if not host or w.device.type == "cpu"), torch.device("cpu") if host else None)


def _moved_by_turns(name: str, network: nn.Module, placement: Placement) -> Iterator[nn.Parameter]:
    for block in _streamed(name, network, placement):
        yield from block.parameters()
    if placement.modulation_cache and name == "transformer":
        for layer in _modulation(network):
            yield from layer.parameters()


def _streamed(name: str, network: nn.Module, placement: Placement) -> list[nn.Module]:
    blocks = in_order(block for tensor, _ in network.named_parameters() if (block := block_of(tensor)))
    return [network.get_submodule(blocks[index]) for index in placement.streamed.get(name, ())]


def _modulation(transformer: nn.Module) -> list[nn.Module]:
    return [layer for name, layer in transformer.named_modules() if is_modulation(name)]


@dataclass(frozen=True)
class _Block:
    module: nn.Module
    own: Home  # without its modulation
    modulation: tuple[Home, ...]


class PlacedPipeline:
    """Puts the pipeline's weights in their places; without a placement they stay where they are."""

    def __init__(
        self, pipeline: Any, placement: Placement | None, device: torch.device, staging: Staging | None = None
    ) -> None:
        self.placement = placement
        self.device = device
        self._transformer: Any = getattr(pipeline, "transformer", None)
        self._offloader: Offloader | None = None
        self._modulation_cache: ModulationCache | None = None
        self._modulation: dict[str, Home] = {}  # of the transformer's adaptive norms, by their linears' names
        self._blocks: dict[str, list[_Block]] = {}  # by component, in order
        self._alone: list[_Block] = []  # adaptive norms' linears that are in no block
        self._away: set[Home] = set()  # in the host's memory
        self._offload = placement.offload if placement else None
        staging = staging or Staging(device)
        for name, network in networks_of(pipeline).items():
            place(name, network, placement, staging)  # where it was not while the model was loaded
        if self._offload == "sequential" and device.type != "cpu":  # where its weights are, it would bring them
            pipeline.enable_sequential_cpu_offload(device=device)
        elif self._offload == "model":
            self.prepare(pipeline)
        elif placement and self._offload is None:
            self._offloader = Offloader(device)
            self._find_blocks(pipeline, staging)
            self.arrange(placement)
            pipeline.to(device)

    def _find_blocks(self, pipeline: Any, staging: Staging) -> None:
        """All that may ever leave the device, before adapters join it."""
        weights = self._transformer.named_parameters()
        layers = dict.fromkeys(layer for name, _ in weights if is_modulation(layer := name.rpartition(".")[0]))
        for name in layers:
            linear = self._transformer.get_submodule(name)
            self._modulation[name] = home = Home(linear.parameters(), self.device, staging)
            if not block_of(name):
                self._alone.append(_Block(linear, home, ()))
        for component, network in networks_of(pipeline).items():
            if component in ("vae", "controlnet"):
                continue
            own: dict[str, list[nn.Parameter]] = {}
            modulation = self._modulation if component == "transformer" else {}
            for name, weight in network.named_parameters():
                block = block_of(name)
                if block and name.rpartition(".")[0] not in modulation:
                    own.setdefault(block, []).append(weight)
            self._blocks[component] = [
                _Block(
                    network.get_submodule(block),
                    Home(own[block], self.device, staging),
                    tuple(home for linear, home in modulation.items() if block_of(linear) == block),
                )
                for block in in_order(own)
            ]

    @property
    def quantization(self) -> str | None:
        """Of the transformer's weights, here or in their file; None is exact."""
        return (self.placement.quantization or self.placement.stored) if self.placement else None

    @property
    def text_encoders_stay(self) -> bool:
        """Whether their weights are on the device all the time."""
        encoders = (blocks for name, blocks in self._blocks.items() if name.startswith("text_encoder"))
        return self._offload is None and not any(block.own in self._away for blocks in encoders for block in blocks)

    def arrange(self, placement: Placement) -> bool:
        """Bring the weights where `placement` wants them: the pictures have the same bytes. Not while one is drawn.

        False where there was no room for what was to come back: then all of that is in the host's memory.
        Weights that were there keep their place in it while there is room, and leave again without a copy.
        Whatever it raises, each weight is where its block finds it.
        """
        if self._offloader is None:
            return False
        with torch.inference_mode(False), torch.no_grad():  # weights are no tensors of inference
            self._offloader.reset()
            wanted = self._wanted(placement)
            self._forget_homes(wanted, placement.machine.host_memory)
            try:
                for home in wanted - self._away:
                    home.leave()
                    self._away.add(home)
                if whole := self._bring_back(self._away - wanted):
                    self._away = wanted
            finally:
                self._onload_when_called(self._offloader)
            self._forget_homes(self._away, placement.machine.host_memory)
        self.placement = placement if whole else self.placement
        return whole

    def _wanted(self, placement: Placement) -> set[Home]:
        """What is in the host's memory by `placement`."""
        wanted = set(self._modulation.values()) if placement.modulation_cache else set()
        for component, indices in placement.streamed.items():
            for block in (self._blocks[component][index] for index in indices):
                wanted |= {block.own, *block.modulation}
        return wanted

    def _bring_back(self, homes: set[Home]) -> bool:
        """All of `homes` or none."""
        try:
            for home in homes:
                home.come_back()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            for home in homes:
                home.leave()
            free_memory(error)
            return False
        return True

    def _forget_homes(self, away: set[Home], most: int) -> None:
        """Keep no home of weights that are on the device where that would take more than `most` bytes."""
        homes = {*self._modulation.values(), *(block.own for blocks in self._blocks.values() for block in blocks)}
        if sum(home.size for home in homes if home.memory is not None or home in away) > most:
            for home in homes - away - self._away:
                home.forget()

    def _onload_when_called(self, offloader: Offloader) -> None:
        ahead = bool(self._modulation) and self._away.issuperset(self._modulation.values())
        self._modulation_cache = None
        if ahead:
            offloaded = {name: offloader.offload(home) for name, home in self._modulation.items()}
            self._modulation_cache = ModulationCache(self._transformer, offloaded)
        for blocks in (*self._blocks.values(), [] if ahead else self._alone):
            for block in blocks:
                homes = block.own, *(() if ahead else block.modulation)
                if streamed := [home for home in homes if home in self._away]:
                    offloader.stream(block.module, *streamed)

    def prepare(self, view: Any) -> None:
        """Let `view` be the pipeline that is called next, with the networks that it has now."""
        if self._offload == "model":
            view.enable_model_cpu_offload(device=self.device)

    def denoising(
        self, scheduler: Any, steps: int, adapter_weights: Hashable, *, exact: bool = True
    ) -> AbstractContextManager[None]:
        """Within it one picture is denoised, or a batch: the last `steps` timesteps of `scheduler`.

        What need not be `exact` may round otherwise than the plain way.
        """
        cache = self._modulation_cache
        return cache.ahead(scheduler, steps, adapter_weights, exact=exact) if cache else nullcontext()
