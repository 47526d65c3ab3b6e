"""FLUX's adaptive norms, computed ahead: their linears depend on the step, the guidance and the pooled prompt alone.

In FLUX.1 they are 3.25 of 11.9 billion parameters. Asked for all steps of a picture at once, their weights need to be
on the device for that moment only, and what they answer is the same to the bit.

What they are asked differs by the transformer, and a class for each kind says it: one embedding for all of them, or in
FLUX.3 one for the picture's tokens and another for those of words and references.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from src.engine.finite import check_finite
from src.engine.offload import OffloadedWeights
from src.errors import GenerationFailed
from src.weights.placement import TABLES

OnCall = Callable[[torch.Tensor, tuple[Any, ...], Hashable, bool], None]


class Conditioning(Protocol):
    """What adaptive norms are asked within one call of a transformer.

    `at` is what changes from call to call, [values]; `others` is what does not.
    """

    def watch(self, on_call: OnCall) -> list[RemovableHandle]:
        """Let `on_call` have `at`, `others`, a name for those, and whether the scheduler says `at` ahead.

        That is before the norms of a call are asked, or of its references where those are apart.
        """

    def calls(self, timesteps: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """All `at` of a scheduler's `timesteps`, [calls, values], as the transformer will get them; `at` is one."""

    def inputs(self, at: torch.Tensor, others: tuple[Any, ...], layers: Iterable[str]) -> list[torch.Tensor]:
        """What each of the norms' linears, `layers` by their names, is given, [pictures, width]."""

    def rows(self, layer: str, others: tuple[Any, ...]) -> int | None:
        """How many equal rows a picture the plain way gives to `layer`; None where it gives what is [pictures, width].

        A product of many rows may round otherwise than one of a single row.
        """


class _OneEmbedding:
    """FLUX.1's embedding of a timestep, which takes the pooled prompt last, and FLUX.2's, which takes no prompt.

    FLUX.2-klein-KV asks it twice in a call that reads references: those have a timestep of their own.
    """

    def __init__(self, transformer: Any, embedder: Any, *, takes_prompt: bool) -> None:
        self._transformer = transformer
        self._embedder = embedder
        self._takes_prompt = takes_prompt

    def watch(self, on_call: OnCall) -> list[RemovableHandle]:
        """As of all kinds."""
        asked = 0  # within a call

        def begin(_: nn.Module, __: tuple[Any, ...]) -> None:
            nonlocal asked
            asked = 0

        def hook(_: nn.Module, inputs: tuple[Any, ...], __: torch.Tensor) -> None:
            nonlocal asked
            at, *others = inputs
            on_call(at, tuple(others), id(others[-1]) if self._takes_prompt else None, not asked)
            asked += 1

        return [self._transformer.register_forward_pre_hook(begin), self._embedder.register_forward_hook(hook)]

    def calls(self, timesteps: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """FluxPipeline divides by 1000 and FluxTransformer2DModel multiplies again, each rounding in its own type."""
        return (timesteps.to(at) / 1000 * 1000)[:, None].expand(-1, len(at))

    def inputs(self, at: torch.Tensor, others: tuple[Any, ...], layers: Iterable[str]) -> list[torch.Tensor]:
        """As of all kinds: the same for each."""
        embedded = nn.functional.silu(self._embedder.forward(at, *others))
        return [embedded for _ in layers]

    def rows(self, layer: str, others: tuple[Any, ...]) -> int | None:  # noqa: ARG002 - as of all kinds
        """None: once a picture."""
        return None


class _EmbeddingOfTokens:
    """FLUX.3's: the picture's tokens are at the timestep, those of words and references at 0; a flow map adds the next.

    `at` is [pictures], or [2 * pictures] with the timesteps that a flow map jumps to; `others` is how many tokens there
    are of each kind.
    """

    def __init__(self, transformer: Any) -> None:
        self._transformer = transformer

    def watch(self, on_call: OnCall) -> list[RemovableHandle]:
        """As of all kinds."""

        def hook(_: nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
            ends = [named[name] for name in ("timestep", "target_timestep") if named.get(name) is not None]
            references = named.get("image_cond_hidden_states")
            tokens = {
                "image": named["hidden_states"].shape[1],
                "txt": named["encoder_hidden_states"].shape[1],
                "image_cond": 0 if references is None else references.shape[1],
            }
            others = (len(ends), *tokens.items())
            on_call(torch.cat(ends), others, others, True)

        return [self._transformer.register_forward_pre_hook(hook, with_kwargs=True)]

    def calls(self, timesteps: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """As diffusers' Flux3LoopDenoiser and Flux3DistilledLoopDenoiser round them; after the last one comes 0."""
        ends = [timesteps, torch.cat([timesteps[1:], torch.zeros_like(timesteps[:1])])]
        return torch.cat([self._of_pictures(end, at) for end in ends], dim=1)[:, : len(at)]

    def inputs(self, at: torch.Tensor, others: tuple[Any, ...], layers: Iterable[str]) -> list[torch.Tensor]:
        """As Flux3Transformer2DModel.forward makes them."""
        embed, (timestep, *target) = self._embed, at.chunk(others[0])
        of_picture, of_others = (embed("timestep_embedder", each) for each in (timestep, torch.zeros_like(timestep)))
        if target:
            of_target = embed("target_timestep_embedder", target[0])
            of_picture, of_others = of_picture + of_target, of_others + of_target
        silu = nn.functional.silu
        found = {"image": silu(of_picture), "txt": (rest := silu(of_others)), "image_cond": rest}
        return [found[_mode(layer)] for layer in layers]

    def rows(self, layer: str, others: tuple[Any, ...]) -> int | None:
        """One for each token of the layer's kind."""
        tokens: int = dict(others[1:])[_mode(layer)]
        return max(tokens, 1)

    def _embed(self, embedder: str, timestep: torch.Tensor) -> torch.Tensor:
        frequencies = self._transformer.time_proj(timestep * 1000)
        embedded: torch.Tensor = getattr(self._transformer, embedder)(frequencies.to(timestep))
        return embedded

    def _of_pictures(self, timesteps: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        pictures = len(at) // (2 if self._transformer.config.flow_map else 1)
        return (timesteps.to(at.device) / 1000)[:, None].expand(-1, pictures).to(at)


def _mode(layer: str) -> str:
    """The kind of tokens that a linear of FLUX.3's is for: single_stream_modulations.txt.linear; or the output's."""
    kind = layer.split(".")[-2]
    return "image" if kind == "norm_out" else kind


def conditioning_of(transformer: Any) -> Conditioning:
    """How the adaptive norms of `transformer` are asked."""
    if hasattr(transformer, "time_text_embed"):
        return _OneEmbedding(transformer, transformer.time_text_embed, takes_prompt=True)
    if hasattr(transformer, "time_guidance_embed"):
        return _OneEmbedding(transformer, transformer.time_guidance_embed, takes_prompt=False)
    return _EmbeddingOfTokens(transformer)


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
