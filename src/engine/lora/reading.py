"""An adapter's file -> what is added to which layer of the model, or why it is no adapter of this model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from src.engine.lora.deltas import Kronecker, LowRank, hadamard, kronecker, low_rank
from src.engine.lora.header import Header
from src.engine.lora.names import AdaptedLayer, Target, flat, layers_by_name, split_prefix
from src.engine.lora.tensors import LayerTensors, other_kind, split_name
from src.errors import Refused
from src.request.tensor_file import TensorFile
from src.settings import Settings

_NAMES_SHOWN, _LETTERS_SHOWN = 3, 100
_CALLED = {"text_encoder_2": "T5 (text_encoder_2)"}


class Networks:
    """The networks of a pipeline that adapters may be of, those of them that take adapters, and how large ones."""

    def __init__(self, pipeline: Any, settings: Settings | None = None) -> None:
        settings = settings or Settings()
        self.max_rank, self.max_bytes = settings.max_lora_rank, int(settings.max_lora_gb * 1e9)
        found = {name: getattr(pipeline, name, None) for name in ("transformer", "text_encoder", "text_encoder_2")}
        networks = {name: network for name, network in found.items() if isinstance(network, nn.Module)}
        self.adaptable = tuple(name for name in getattr(pipeline, "_lora_loadable_modules", ()) if name in networks)
        config = getattr(networks.get("transformer"), "config", None)
        self._latent_channels: int = getattr(config, "out_channels", None) or 0
        self._layers = {
            name: layers_by_name(
                {
                    layer_name: (layer.out_features, layer.in_features)
                    for layer_name, layer in network.named_modules()
                    if isinstance(layer, nn.Linear)
                }
            )
            for name, network in networks.items()
        }

    def find(self, name: str) -> tuple[str, str, AdaptedLayer | None]:
        """Network, flat name and layer that `name` in a file means; network "" where none is named or knows it."""
        network, rest = split_prefix(name)
        names = (flat(rest), flat(rest).replace("_processor_", "_").removesuffix("_lora"))  # attention processors'
        for each in [network] if network else self._layers:
            for key in names:
                if layer := self._layers.get(each, {}).get(key):
                    return each, key, layer
        return network, names[0], None

    def widen(self, layer: LayerTensors) -> None:
        """A LoRA for the latents alone fits an x_embedder that reads more: they come first, as diffusers has it."""
        down = layer.tensors.get("lora_A")
        if layer.adapted.targets[0].layer != "x_embedder" or down is None or down.ndim != 2:
            return
        if down.shape[1] == self._latent_channels < layer.shape[1]:
            layer.tensors["lora_A"] = nn.functional.pad(down, (0, layer.shape[1] - down.shape[1]))


@dataclass(frozen=True)
class AdapterWeights:
    """What is added to which layer, by diffusers' names.

    `lora` is a state dict with its alphas multiplied in; in it a LoRA of nothing stands for each layer of `lokr`.
    `warnings` name what is not applied.
    """

    lora: Mapping[str, torch.Tensor]
    lokr: Mapping[str, tuple[Kronecker, Target]]
    warnings: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        tensors = [*self.lora.values(), *(tensor for delta, _ in self.lokr.values() for tensor in delta.tensors)]
        return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


class AdapterFile:
    """A file that is an adapter of these networks as far as its header says; `size` is its bytes once it is read.

    Raises Refused where it is none or larger than the settings allow, and OSError where it cannot be read.
    """

    def __init__(self, path: Path, networks: Networks) -> None:
        self._file = TensorFile(path)
        self._networks = networks
        self._header = Header(self._file.metadata)
        self._layers, not_applied = _by_layer(self._file, networks)
        self.warnings = _warnings(not_applied)
        with torch.device("meta"):  # shapes alone
            self.size = self._weights(self._layers).size
        if self.size > networks.max_bytes:
            raise Refused(
                f"has {self.size:,} bytes once it is read in float32, more than the {networks.max_bytes / 1e9:g} GB of "
                "the worker's MAX_LORA_GB"
            )

    def read(self) -> AdapterWeights:
        """All of it, in float32. Raises Refused where its values are no weights, and OSError."""
        return self._weights(self._with_values())

    def check(self) -> None:
        """`read`, one layer at a time in memory."""
        for layer in self._with_values():
            _delta(layer, self._networks, self._header)

    def _with_values(self) -> Iterator[LayerTensors]:
        with self._file.opened() as opened:
            for layer in self._layers:
                yield layer.with_values(self._file, opened)

    def _weights(self, layers: Iterable[LayerTensors]) -> AdapterWeights:
        deltas: dict[str, LowRank] = {}
        lokr: dict[str, tuple[Kronecker, Target]] = {}
        for layer in layers:
            delta = _delta(layer, self._networks, self._header)
            for target in layer.adapted.targets:
                name = f"{layer.network}.{target.layer}"
                if name in lokr or (name in deltas and isinstance(delta, Kronecker)):
                    raise Refused(f"adapts the layer {name} twice, one time as a LoKr, which cannot be added up here")
                if isinstance(delta, Kronecker):
                    lokr[name] = delta, target
                    part = LowRank(torch.zeros(1, layer.shape[1]), torch.zeros(target.out_features, 1))
                else:
                    part = delta.of(target)
                deltas[name] = deltas[name].plus(part) if name in deltas else part
        return AdapterWeights(_state_dict(deltas), lokr, self.warnings)


def _by_layer(file: TensorFile, networks: Networks) -> tuple[Sequence[LayerTensors], Mapping[str, Sequence[str]]]:
    """The tensors by the layers that a trainer saw, and the names of those whose network takes no adapters."""
    layers: dict[tuple[str, str], LayerTensors] = {}
    not_applied: dict[str, list[str]] = {}
    unknown = []
    names = {key: split_name(key) for key in file.tensors}
    if not any(parameter for _, parameter in names.values()):
        kind = next((f": it is {kind}, which is not applied here" for key in names if (kind := other_kind(key))), "")
        raise Refused(f"holds no LoRA layers{kind}")
    for key, (name, parameter) in names.items():
        network, flat_name, adapted = networks.find(name or key)
        if network and network not in networks.adaptable:
            not_applied.setdefault(network, []).append(key)
        elif not parameter:
            unknown.append(key)
        elif adapted is None:
            raise Refused(f"was made for another model: this one has no layer {name[:_LETTERS_SHOWN]}")
        else:
            layer = layers.setdefault(
                (network, flat_name), LayerTensors(network, name[:_LETTERS_SHOWN], adapted, networks.max_rank)
            )
            layer.add(parameter, key, file)
    if unknown:
        kind = next((f" ({kind})" for key in unknown if (kind := other_kind(key))), "")
        raise Refused(
            f"holds more than LoRA layers{kind}, which would change the model for everybody: {_shown(unknown)}"
        )
    if not layers:
        raise Refused(f"holds layers of {' and '.join(not_applied)} alone, to which adapters are not applied here")
    return tuple(layers.values()), not_applied


def _delta(layer: LayerTensors, networks: Networks, header: Header) -> LowRank | Kronecker:
    """What `layer` adds to its weight, of that weight's shape. Raises Refused."""
    delta: LowRank | Kronecker
    if any(name.startswith("lokr_") for name in layer.tensors):
        delta = kronecker(layer)
    elif any(name.startswith("hada_") for name in layer.tensors):
        delta = hadamard(layer)
    else:
        networks.widen(layer)
        delta = low_rank(layer, partial(header.scale, layer.network, layer.adapted.targets[0].layer))
    if not all(tensor.is_meta or tensor.isfinite().all() for tensor in delta.tensors):
        raise Refused(f"holds values in {layer.name} that are not finite once they are multiplied: it is broken")
    return delta


