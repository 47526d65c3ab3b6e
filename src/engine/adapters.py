"""LoRA adapters on a loaded pipeline: which fit, which are in memory, which count for a picture."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from src.engine.lora import Networks, read_adapter
from src.engine.memory import free_memory, is_out_of_memory
from src.errors import Fault, GenerationFailed, OutOfMemory, Refused, redact
from src.request.adapters import Adapter


class Adapters:
    """Holds at most `limit` adapters in memory; the least recently used goes first."""

    def __init__(self, pipeline: Any, limit: int) -> None:
        self._pipeline = pipeline
        self._limit = limit
        self._loaded: OrderedDict[str, str] = OrderedDict()  # names, and the paths that they were asked for by
        self._fitting: dict[str, tuple[str, ...]] = {}  # names of files that were checked, and their warnings
        self._aside: list[tuple[nn.Module, str, BaseTunerLayer]] = []  # layers with adapters, and where they belong
        self._networks = Networks(pipeline)
        self._parts = [getattr(pipeline, name) for name in self._networks.adaptable]

    @property
    def in_memory(self) -> tuple[str, ...]:
        """As they were asked for, the least recently used first."""
        return tuple(map(redact, list(self._loaded.values())))  # the list at one stroke: the device may be changing it

    def check(self, adapters: Sequence[Adapter]) -> tuple[list[Fault], list[str]]:
        """Why adapters do not fit this model, and warnings of what is not applied; takes no time of the device."""
        faults, warnings = [], []
        for adapter in adapters:
            try:
                if adapter.name not in self._fitting:
                    self._fitting[adapter.name] = read_adapter(adapter.file, self._networks).warnings
                warnings += [f"{adapter.field}: {warning}" for warning in self._fitting[adapter.name]]
            except Refused as error:
                faults.append(Fault(adapter.field, str(error)))
        return faults, warnings

    def use(self, adapters: Sequence[Adapter]) -> None:
        """Let exactly these count; whatever was set before does not matter.

        Raises OutOfMemory or GenerationFailed where one of them cannot be loaded.
        """
        wanted = {adapter.name: adapter for adapter in adapters if adapter.asked.scale}  # a DoRA counts even at 0
        if not wanted:
            self._set_aside()
            return
        self._put_back()
        for name in wanted.keys() & self._loaded.keys():
            self._loaded.move_to_end(name)
        for name, adapter in wanted.items():
            if name not in self._loaded:
                self._make_room(self._limit - 1, keep=set(wanted))
                try:
                    self._load(adapter)
                except OutOfMemory as error:
                    free_memory(error)
                    self._make_room(0, keep=set(wanted))
                    self._load(adapter)
        self._pipeline.set_adapters(list(wanted), [adapter.asked.scale for adapter in wanted.values()])

    def _set_aside(self) -> None:
        """Leave the model as if no adapter had ever been loaded: the same layers, the same compiled code."""
        for part in self._parts:
            for name, layer in list(part.named_modules()):
                if isinstance(layer, BaseTunerLayer):
                    parent, _, attribute = name.rpartition(".")
                    self._aside.append((part.get_submodule(parent), attribute, layer))
                    setattr(part.get_submodule(parent), attribute, layer.get_base_layer())

    def _put_back(self) -> None:
        while self._aside:
            parent, attribute, layer = self._aside.pop()
            setattr(parent, attribute, layer)

    def _load(self, adapter: Adapter) -> None:
        path = adapter.summary()["path"]
        try:
            with torch.inference_mode(False), torch.no_grad():  # quantised weights cannot be looked at within it
                weights = read_adapter(adapter.file, self._networks)
                self._pipeline.load_lora_weights(dict(weights.lora), adapter_name=adapter.name)
                for name, (delta, target) in weights.lokr.items():
                    network, _, layer = name.partition(".")
                    delta.put_into(getattr(self._pipeline, network).get_submodule(layer), adapter.name, target)
        except Exception as error:
            self._forget(adapter.name)
            if is_out_of_memory(error):
                raise OutOfMemory(
                    f"there is no room for the adapter {path} beside the model: a lower MEMORY_LIMIT_GB on the worker "
                    "leaves some"
                ) from error
            raise GenerationFailed(f"the adapter {path} could not be loaded: {error}") from error
        self._loaded[adapter.name] = path

    def _make_room(self, most: int, keep: set[str]) -> None:
        """Forget the least recently used, but for `keep`, until `most` are left."""
        for name in list(self._loaded):
            if len(self._loaded) > most and name not in keep:
                self._forget(name)

    def _forget(self, name: str) -> None:
        self._loaded.pop(name, None)
        self._pipeline.delete_adapters(name)
