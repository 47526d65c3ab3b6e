"""Fewer bytes for the weights of a transformer's blocks: smaller, on some cards faster, and not exact.

Adaptive norms stay as they are: they scale everything, and are small once computed ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from src.files import Refused
from src.placement import block_of, is_modulation

_ADA = (8, 9)  # compute capability: the first that multiplies in 8 bits


def quantize(transformer: Any, kind: str, device: torch.device) -> None:
    """Turn the linears of `transformer`'s blocks into `kind`, a row of QUANTIZATIONS, on `device`, one by one.

    Raises Refused where the library for it is missing.
    """
    try:
        _KINDS[kind](transformer, device)
    except ModuleNotFoundError as error:
        raise Refused(f"{kind} wants {error.name}: pip install -r requirements-quantization.txt") from error


def _is_chosen(layer: nn.Module, name: str) -> bool:
    return isinstance(layer, nn.Linear) and block_of(name) is not None and not is_modulation(name)


def _fp8(transformer: Any, device: torch.device) -> None:
    """Products in 8 bits, with a scale for each row, where the card has them; elsewhere small weights alone."""
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        PerRow,
        quantize_,
    )

    products = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _ADA
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()) if products else Float8WeightOnlyConfig()
    quantize_(transformer, config, filter_fn=_is_chosen, device=device)


def _nf4(transformer: Any, device: torch.device) -> None:
    """4 bits, placed where a normal distribution has its values (QLoRA, arXiv 2305.14314), their scales in 8 bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[attr-defined]

    for name, layer in list(transformer.named_modules()):
        if _is_chosen(layer, name):
            small = Linear4bit(  # type: ignore[no-untyped-call]
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=layer.weight.dtype,
                quant_type="nf4",
                device="meta",
            )
            small.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=small)
            small.bias = layer.bias
            transformer.set_submodule(name, small.to(device))


_KINDS: Mapping[str, Callable[[Any, torch.device], None]] = MappingProxyType({"fp8": _fp8, "nf4": _nf4})
