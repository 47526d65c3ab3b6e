"""FLUX's adaptive norms, computed ahead: their linears depend on the step, the guidance and the pooled prompt alone.

In FLUX.1 they are 3.25 of 11.9 billion parameters. Asked for all steps of a picture at once, their weights need to be
on the device for that moment only, and what they answer is the same to the bit.

What they are asked differs by the transformer: `conditioning.py` says it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from src.engine.conditioning import conditioning_of
from src.engine.finite import check_finite
from src.engine.offload import OffloadedWeights
from src.errors import GenerationFailed
from src.weights.placement import TABLES


class ModulationCache:
    """The adaptive norms of one transformer, whose linears are `offloaded`, by the linears' names."""

    def __init__(self, transformer: Any, offloaded: Mapping[str, OffloadedWeights]) -> None:
        self._conditioning = conditioning_of(transformer)
        self._norms = [transformer.get_submodule(name.removesuffix(".linear")) for name in offloaded]
        self._offloaded = offloaded
        self._rows = [_Row() for _ in self._norms]
        # Of references there are no answers to normalize at the end.
        self._rows_of_references = [
            _Row() if name.startswith("norm_out") else row for name, row in zip(offloaded, self._rows, strict=True)
        ]
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
        in_use: dict[Hashable, tuple[Any, _Table]] = {}

        def find(calls: torch.Tensor, others: tuple[Any, ...]) -> _Table:
            question = (adapter_weights, exact), calls, others
            return self._find(*question) or self._ask(linears, *question)

        def look_up(at: torch.Tensor, others: tuple[Any, ...], name: Hashable, is_announced: bool) -> None:
            if not is_announced:
                find(at[None], others).show(at, self._rows_of_references)
                return
            if name not in in_use:
                calls = self._conditioning.calls(scheduler.timesteps[-steps:], at)
                in_use[name] = others, find(calls, others)
            in_use[name][1].show(at, self._rows)

        hooks = self._conditioning.watch(look_up)
        for norm, row in zip(self._norms, self._rows, strict=True):
            norm.linear = row
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for norm, linear in zip(self._norms, linears, strict=True):
                norm.linear = linear
        if any(bool(table.missed) for _, table in in_use.values()):
            self._tables.clear()
            raise GenerationFailed("the transformer was called with timesteps that the scheduler did not announce")

    def _find(self, *question: Any) -> _Table | None:
        return next((table for table in self._tables if table.answers(*question)), None)

    def _ask(
        self,
        linears: list[nn.Module],
        way: tuple[Hashable, bool],
        calls: torch.Tensor,
        others: tuple[Any, ...],
    ) -> _Table:
        """Exactly is row by row in the very shapes of the plain way: a product of more rows may round otherwise."""
        del self._tables[: 1 - TABLES]
        _, exact = way
        inputs = [self._conditioning.inputs(at, others, self._offloaded) for at in calls]
        answers = []
        for linear, (name, weights), given in zip(
            linears, self._offloaded.items(), zip(*inputs, strict=True), strict=True
        ):
            with weights.onloaded():
                if not exact:
                    answers.append(linear(torch.stack(given)))
                    continue
                rows = self._conditioning.rows(name, others)
                answers.append(torch.stack([_answer(linear, each, rows) for each in given]))
        table = _Table(way, calls, others, answers)
        check_finite({"adaptive norms": table.rows}, "send the request again, or without adapters")
        self._tables.append(table)
        return table


def _answer(linear: nn.Module, given: torch.Tensor, rows: int | None) -> torch.Tensor:
    """What `linear` makes of `given` [pictures, width], which it may get in so many equal rows a picture."""
    if rows is None:
        answer: torch.Tensor = linear(given)
    else:
        answer = linear(given[:, None].expand(-1, rows, -1))[:, 0]
    return answer


class _Table:
    """What the linears answer in each of `calls` [calls, values]; `others` is what else they are asked by.

    Each of `answers` is [calls, pictures, values]; `rows` is all of them, [calls, values].
    """

    def __init__(
        self,
        way: Hashable,
        calls: torch.Tensor,
        others: tuple[Any, ...],
        answers: list[torch.Tensor],
    ) -> None:
        self.missed = torch.zeros((), dtype=torch.bool, device=calls.device)
        self._way = way
        self._calls = calls
        self._others = others
        self._shapes = [answer.shape[1:] for answer in answers]
        self.rows = torch.cat([answer.flatten(1) for answer in answers], dim=1)

    def answers(self, way: Hashable, calls: torch.Tensor, others: tuple[Any, ...]) -> bool:
        """Whether it was made for the same question."""
        return (
            self._way == way
            and _is_same(self._calls, calls)
            and all(_is_same(here, there) for here, there in zip(self._others, others, strict=True))
        )

    def show(self, at: torch.Tensor, rows: Iterable[_Row]) -> None:
        """Let `rows` hold the answers of one call. The device finds them: nobody waits for it."""
        same = (self._calls == at).all(1)
        self.missed |= ~same.any()
        now = self.rows.index_select(0, same.int().argmax().view(1)).flatten()
        start = 0
        for row, shape in zip(rows, self._shapes, strict=True):
            row.value = now[start : start + shape.numel()].view(shape)
            start += shape.numel()


class _Row(nn.Module):
    """In the place of a linear: what it would answer now."""

    value: torch.Tensor

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """[pictures, values], or the same for each token, [pictures, tokens, values]."""
        return self.value if given.ndim == self.value.ndim else self.value[:, None].expand(-1, given.shape[1], -1)


def _is_same(here: Any, there: Any) -> bool:
    if not (isinstance(here, torch.Tensor) and isinstance(there, torch.Tensor)):
        return bool(here == there)
    return here.shape == there.shape and torch.equal(here, there)
