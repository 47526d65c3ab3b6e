"""What the tensors of one layer add to its weight: a LoRA or a LoHa, two thin matrices; a LoKr, a Kronecker product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from src.engine.lora.names import Target
from src.errors import Refused


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
    def shape(self) -> tuple[int, int]:
        """Features that go out and in."""
        return self.w1.shape[0] * self.w2.shape[0], self.w1.shape[1] * self.w2.shape[1]

    def put_into(self, layer: Any, adapter_name: str, target: Target) -> None:
        """Let it stand for the two matrices that PEFT's LoRA `layer` holds under this name.

        PEFT's own LoKr holds only factors that it would have chosen, and no rows of a layer; and it makes the whole
        delta at every step, where two products of the factors do.
        """
        like = layer.lora_A[adapter_name].weight
        layer.lora_A[adapter_name] = KroneckerDown(self.w2.to(like))
        layer.lora_B[adapter_name] = KroneckerUp(self.w1.to(like), target)


def low_rank(tensors: Mapping[str, torch.Tensor], in_features: int, scale: Callable[[int], float]) -> LowRank:
    """Of a LoRA, whose delta is alpha / rank * up @ down; without an alpha `scale` says what a rank is scaled by.

    https://arxiv.org/abs/2106.09685, section 4.1. A bias alone is a LoRA of nothing. Raises Refused.
    """
    down, up, bias = tensors.get("lora_A"), tensors.get("lora_B"), tensors.get("bias")
    if down is None and up is None and bias is not None:
        down, up = torch.zeros(1, in_features), torch.zeros(len(bias), 1)
    if down is None or up is None:
        raise Refused("lacks lora_A or lora_B")
    down, up = _matrix(down), _matrix(up)
    if up.shape[1] != down.shape[0]:
        raise Refused(f"has lora_A of rank {down.shape[0]} and lora_B of rank {up.shape[1]}")
    rank = down.shape[0]
    factor = _alpha(tensors) / rank if "alpha" in tensors else scale(rank)
    if (inner := tensors.get("lora_B.bias")) is not None:
        bias = inner * factor + (0 if bias is None else bias)
    return LowRank(down, up * factor, bias, _magnitude(tensors, up.shape[0]))


def hadamard(tensors: Mapping[str, torch.Tensor]) -> LowRank:
    """Of a LoHa, whose delta is alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), element by element.

    https://arxiv.org/abs/2108.06098, proposition 1. The product of two matrices of rank r is one of rank r * r, whose
    factors are the products of each column, and row, of the one's with each of the other's.
    """
    w1_a, w1_b, w2_a, w2_b = (_matrix(_required(tensors, f"hada_{x}")) for x in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if len({w1_a.shape[1], w1_b.shape[0], w2_a.shape[1], w2_b.shape[0]}) > 1 or w1_a.shape != w2_a.shape:
        raise Refused("has hada_w1 and hada_w2 of different shapes")
    rank = w1_b.shape[0]
    scale = _alpha(tensors) / rank if "alpha" in tensors else 1.0
    up = torch.einsum("or,os->ors", w1_a, w2_a).flatten(1) * scale
    down = torch.einsum("ri,si->rsi", w1_b, w2_b).flatten(0, 1)
    return LowRank(down, up, tensors.get("bias"), _magnitude(tensors, up.shape[0]))


def kronecker(tensors: Mapping[str, torch.Tensor]) -> Kronecker:
    """Of a LoKr, whose delta is kron(w1, w2), either of which may be a product itself and is then scaled.

    https://arxiv.org/abs/2309.14859, section 3.3; alpha has a meaning only where there is a rank, as in LyCORIS.
    """
    if extra := tensors.keys() & {"lora_magnitude_vector", "bias"}:
        raise Refused(f"is a LoKr with {', '.join(sorted(extra))}, which is not applied here")
    scale, factors = 1.0, []
    for name in ("lokr_w1", "lokr_w2"):
        if (whole := tensors.get(name)) is not None:
            factors.append(_matrix(whole))
            continue
        a, b = _matrix(_required(tensors, f"{name}_a")), _matrix(_required(tensors, f"{name}_b"))
        if a.shape[1] != b.shape[0]:
            raise Refused(f"has {name}_a of rank {a.shape[1]} and {name}_b of rank {b.shape[0]}")
        if "alpha" in tensors:
            scale = _alpha(tensors) / b.shape[0]
        factors.append(a @ b)
    return Kronecker(factors[0] * scale, factors[1])


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


def _required(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in tensors:
        raise Refused(f"lacks {name}")
    return tensors[name]


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    """Of [out, in], or of a convolution's [out, in, 1, 1], as some trainers keep linear layers."""
    if tensor.ndim < 2 or tensor.shape[2:].numel() != 1 or 0 in tensor.shape:
        raise Refused(f"has a tensor of {'x'.join(map(str, tensor.shape)) or 'one number'} where a matrix belongs")
    return tensor.flatten(1)


def _alpha(tensors: Mapping[str, torch.Tensor]) -> float:
    alpha = tensors["alpha"]
    if alpha.numel() != 1:
        raise Refused(f"has an alpha of {'x'.join(map(str, alpha.shape))}, which must be one number")
    return alpha.item()


def _magnitude(tensors: Mapping[str, torch.Tensor], out_features: int) -> torch.Tensor | None:
    """A DoRA's, one number for each row of the weight."""
    magnitude = tensors.get("lora_magnitude_vector")
    if magnitude is None:
        return None
    if magnitude.shape[0] != out_features or magnitude.numel() != out_features:
        raise Refused(
            f"is a DoRA with magnitudes of {'x'.join(map(str, magnitude.shape))}, where only those of rows are applied"
        )
    return magnitude.flatten()
