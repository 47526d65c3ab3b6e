"""Fewer bytes for the weights of a transformer's blocks: smaller, on some cards faster, and not exact.

Adaptive norms stay as they are: they scale everything, and are small once computed ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import nn

from src.files import Refused, keep
from src.placement import block_of, is_modulation

_ADA = (8, 9)  # compute capability: the first that multiplies in 8 bits


class Quantization:
    """One row of QUANTIZATIONS on one device, and the folder where the next worker finds what this one made."""

    def __init__(self, kind: str, device: torch.device, folder: Path = Path()) -> None:
        self._row = _KINDS[kind]
        self._device = device
        self._folder = folder
        made_for = f"{device.type}{'-products' if _has_products(device) else ''}"
        try:
            self._name = f"{kind}-{self._row.library}-{version(self._row.library)}-{made_for}"
        except PackageNotFoundError as error:
            raise Refused(f"{kind} wants {error.name}: pip install -r requirements-quantization.txt") from error

    def quantize(self, transformer: Any) -> None:
        """Turn the linears of `transformer`'s blocks into small ones on the device, one by one."""
        self._row.quantize(transformer, self._device)

    def file(self, model: str) -> Path:
        """Where the quantized weights of `model` are kept."""
        return self._folder / f"{model}-{self._name}.pt"

    def keep(self, transformer: Any, file: Path) -> None:
        """Write the weights; nothing is kept where the folder cannot be made."""
        keep(file, lambda unfinished: torch.save(transformer.state_dict(), unfinished))

    def restore(self, transformer: Any, file: Path) -> None:
        """Give `transformer`, which has no weights yet, those that were kept; no code in them is run."""
        self._row.restore(transformer, torch.load(file, map_location="cpu", mmap=True, weights_only=True))


class _Kind(Protocol):
    library: str

    def quantize(self, transformer: Any, device: torch.device) -> None: ...

    def restore(self, transformer: Any, weights: dict[str, Any]) -> None: ...


class _Fp8:
    """Products in 8 bits, with a scale for each row, where the card has them; elsewhere small weights alone."""

    library = "torchao"

    def quantize(self, transformer: Any, device: torch.device) -> None:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Float8WeightOnlyConfig,
            PerRow,
            quantize_,
        )

        products = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
        config = products if _has_products(device) else Float8WeightOnlyConfig()
        quantize_(transformer, config, filter_fn=_is_chosen, device=device)

    def restore(self, transformer: Any, weights: dict[str, Any]) -> None:
        transformer.load_state_dict(weights, assign=True)


class _Nf4:
    """4 bits, placed where a normal distribution has its values (QLoRA, arXiv 2305.14314), their scales in 8 bits."""

    library = "bitsandbytes"

    def quantize(self, transformer: Any, device: torch.device) -> None:
        from bitsandbytes.nn import Params4bit

        for name, layer, small in self._replaced(transformer):
            small.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=small)
            small.bias = layer.bias
            transformer.set_submodule(name, small.to(device))

    def restore(self, transformer: Any, weights: dict[str, Any]) -> None:
        from bitsandbytes.nn import Params4bit

        for name, _, small in self._replaced(transformer):
            told = {key: weights.pop(key) for key in list(weights) if key.startswith(f"{name}.weight")}
            data = told.pop(f"{name}.weight")
            small.weight = Params4bit.from_prequantized(
                data, {key.removeprefix(f"{name}."): value for key, value in told.items()}, device="cpu", module=small
            )
            transformer.set_submodule(name, small)
        transformer.load_state_dict(weights, assign=True, strict=False)

    def _replaced(self, transformer: Any) -> Iterator[tuple[str, nn.Linear, Any]]:
        """Each chosen layer with an empty one that may stand in its place."""
        from bitsandbytes.nn import Linear4bit

        for name, layer in list(transformer.named_modules()):
            if _is_chosen(layer, name):
                yield (
                    name,
                    layer,
                    Linear4bit(
                        layer.in_features,
                        layer.out_features,
                        bias=layer.bias is not None,
                        compute_dtype=layer.weight.dtype,
                        quant_type="nf4",
                        device="meta",
                    ),
                )


_KINDS: Mapping[str, _Kind] = MappingProxyType({"fp8": _Fp8(), "nf4": _Nf4()})


def _is_chosen(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, nn.Linear) and block_of(name) is not None and not is_modulation(name)


def _has_products(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _ADA
