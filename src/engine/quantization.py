"""Fewer bytes for the weights of a transformer's blocks: smaller, on some cards faster, and not exact.

Adaptive norms stay as they are: they scale everything, and are small once computed ahead. Libraries differ from machine
to machine, so nothing is taken for granted: each quantized layer is held against what it was made from.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from src.catalog import QUANTIZATIONS
from src.engine.staging import Staging
from src.errors import InvalidSettings, Refused
from src.weights.disk import keep
from src.weights.placement import block_of, is_modulation

log = logging.getLogger("worker")

_ADA = (8, 9)  # compute capability: the first that multiplies in 8 bits
_FORMAT = 2  # of the files that are kept
_PROBES = 16  # rows of random numbers that each layer is asked with

Answers = dict[str, torch.Tensor]  # of layers by name: [_PROBES, out_features]


class Quantizer:
    """One row of QUANTIZATIONS on one device, and the folder where the next worker finds what this one made."""

    def __init__(self, kind: str, device: torch.device, folder: Path = Path(), staging: Staging | None = None) -> None:
        self._kind = kind
        self._backend = _BACKENDS[kind]
        self._device = device
        self._staging = staging or Staging(device)
        self._folder = folder
        if kind == "fp8" and not has_products(device):
            log.info("fp8: this device multiplies in 16 bits, so its weights are smaller and its products no faster")
        made_for = f"{device.type}{'-products' if has_products(device) else ''}"
        try:
            self._name = f"{kind}-{_FORMAT}-{self._backend.name}-{version(self._backend.name)}-{made_for}"
        except PackageNotFoundError as error:
            raise Refused(f"{kind} wants {error.name}: pip install -r requirements-quantization.txt") from error

    def quantize(self, transformer: Any) -> Answers:
        """Turn the linears of `transformer`'s blocks into small ones on the device, one by one; what they answered.

        Raises InvalidSettings where a layer does not answer what it did, within what its kind may lose.
        """
        answers = {}
        for name in _chosen(transformer):  # one layer at a time is on the device in both forms
            layer = transformer.get_submodule(name)
            self._staging.bring(layer.parameters())
            answers[name] = _ask(layer).cpu()
            transformer.set_submodule(name, self._backend.quantize(layer, self._device))
            del layer
            self._check(name, transformer.get_submodule(name), answers[name])
        return answers

    def file(self, model: str) -> Path:
        """Where the quantized weights of `model` are kept."""
        return self._folder / f"{model}-{self._name}.pt"

    def keep(self, transformer: Any, answers: Answers, file: Path) -> None:
        """Write the weights, and what their layers answered; nothing is kept where the folder cannot be made."""
        kept = {"weights": transformer.state_dict(), "answers": answers}
        keep(file, "QUANTIZED_DIR", lambda unfinished: torch.save(kept, unfinished))

    def restore(self, transformer: Any, file: Path) -> bool:
        """Give `transformer`, which has no weights yet, those that were kept; no code in them is run.

        False where there are none, or none that still answer as they did: they are to be made anew.
        """
        if not file.is_file():
            return False
        try:
            kept = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            self._backend.restore(transformer, kept["weights"])
            for name, answer in kept["answers"].items():
                self._check(name, transformer.get_submodule(name).to(self._device), answer)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with it, the weights that it was made from are here
            log.warning("%s is not used, and made anew: %s", file, error)
            return False
        return True

    def _check(self, name: str, layer: nn.Module, answer: torch.Tensor) -> None:
        here = _ask(layer).cpu().float()
        there = answer.float()
        lost = float((here - there).norm() / there.norm().clamp(min=torch.finfo(there.dtype).tiny))
        most = QUANTIZATIONS[self._kind].max_error
        if not lost <= most:  # also where it is no number
            raise InvalidSettings(
                f"QUANTIZATION={self._kind}: on this device ({self._device.type}) the layer {name} with "
                f"{layer.in_features} inputs loses {lost:.2f} of what it was made from, and {most:g} is allowed; "
                f"{self._backend.name} {version(self._backend.name)} does not work here: choose another QUANTIZATION"
            )


class _Backend(Protocol):
    name: str

    def quantize(self, layer: nn.Linear, device: torch.device) -> nn.Module:
        """`layer`, which is on `device`, with small weights."""

    def restore(self, transformer: Any, weights: dict[str, Any]) -> None:
        """Give `transformer` the weights of its state_dict, small ones among them."""


class _TorchAo:
    """Products in 8 bits, with a scale for each row, where the card has them; elsewhere small weights alone."""

    name = "torchao"

    def quantize(self, layer: nn.Linear, device: torch.device) -> nn.Module:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Float8WeightOnlyConfig,
            PerRow,
            quantize_,
        )

        products = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        quantize_(layer, products if has_products(device) else Float8WeightOnlyConfig())
        return layer

    def restore(self, transformer: Any, weights: dict[str, Any]) -> None:
        transformer.load_state_dict(weights, assign=True)


class _BitsAndBytes:
    """4 bits, placed where a normal distribution has its values (QLoRA, arXiv 2305.14314), their scales in 8 bits."""

    name = "bitsandbytes"

    def quantize(self, layer: nn.Linear, device: torch.device) -> nn.Module:
        from bitsandbytes.nn import Params4bit

        small = self._empty(layer)
        small.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=small)
        small.bias = layer.bias
        moved: nn.Module = small.to(device)
        return moved

    def restore(self, transformer: Any, weights: dict[str, Any]) -> None:
        from bitsandbytes.nn import Params4bit

        for name in _chosen(transformer):
            small = self._empty(transformer.get_submodule(name))
            own = {key: weights.pop(key) for key in list(weights) if key.startswith(f"{name}.weight")}
            data = own.pop(f"{name}.weight")
            small.weight = Params4bit.from_prequantized(
                data, {key.removeprefix(f"{name}."): value for key, value in own.items()}, device="cpu", module=small
            )
            transformer.set_submodule(name, small)
        transformer.load_state_dict(weights, assign=True, strict=False)

    def _empty(self, layer: nn.Linear) -> Any:
        """What may stand in the place of `layer`, without weights."""
        from bitsandbytes.nn import Linear4bit

        return Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
            device="meta",
        )


_BACKENDS: Mapping[str, _Backend] = MappingProxyType({"fp8": _TorchAo(), "nf4": _BitsAndBytes()})


def _chosen(transformer: Any) -> list[str]:
    """The linears of the blocks, adaptive norms aside, by their names."""
    return [
        name
        for name, layer in transformer.named_modules()
        if isinstance(layer, nn.Linear) and block_of(name) is not None and not is_modulation(name)
    ]


@torch.no_grad()
def _ask(layer: Any) -> torch.Tensor:
    """What `layer` answers to random numbers without its bias: [_PROBES, out_features]."""
    layer = deepcopy(layer)  # bitsandbytes packs a layer's weights when it is first asked
    layer.bias = None  # it is exact, and a large one would hide what is lost
    dtype = getattr(layer, "compute_dtype", None) or layer.weight.dtype
    rows = torch.randn(_PROBES, layer.in_features, generator=torch.Generator().manual_seed(0))
    answer: torch.Tensor = layer(rows.to(layer.weight.device, dtype))
    return answer


def has_products(device: torch.device) -> bool:
    """Whether it multiplies in 8 bits; others keep fp8 weights alone, which are smaller and no faster."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _ADA
