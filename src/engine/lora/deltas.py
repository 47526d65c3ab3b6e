"""What the tensors of one layer add to its weight: a LoRA or a LoHa, two thin matrices; a LoKr, a Kronecker product."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from src.engine.lora.names import Target
from src.engine.lora.tensors import LayerTensors
from src.errors import Refused

_WIDEST = 8  # times a layer's features: trainers' factors make them once, or a little more


@dataclass(frozen=True)
class LowRank:
    """up @ down [out, in]; `bias` [out] comes on top."""

    down: torch.Tensor
    up: torch.Tensor
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None  # [out], of a DoRA

    @property
    def shape(self) -> tuple[int, int]:
        """Features that go out and in."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it is made of."""
        return tuple(each for each in (self.down, self.up, self.bias, self.magnitude) if each is not None)

    def of(self, target: Target) -> LowRank:
        """The part that is added to one of the layers that were one."""
        bias, magnitude = (each if each is None else target.select(each) for each in (self.bias, self.magnitude))
        return LowRank(self.down, target.select(self.up), bias, magnitude)

    def plus(self, other: LowRank) -> LowRank:
        """Both, in one. Raises Refused for a DoRA, which is no sum."""
        if self.magnitude is not None or other.magnitude is not None:
            raise Refused("adapts a layer twice, one time as a DoRA, which cannot be added up")
        biases = [each for each in (self.bias, other.bias) if each is not None]
        down, up = torch.cat([self.down, other.down]), torch.cat([self.up, other.up], dim=1)
        return LowRank(down, up, sum(biases[1:], biases[0]) if biases else None)


@dataclass(frozen=True)
class Kronecker:
    """kron(w1, w2) [out, in]."""

    w1: torch.Tensor
    w2: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it is made of."""
        return self.w1, self.w2

    def put_into(self, layer: Any, adapter_name: str, target: Target) -> None:
        """Let it stand for the two matrices that PEFT's LoRA `layer` holds under this name.

        PEFT's own LoKr holds only factors that it would have chosen, and no rows of a layer; and it makes the whole
        delta at every step, where two products of the factors do.
        """
        like = layer.lora_A[adapter_name].weight
        layer.lora_A[adapter_name] = KroneckerDown(self.w2.to(like))
        layer.lora_B[adapter_name] = KroneckerUp(self.w1.to(like), target)


def low_rank(layer: LayerTensors, scale: Callable[[int], float]) -> LowRank:
    """Of a LoRA, whose delta is alpha / rank * up @ down; without an alpha `scale` says what a rank is scaled by.

    https://arxiv.org/abs/2106.09685, section 4.1. A bias alone is a LoRA of nothing. Raises Refused.
    """
    tensors, (out, into) = layer.only("lora_"), layer.shape
    down, up, bias = tensors.get("lora_A"), tensors.get("lora_B"), layer.vector("bias")
    if down is None and up is None and bias is not None:
        return LowRank(torch.zeros(1, into), torch.zeros(out, 1), bias)
    if down is None or up is None:
        raise Refused(f"is not complete: {layer.name} lacks lora_A or lora_B")
    down, up = layer.matrix("lora_A"), layer.matrix("lora_B")
    rank = _rank(layer, down.shape[0], up.shape[1])
    layer.check_shape(up.shape[0], down.shape[1])
    factor = layer.alpha / rank if layer.alpha is not None else scale(rank)
    if (inner := layer.vector("lora_B.bias")) is not None:
        bias = inner * factor + (0 if bias is None else bias)
    return LowRank(down, up * factor, bias, layer.vector("lora_magnitude_vector"))


def hadamard(layer: LayerTensors) -> LowRank:
    """Of a LoHa, whose delta is alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), element by element.

    https://arxiv.org/abs/2108.06098, proposition 1: such a product of two matrices of rank r has rank r * r at most.
    Raises Refused.
    """
    layer.only("hada_")
    w1_a, w1_b, w2_a, w2_b = (layer.matrix(f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    rank = _rank(layer, w1_a.shape[1], w1_b.shape[0], w2_a.shape[1], w2_b.shape[0])
    for a, b in ((w1_a, w1_b), (w2_a, w2_b)):
        layer.check_shape(a.shape[0], b.shape[1])
    if rank * rank < w1_b.shape[1]:
        up = torch.einsum("or,os->ors", w1_a, w2_a).flatten(1)
        down = torch.einsum("ri,si->rsi", w1_b, w2_b).flatten(0, 1)
    else:  # thin no more
        up, down = (w1_a @ w1_b) * (w2_a @ w2_b), torch.eye(w1_b.shape[1])
    factor = layer.alpha / rank if layer.alpha is not None else 1.0
    return LowRank(down, up * factor, layer.vector("bias"), layer.vector("lora_magnitude_vector"))


def kronecker(layer: LayerTensors) -> Kronecker:
    """Of a LoKr, whose delta is kron(w1, w2), either of which may be a product itself and is then scaled.

    https://arxiv.org/abs/2309.14859, section 3.3; alpha has a meaning only where there is a rank, as in LyCORIS.
    Raises Refused.
    """
    tensors = layer.only("lokr_")
    if extra := tensors.keys() & {"lora_magnitude_vector", "bias"}:
        raise Refused(f"is a LoKr with a {extra.pop()} in {layer.name}, which is not applied here")
    factors, factor = [], 1.0
    for name in ("lokr_w1", "lokr_w2"):
        if name in tensors:
            factors.append(layer.matrix(name))
            continue
        a, b = layer.matrix(f"{name}_a"), layer.matrix(f"{name}_b")
        rank = _rank(layer, a.shape[1], b.shape[0])
        factor = layer.alpha / rank if layer.alpha is not None else 1.0
        factors.append(a @ b)
    w1, w2 = factors
    layer.check_shape(w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1])
    if w1.shape[1] * w2.shape[0] > _WIDEST * max(layer.shape):  # what KroneckerDown makes of each word
        raise Refused(f"is a LoKr whose factors in {layer.name} are a row and a column: give it as a LoRA")
    return Kronecker(w1 * factor, w2)


class KroneckerDown(nn.Module):
    """What a LoKr does first, in the place of a LoRA's lora_A: [..., b * d] -> [..., b * c] by w2 [c, d]."""

    def __init__(self, w2: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(w2, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(I ⊗ w2) x."""
        return (x.view(*x.shape[:-1], -1, self.weight.shape[1]) @ self.weight.T).flatten(-2)


class KroneckerUp(nn.Module):
    """What a LoKr does then, in the place of lora_B: [..., b * c] -> the target's rows of [..., a * c] by w1 [a, b]."""

    def __init__(self, w1: torch.Tensor, target: Target) -> None:
        super().__init__()
        self.weight = nn.Parameter(w1, requires_grad=False)
        self._target = target

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(w1 ⊗ I) x."""
        whole = (self.weight @ x.view(*x.shape[:-1], self.weight.shape[1], -1)).flatten(-2)
        return torch.cat([whole[..., rows] for rows in self._target.rows], dim=-1)


def _rank(layer: LayerTensors, *ranks: int) -> int:
    if len(set(ranks)) > 1:
        raise Refused(f"is not complete: {layer.name} has factors of ranks {', '.join(map(str, ranks))}")
    if ranks[0] > layer.max_rank:
        raise Refused(
            f"has the rank {ranks[0]:,} in {layer.name}, and the worker's MAX_LORA_RANK allows at most {layer.max_rank}"
        )
    return ranks[0]
