"""What FLUX's adaptive norms are asked in a call of the transformer: a class for each kind of transformer.

One embedding for all of them, or in FLUX.3 one for the picture's tokens and another for those of words and references.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

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
