"""LoRA adapters on a loaded pipeline: which fit, which are in memory, which count for a picture."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from src.engine.loading_lock import LOADING
from src.engine.lora import AdapterFile, AdapterWeights, Networks
from src.engine.lora_slots import SLOTS, LoraSlots
from src.engine.memory import is_out_of_memory, load_with_room
from src.errors import AdapterUnavailable, Fault, GenerationFailed, OutOfMemory, Refused, WorkerFault
from src.redaction import redact
from src.request.adapter_cache import reason
from src.request.adapters import Adapter
from src.settings import Settings
from src.weights.ledger import ExtraKind, Ledger

_REMEMBERED = 1_000  # files whose warnings are known
_HANDED_OVER = 2_000_000_000  # bytes of weights that may wait in the host's memory until their pictures are drawn


class CheckedAdapters:
    """What jobs' threads know of adapters' files, and weights that they read, for whichever engine gets the job."""

    def __init__(self) -> None:
        self.one_at_a_time = threading.Lock()  # for all below
        self.fitting: OrderedDict[str, tuple[str, ...]] = OrderedDict()  # names of files that were checked: warnings
        self.read: WeakKeyDictionary[Adapter, AdapterWeights] = WeakKeyDictionary()  # for as long as their request
        self.reading = 0  # bytes of weights on their way there
        self.holders: list[OrderedDict[str, str]] = []  # what each engine holds in memory, by name

    def take(self, adapter: Adapter) -> AdapterWeights | None:
        """The weights that were read for this request."""
        with self.one_at_a_time:
            return self.read.get(adapter)

    def drop(self, adapter: Adapter) -> None:
        """An engine holds them now."""
        with self.one_at_a_time:
            self.read.pop(adapter, None)

    def forget(self, name: str) -> None:
        """The file is checked anew when it is asked for again."""
        with self.one_at_a_time:
            self.fitting.pop(name, None)


class Adapters:
    """Holds at most MAX_LORAS adapters in memory, as far as there is room; the least recently used goes first."""

    def __init__(self, pipeline: Any, settings: Settings, ledger: Ledger, slots: LoraSlots | None = None) -> None:
        self.warnings: tuple[str, ...] = ()  # of those that count
        self._pipeline = pipeline
        self._ledger = ledger
        self._slots = slots
        self._limit = settings.max_loras
        self._loaded: OrderedDict[str, str] = OrderedDict()  # names, and the paths that they were asked for by
        self._used: tuple[str, ...] = ()  # names that count for the picture
        self._of_text_encoders = set[str]()  # names of those that have layers there
        self._checked = CheckedAdapters()
        self._checked.holders.append(self._loaded)
        self._aside: list[tuple[nn.Module, str, BaseTunerLayer]] = []  # layers with adapters, and where they belong
        self._networks = Networks(pipeline, settings)
        self._parts = [getattr(pipeline, name) for name in self._networks.adaptable]

    def share(self, other: Adapters) -> None:
        """Check and read files together with `other`, which is of the same model on another device."""
        self._checked = other._checked
        self._checked.holders.append(self._loaded)

    @property
    def in_memory(self) -> tuple[str, ...]:
        """As they were asked for, the least recently used first."""
        return tuple(map(redact, list(self._loaded.values())))  # the list at one stroke: the device may be changing it

    @property
    def change_text_encoders(self) -> bool:
        """Whether any in memory has layers there."""
        return bool(self._of_text_encoders)

    def check(self, adapters: Sequence[Adapter]) -> tuple[list[Fault], list[str]]:
        """Why adapters do not fit this model, and warnings of what is not applied; takes no time of the device.

        What the device does not hold yet is read here, and handed over. Raises OutOfMemory.
        """
        faults, warnings = list[Fault](), list[str]()
        for adapter in adapters:
            try:
                warnings += [f"{adapter.field}: {warning}" for warning in self._check(adapter)]
            except Refused as error:
                faults.append(Fault(adapter.field, str(error)))
            except OSError as error:
                faults.append(WorkerFault(adapter.field, _unreadable(error)))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                raise OutOfMemory(f"there is no room in the host's memory to read {adapter.field}") from error
        return faults, warnings

    def use(self, adapters: Sequence[Adapter]) -> None:
        """Let exactly these count; whatever was set before does not matter.

        Raises OutOfMemory, AdapterUnavailable or GenerationFailed where one of them cannot be loaded.
        """
        wanted = {adapter.name: adapter for adapter in adapters if adapter.asked.scale}  # a DoRA counts even at 0
        self._used = tuple(wanted)
        if self._slots:
            self._slots.take_out()
        if wanted:
            self._count(wanted)
        else:
            self._set_aside()
        self.warnings = tuple(self._slots.put_in(self._with_room_for_slots)) if self._slots else ()

    def _count(self, wanted: Mapping[str, Adapter]) -> None:
        self._put_back()
        for name in wanted.keys() & self._loaded.keys():
            self._loaded.move_to_end(name)
        for name, adapter in wanted.items():
            if name not in self._loaded:
                self._make_room(self._limit - 1, keep=set(wanted))
                self._load(adapter)
        try:
            self._pipeline.set_adapters(list(wanted), [adapter.asked.scale for adapter in wanted.values()])
        except Exception as error:
            if is_out_of_memory(error):
                raise
            self.forget_used()
            raise GenerationFailed(f"the adapters could not be set: {error}") from error

    def _with_room_for_slots(self, size: int, make: Callable[[], None]) -> None:
        if self._slots:
            self._ledger.remove(SLOTS)
            load_with_room(self._ledger, make, name=SLOTS, kind=ExtraKind.ADAPTER, size=size, leave=self._slots.free)

    def forget_used(self) -> None:
        """The picture failed: whatever of its adapters is in memory is not used again, but read anew."""
        for name in self._used:
            self._checked.forget(name)
            self._forget(name)
        self._used = ()

    def _check(self, adapter: Adapter) -> tuple[str, ...]:
        """Warnings of what is not applied. Raises Refused and OSError."""
        checked = self._checked
        with checked.one_at_a_time:
            known = checked.fitting.get(adapter.name)
        if known is not None and all(adapter.name in loaded for loaded in checked.holders):
            return known
        with checked.one_at_a_time:
            same = next((weights for other, weights in checked.read.items() if other.name == adapter.name), None)
            if same is not None:
                checked.read[adapter] = same
                return same.warnings
        file = AdapterFile(adapter.file, self._networks)
        with checked.one_at_a_time:
            waiting = checked.reading + sum({id(weights): weights.size for weights in checked.read.values()}.values())
            handed_over = file.size if waiting + file.size <= _HANDED_OVER else 0
            checked.reading += handed_over
        try:
            if handed_over:
                weights = file.read()
                with checked.one_at_a_time:
                    checked.read[adapter] = weights
            elif known is None:
                file.check()
        finally:
            with checked.one_at_a_time:
                checked.reading -= handed_over
        with checked.one_at_a_time:
            checked.fitting[adapter.name] = file.warnings
            checked.fitting.move_to_end(adapter.name)
            if len(checked.fitting) > _REMEMBERED:
                checked.fitting.popitem(last=False)
        return file.warnings

    def _set_aside(self) -> None:
        """Leave the model as if no adapter had ever been loaded: the same layers, the same compiled code."""
        for part in self._parts:
            for name, layer in list(part.named_modules()):
                if isinstance(layer, BaseTunerLayer):
                    parent, _, attribute = name.rpartition(".")
                    self._aside.append((part.get_submodule(parent), attribute, layer))
                    setattr(part.get_submodule(parent), attribute, layer.get_base_layer())

    def _put_back(self) -> None:
        if self._slots:
            self._slots.take_out()
        while self._aside:
            parent, attribute, layer = self._aside.pop()
            setattr(parent, attribute, layer)

    def _load(self, adapter: Adapter) -> None:
        path = adapter.summary()["path"]
        try:
            with torch.inference_mode(False):
                weights = self._checked.take(adapter) or AdapterFile(adapter.file, self._networks).read()
            load_with_room(
                self._ledger,
                lambda: self._add(adapter.name, weights),
                name=adapter.name,
                kind=ExtraKind.ADAPTER,
                size=weights.size * self._pipeline.dtype.itemsize // torch.float32.itemsize,  # once it is there
                leave=lambda: self._forget(adapter.name),
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise OutOfMemory(
                    f"there is no room for the adapter {path} on this card, even with as little of the model on it as "
                    "MEMORY_MODE allows: choose another MEMORY_MODE or a larger card"
                ) from error
            if isinstance(error, OSError):
                raise AdapterUnavailable(f"{adapter.field}: {_unreadable(error)}") from error
            raise GenerationFailed(f"the adapter {path} could not be loaded: {error}") from error
        self._loaded[adapter.name] = path
        if any(not name.startswith("transformer.") for name in weights.lora):
            self._of_text_encoders.add(adapter.name)
        self._checked.drop(adapter)

    def _add(self, name: str, weights: AdapterWeights) -> None:
        """Put it into the model; where it cannot be, the model is as it was."""
        before = _Parameters(self._parts)
        try:
            # Quantised weights cannot be looked at in inference mode.
            with LOADING.layers(), torch.inference_mode(False), torch.no_grad():
                self._pipeline.load_lora_weights(dict(weights.lora), adapter_name=name)
                for layer_name, (delta, target) in weights.lokr.items():
                    network, _, layer = layer_name.partition(".")
                    delta.put_into(getattr(self._pipeline, network).get_submodule(layer), name, target)
            before.check()
        except Exception:
            try:
                self._delete(name)
            finally:
                before.restore()
            raise

    def _make_room(self, most: int, keep: set[str]) -> None:
        """Forget the least recently used, but for `keep`, until `most` are left."""
        for name in list(self._loaded):
            if len(self._loaded) > most and name not in keep:
                self._forget(name)

    def _forget(self, name: str) -> None:
        self._ledger.remove(name)
        self._loaded.pop(name, None)
        self._delete(name)
        self._of_text_encoders.discard(name)  # last: until then nobody reads prompts ahead

    def _delete(self, name: str) -> None:
        aside, filled = bool(self._aside), self._slots is not None and self._slots.filled
        self._put_back()
        self._pipeline.delete_adapters(name)
        if aside:  # the picture that makes it leave counts none
            self._set_aside()
        if self._slots and filled:
            self._slots.put_in(self._with_room_for_slots)


class _Parameters:
    """The parameters that networks have now, and the modules that they are of: loading an adapter adds to them."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._networks = networks
        modules = [module for network in networks for module in network.modules()]
        self._children = [(module, name, child) for module in modules for name, child in module.named_children()]
        self._found = [
            (module, name, parameter, _kind(parameter))
            for module in modules
            for name, parameter in module.named_parameters(recurse=False)
        ]

    def check(self) -> None:
        """Raise RuntimeError where one of them is another by now, or one that was added is none to compute with."""
        added = {id(parameter) for network in self._networks for parameter in network.parameters()}
        for module, name, parameter, kind in self._found:
            now = getattr(module, name)
            added.discard(id(now))
            if _kind(now)[:2] != kind[:2] or _kind(now)[2] > kind[2]:
                raise RuntimeError(f"it changed the model's own {name} of {tuple(parameter.shape)}")
        for network in self._networks:
            for name, parameter in network.named_parameters():
                if id(parameter) in added and (parameter.is_meta or not parameter.is_floating_point()):
                    raise RuntimeError(f"its {name} has no values to compute with")

    def restore(self) -> None:
        """Put back what is another by now."""
        for parent, name, child in self._children:
            if getattr(parent, name, None) is not child:
                setattr(parent, name, child)
        for module, name, parameter, kind in self._found:
            if _kind(getattr(module, name)) != kind:
                setattr(module, name, parameter.requires_grad_(kind[2]))


def _kind(parameter: nn.Parameter) -> tuple[torch.dtype, bool, bool]:
    return parameter.dtype, parameter.is_meta, parameter.requires_grad


def _unreadable(error: OSError) -> str:
    return f"could not be read on this worker: {reason(error)}"
