"""Words, and a picture beside them, as the numbers that the transformer reads; what was read lately is remembered."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from functools import cached_property
from typing import Any

import torch

from src.engine.redux import Redux
from src.plan.plan import Plan

_REMEMBERED = 64  # prompts; one of FLUX.1-dev takes 4 MB of the host's memory, one of FLUX.2-dev 16

Embeddings = dict[str, torch.Tensor]
Texts = tuple[str, str | None]  # prompt and prompt_2


class Prompts:
    """Reads the prompts of one model; the same prompt, read in the same way, costs no time again."""

    def __init__(self, pipeline: Any, redux: Redux, device: torch.device) -> None:
        self._pipeline = pipeline
        self._device = device
        self._redux = redux
        self._remembered: OrderedDict[Hashable, Embeddings] = OrderedDict()

    def read(self, plan: Plan, prompt: str) -> Embeddings:
        """Of `prompt` and of what the plan steers away from, under the names of the pipeline's arguments.

        `prompt_embeds` is [1, tokens, joint_attention_dim], `pooled_prompt_embeds` [1, pooled_projection_dim]; their
        negative ones alike.
        """
        texts = _texts(plan, prompt)
        key = (tuple(texts.items()), plan.sampling.max_sequence_length, plan.adapter_weights, _picture_key(plan))
        if key not in self._remembered:
            self._remembered[key] = {name: tensor.cpu() for name, tensor in self._read(plan, texts).items()}
            while len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(key)
        return {name: tensor.to(self._device) for name, tensor in self._remembered[key].items()}

    def truncation(self, plan: Plan) -> tuple[str, ...]:
        """A warning for each text that is longer than the model reads."""
        tokenizer = getattr(self._pipeline, "tokenizer_2", None) or self._pipeline.tokenizer
        limit = plan.sampling.max_sequence_length - self._template_tokens
        texts = dict.fromkeys(
            (f"{prefix}{'prompt_2' if second else 'prompt'}", second or first)
            for prompt in plan.prompts
            for prefix, (first, second) in _texts(plan, prompt).items()
        )
        counts = [(name, len(tokenizer(text).input_ids)) for name, text in texts]
        return tuple(
            f"{name} has {count} tokens and the model read the first {limit}" for name, count in counts if count > limit
        )

    @cached_property
    def _template_tokens(self) -> int:
        """What FLUX.2 says around a prompt, which counts too: diffusers' chat with nothing in it."""
        tokenizer: Any = getattr(self._pipeline, "tokenizer", None)
        if not getattr(tokenizer, "chat_template", None):
            return 0
        chat: list[dict[str, Any]] = [{"role": "user", "content": ""}]
        if system := getattr(self._pipeline, "system_message", ""):
            texts = {"system": system, "user": ""}
            chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in texts.items()]
        said = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=not system, enable_thinking=False
        )
        return len(tokenizer(said).input_ids)

    def _read(self, plan: Plan, texts: Mapping[str, Texts]) -> Embeddings:
        embeddings: Embeddings = {}
        for prefix, (prompt, prompt_2) in texts.items():
            second = {"prompt_2": prompt_2} if "prompt_2" in plan.spec.takes else {}
            embeds, *pooled, _ = self._pipeline.encode_prompt(
                prompt=prompt, **second, max_sequence_length=plan.sampling.max_sequence_length
            )
            embeddings[f"{prefix}prompt_embeds"] = embeds
            if pooled:  # FLUX.2 has none
                embeddings[f"{prefix}pooled_prompt_embeds"] = pooled[0]
        for picture in plan.pictures.get("image_prompt", ()):
            scale = plan.sampling.image_prompt_scale
            seen = self._redux.read(picture, 1.0 if scale is None else scale)
            embeddings["prompt_embeds"] = torch.cat([embeddings["prompt_embeds"], seen], dim=1)
            if "negative_prompt_embeds" in embeddings:  # as long, and silent there
                padded = [embeddings["negative_prompt_embeds"], torch.zeros_like(seen)]
                embeddings["negative_prompt_embeds"] = torch.cat(padded, dim=1)
        return embeddings


def _texts(plan: Plan, prompt: str) -> dict[str, Texts]:
    """All that is read for `prompt`, by the prefix of the embeddings' names."""
    sampling = plan.sampling
    texts: dict[str, Texts] = {"": (prompt, sampling.prompt_2)}
    if sampling.negative_prompt is not None:
        texts["negative_"] = (sampling.negative_prompt, None)
    return texts


def _picture_key(plan: Plan) -> Hashable:
    pictures = plan.pictures.get("image_prompt", ())
    digests = [(picture.size, hashlib.sha256(picture.tobytes()).digest()) for picture in pictures]
    return (*digests, plan.sampling.image_prompt_scale) if digests else ()
