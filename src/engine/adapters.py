"""LoRA adapters on a loaded pipeline: which fit, which are in memory, which count for a picture."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from src.engine.memory import free_memory, is_out_of_memory
from src.errors import Fault, GenerationFailed, OutOfMemory, redact
from src.request.adapters import Adapter


class Adapters:
    """Holds at most `limit` adapters in memory; the least recently used goes first."""

    def __init__(self, pipeline: Any, limit: int) -> None:
        self._pipeline = pipeline
        self._limit = limit
        self._loaded: OrderedDict[str, str] = OrderedDict()  # names, and the paths that they were asked for by
        self._fitting: set[str] = set()  # names of files that were checked
        self._aside: list[tuple[nn.Module, str, BaseTunerLayer]] = []  # layers with adapters, and where they belong
        parts = {name: getattr(pipeline, name, None) for name in ("transformer", "text_encoder")}
        self._parts = [part for part in parts.values() if isinstance(part, nn.Module)]
        self._shapes = {
            f"{part}.{name}": (layer.out_features, layer.in_features)
            for part, network in parts.items()
            if isinstance(network, nn.Module)
            for name, layer in network.named_modules()
            if isinstance(layer, nn.Linear)
        }

    @property
    def in_memory(self) -> tuple[str, ...]:
        """As they were asked for, the least recently used first."""
        return tuple(map(redact, list(self._loaded.values())))  # the list at one stroke: the device may be changing it

    def faults(self, adapters: Sequence[Adapter]) -> list[Fault]:
        """Why adapters do not fit this model; takes no time of the device."""
        found = []
        for adapter in adapters:
            if adapter.name not in self._fitting:
                reason = self._misfit(adapter.file)
                if reason:
                    found.append(Fault(adapter.field, reason))
                else:
                    self._fitting.add(adapter.name)
        return found

    def use(self, adapters: Sequence[Adapter]) -> None:
        """Let exactly these count; whatever was set before does not matter.

        Raises OutOfMemory or GenerationFailed where one of them cannot be loaded.
        """
        wanted = {adapter.name: adapter for adapter in adapters}
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
                self._pipeline.load_lora_weights(load_file(adapter.file), adapter_name=adapter.name)
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

    def _misfit(self, file: Path) -> str:
        """Why the file is no adapter of this model; empty where it is one.

        A layer of [out, in] wants lora_A [rank, in] and lora_B [out, rank].
        """
        try:
            tensors = type(self._pipeline).lora_state_dict(load_file(file))
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            return f"is no adapter in a format that diffusers reads ({type(error).__name__}: {error})"[:300]
        layers = {name.rpartition(".lora_")[0] for name in tensors if ".lora_" in name}
        if not layers:
            return "holds no LoRA layers"
        if others := [name for name in tensors if ".lora_" not in name and "alpha" not in name]:
            return f"holds more than LoRA layers, which would change the model for everybody: {', '.join(others)}"[:300]
        for layer in sorted(layers):
            here = self._shapes.get(layer)
            if here is None:
                return f"was made for another model: this one has no layer {layer}"
            down, up = tensors.get(f"{layer}.lora_A.weight"), tensors.get(f"{layer}.lora_B.weight")
            if down is None or up is None:
                return f"is not complete: {layer} lacks lora_A or lora_B"
            if (up.shape[0], down.shape[1]) != here or up.shape[1] != down.shape[0]:
                there = f"{up.shape[0]}x{down.shape[1]}"
                return f"was made for another model: {layer} is {here[0]}x{here[1]} here and {there} there"
        return ""
