"""A pipeline whose weights are where a placement wants them."""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from src.engine.modulation import ModulationCache
from src.engine.offload import Offloader
from src.weights.placement import Placement, block_of, in_order, is_modulation

_ALIGNED = 64  # bytes; as torch's own CPU memory is (c10/core/alignment.h)


class PlacedPipeline:
    """Puts the pipeline's weights in their places; without a placement they stay where they are."""

    def __init__(self, pipeline: Any, placement: Placement | None, device: torch.device) -> None:
        self.placement = placement
        self.device = device
        self._offloader: Offloader | None = None
        self._modulation_cache: ModulationCache | None = None
        self._offload = placement.offload if placement else None
        if device.type == "cpu":
            _align(pipeline)
        if self._offload == "sequential" and device.type != "cpu":  # where its weights are, it would bring them
            pipeline.enable_sequential_cpu_offload(device=device)
        elif self._offload == "model":
            self.prepare(pipeline)
        elif placement and self._offload is None:
            self._offload_weights(pipeline, placement)
            pipeline.to(device)

    def _offload_weights(self, pipeline: Any, placement: Placement) -> None:
        offloader = self._offloader = Offloader(self.device)
        modulation: list[nn.Module] = []
        if placement.modulation_cache:
            modulation = [layer for name, layer in pipeline.transformer.named_modules() if is_modulation(name)]
            self._modulation_cache = ModulationCache(pipeline.transformer, offloader)
        for component, indices in placement.streamed.items():
            network = getattr(pipeline, component)
            blocks = in_order(block for name, _ in network.named_parameters() if (block := block_of(name)))
            for index in indices:
                offloader.stream(network.get_submodule(blocks[index]), without=modulation)

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


def _align(pipeline: Any) -> None:
    """Let weights begin where torch's own memory does, wherever in their files they were mapped from.

    On some processors MKL rounds the last bit otherwise where a matrix begins elsewhere: a picture would depend on
    which weights are offloaded.
    """
    networks = (part for part in pipeline.components.values() if isinstance(part, nn.Module))
    for weight in (weight for network in networks for weight in network.parameters()):
        if type(weight) is nn.Parameter and weight.data_ptr() % _ALIGNED:
            weight.data = weight.data.clone()
