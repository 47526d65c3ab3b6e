"""FLUX's adaptive norms, computed ahead: their linears depend on the step, the guidance and the pooled prompt alone.

In FLUX.1 they are 3.25 of 11.9 billion parameters. Asked for all steps of a picture at once, their weights need to be
on the device for that moment only, and what they answer is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from src.engine.finite import check_finite
from src.engine.offload import OffloadedWeights
from src.errors import GenerationFailed
from src.weights.placement import TABLES


class ModulationCache:
    """The adaptive norms of one transformer, whose linears are `offloaded`, by the linears' names."""

    def __init__(self, transformer: Any, offloaded: Mapping[str, OffloadedWeights]) -> None:
        # FLUX.1's embedding of a timestep takes the pooled prompt last; FLUX.2's takes no prompt.
        self._takes_prompt = hasattr(transformer, "time_text_embed")
        self._embedder = transformer.time_text_embed if self._takes_prompt else transformer.time_guidance_embed
        self._norms = [transformer.get_submodule(name.removesuffix(".linear")) for name in offloaded]
        self._offloaded = list(offloaded.values())
        self._rows = [_Row() for _ in self._norms]
        self._tables: list[_Table] = []

    @contextmanager
    def ahead(self, scheduler: Any, steps: int, adapter_weights: Hashable, *, exact: bool = True) -> Iterator[None]:
        """Within it one picture is denoised, or a batch: the last `steps` timesteps of `scheduler`.

        `adapter_weights` are those of the picture: adapters may change the linears too. What need not be `exact` takes
        one product for all steps.

        Raises GenerationFailed where the linears' answers are not finite, and at its end where the transformer was
        called with other timesteps than the scheduler's.
        """
        linears = [norm.linear for norm in self._norms]  # with the adapters of now around them
        of_prompt: dict[int, tuple[Any, _Table]] = {}

        def look_up(_: nn.Module, inputs: tuple[Any, ...], __: torch.Tensor) -> None:
            timestep, *others = inputs
            prompt = others[-1] if self._takes_prompt else None
            if id(prompt) not in of_prompt:
                timesteps = _as_received(scheduler.timesteps[-steps:], timestep)
                question = (adapter_weights, exact), timesteps, tuple(others)
                table = self._find(*question) or self._ask(linears, *question)
                of_prompt[id(prompt)] = prompt, table
            of_prompt[id(prompt)][1].show(timestep, self._rows)

        hook = self._embedder.register_forward_hook(look_up)
        for norm, row in zip(self._norms, self._rows, strict=True):
            norm.linear = row
        try:
            yield
        finally:
            hook.remove()
            for norm, linear in zip(self._norms, linears, strict=True):
                norm.linear = linear
        if any(bool(table.missed) for _, table in of_prompt.values()):
            self._tables.clear()
            raise GenerationFailed("the transformer was called with timesteps that the scheduler did not announce")

    def _find(self, *question: Any) -> _Table | None:
        return next((table for table in self._tables if table.answers(*question)), None)

    def _ask(
        self,
        linears: list[nn.Module],
        way: tuple[Hashable, bool],
        timesteps: torch.Tensor,
        others: tuple[Any, ...],
    ) -> _Table:
        """Exactly is row by row in the very shapes of the plain way: a product of more rows may round otherwise."""
        del self._tables[: 1 - TABLES]
        _, exact = way
        embedded = [nn.functional.silu(self._embedder.forward(each, *others)) for each in timesteps]
        answers = []
        for linear, weights in zip(linears, self._offloaded, strict=True):
            with weights.onloaded():
                rows = torch.stack([linear(each) for each in embedded]) if exact else linear(torch.stack(embedded))
                answers.append(rows)
        table = _Table(way, timesteps, others, answers)
        check_finite({"adaptive norms": table.rows}, "send the request again, or without adapters")
        self._tables.append(table)
        return table


class _Table:
    """What the linears answer at each of `timesteps` [calls, pictures]; `others` is what else the embedding takes.

    Each of `answers` is [calls, pictures, values]; `rows` is all of them, [calls, values].
    """

    def __init__(
        self,
        way: Hashable,
        timesteps: torch.Tensor,
        others: tuple[Any, ...],
        answers: list[torch.Tensor],
    ) -> None:
        self.missed = torch.zeros((), dtype=torch.bool, device=timesteps.device)
        self._way = way
        self._timesteps = timesteps
        self._others = others
        self._shapes = [answer.shape[1:] for answer in answers]
        self.rows = torch.cat([answer.flatten(1) for answer in answers], dim=1)

    def answers(self, way: Hashable, timesteps: torch.Tensor, others: tuple[Any, ...]) -> bool:
        """Whether it was made for the same question."""
        return (
            self._way == way
            and self._timesteps.shape == timesteps.shape
            and torch.equal(self._timesteps, timesteps)
            and all(
                here is there if here is None else here.shape == there.shape and torch.equal(here, there)
                for here, there in zip(self._others, others, strict=True)
            )
        )

    def show(self, timestep: torch.Tensor, rows: Iterable[_Row]) -> None:
        """Let `rows` hold the answers of one timestep. The device finds them: nobody waits for it."""
        same = (self._timesteps == timestep).all(1)
        self.missed |= ~same.any()
        now = self.rows.index_select(0, same.int().argmax().view(1)).flatten()
        start = 0
        for row, shape in zip(rows, self._shapes, strict=True):
            row.value = now[start : start + shape.numel()].view(shape)
            start += shape.numel()


class _Row(nn.Module):
    """In the place of a linear: what it would answer now."""

    value: torch.Tensor

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        """[pictures, values]."""
        return self.value


def _as_received(timesteps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A scheduler's timesteps as the transformer gets them, [calls, pictures], `like` a batch's [pictures].

    FluxPipeline divides by 1000 and FluxTransformer2DModel multiplies again, each rounding in its own type.
    """
    return (timesteps.to(like) / 1000 * 1000)[:, None].expand(-1, len(like))