def _state_dict(deltas: Mapping[str, LowRank]) -> dict[str, torch.Tensor]:
    """The layers as diffusers loads them; what PEFT wants of all layers or of none is of all of a network's."""
    state_dict = {}
    with_bias = {_network(name) for name, delta in deltas.items() if delta.bias is not None}
    with_magnitude = {_network(name) for name, delta in deltas.items() if delta.magnitude is not None}
    if with_bias & with_magnitude:
        raise Refused("is a DoRA with a bias in some of its layers, which cannot be applied here together")
    for name, delta in deltas.items():
        state_dict[f"{name}.lora_A.weight"] = delta.down.contiguous()
        state_dict[f"{name}.lora_B.weight"] = delta.up.contiguous()
        if _network(name) in with_bias:
            state_dict[f"{name}.lora_B.bias"] = torch.zeros(delta.shape[0]) if delta.bias is None else delta.bias
        if _network(name) in with_magnitude:
            if delta.magnitude is None:
                raise Refused(f"is a DoRA in some of its layers and none in others, {name} among them")
            state_dict[f"{name}.lora_magnitude_vector"] = delta.magnitude
    return state_dict


def _network(name: str) -> str:
    return name.partition(".")[0]


def _warnings(not_applied: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(
        f"{len(keys)} of its tensors are of {_CALLED.get(network, network)}, to which adapters are not applied here: "
        f"{_shown(keys)}"
        for network, keys in not_applied.items()
    )


def _shown(names: Sequence[str]) -> str:
    """The first of `names`, each within its limit, and how many more there are."""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(name[:_LETTERS_SHOWN] for name in names[:_NAMES_SHOWN]) + more
