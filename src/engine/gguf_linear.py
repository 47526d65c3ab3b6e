"""Linears whose weights stay as small as their GGUF file has them, and are numbers only while they are at work.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. diffusers' functions take its blocks apart,
here in float32: its own GGUFLinear rounds to float16 on the way.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import torch
from diffusers.quantizers.gguf.utils import dequantize_functions
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import nn


class GGUFParameter(nn.Parameter):
    """The blocks of a matrix, uint8 [rows, bytes of a row]; those of a kind have a class of their own.

    diffusers tells them by this name when it loads adapters, and asks them for `quant_shape`. Their class says the
    kind: accelerate makes parameters anew from their class and memory alone.
    """

    kind: ClassVar[GGMLQuantizationType]

    @property
    def quant_shape(self) -> tuple[int, int]:
        """Of the values: [rows, columns]."""
        values, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[0], self.shape[1] // size * values


@cache
def _parameter_class(kind: GGMLQuantizationType) -> type[GGUFParameter]:
    return type(GGUFParameter.__name__, (GGUFParameter,), {"kind": kind})


class GGUFLinear(nn.Linear):
    """A linear with weights of `kind`; `blocks` are theirs, uint8 [out_features, bytes of a row]."""

    def __init__(self, layer: nn.Linear, kind: GGMLQuantizationType, blocks: torch.Tensor) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self.kind = kind
        self.weight = _parameter_class(kind)(blocks, requires_grad=False)
        self.bias: Any = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        weight = dequantize(self.weight, self.kind).view(self.out_features, self.in_features)
        return nn.functional.linear(x, weight.to(x.dtype), self.bias)


def can_stay(layer: Any, kind: GGMLQuantizationType, rows: torch.Tensor) -> bool:
    """Whether `rows`, uint8 [rows, bytes of a row], may stay the weights of `layer` as they are."""
    values, size = GGML_QUANT_SIZES[kind]
    wanted = isinstance(layer, nn.Linear) and (layer.out_features, layer.in_features * size)
    return wanted == (rows.shape[0], rows.shape[-1] * values)


def dequantize(blocks: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """The values of `blocks`, uint8, as a row: float32, the very ones of the gguf package's own reference."""
    values, size = GGML_QUANT_SIZES[kind]
    found: torch.Tensor = dequantize_functions[kind](blocks.reshape(-1, size), values, size, torch.float32)
    return found.flatten()
