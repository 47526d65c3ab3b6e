"""A pipeline whose weights are where a placement wants them."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from src.engine.modulation import ModulationCache
from src.engine.offload import Offloader
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


class PlacedPipeline:
    """Puts the pipeline's weights in their places; without a placement they stay where they are."""

    def __init__(
        self, pipeline: Any, placement: Placement | None, device: torch.device, staging: Staging | None = None
    ) -> None:
        self.placement = placement
        self.device = device
        self._offloader: Offloader | None = None
        self._modulation_cache: ModulationCache | None = None
        self._offload = placement.offload if placement else None
        staging = staging or Staging(device)
        for name, network in networks_of(pipeline).items():
            place(name, network, placement, staging)  # where it was not while the model was loaded
        if self._offload == "sequential" and device.type != "cpu":  # where its weights are, it would bring them
            pipeline.enable_sequential_cpu_offload(device=device)
        elif self._offload == "model":
            self.prepare(pipeline)
        elif placement and self._offload is None:
            self._offload_weights(pipeline, placement, staging)
            pipeline.to(device)

    def _offload_weights(self, pipeline: Any, placement: Placement, staging: Staging) -> None:
        offloader = self._offloader = Offloader(self.device, staging)
        modulation: list[nn.Module] = []
        if placement.modulation_cache:
            modulation = _modulation(pipeline.transformer)
            self._modulation_cache = ModulationCache(pipeline.transformer, offloader)
        for component in placement.streamed:
            for block in _streamed(component, getattr(pipeline, component), placement):
                offloader.stream(block, without=modulation)

    @property
    def quantization(self) -> str | None:
        """Of the weights; None is exact."""
        return self.placement.quantization if self.placement else None

    def prepare(self, view: Any) -> None:
        """Let `view` be the pipeline that is called next, with the networks that it has now."""
        if self._offload == "model":
            view.enable_model_cpu_offload(device=self.device)

    def denoising(self, scheduler: Any, steps: int, adapter_weights: Hashable) -> AbstractContextManager[None]:
        """Within it one picture is denoised, or a batch: the last `steps` timesteps of `scheduler`."""
        cache = self._modulation_cache
        return cache.ahead(scheduler, steps, adapter_weights) if cache else nullcontext()
