"""Words, and a picture beside them, as the numbers that the transformer reads; what was read lately is remembered."""

from __future__ import annotations

import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from src.engine.finite import check_finite
from src.engine.redux import Redux
from src.plan.plan import Plan

# What `encode_prompt` answers: the first row that a pipeline's call takes all of. It makes `ids` itself.
_ANSWERS = (
    ("prompt_embeds", "pooled_prompt_embeds", "ids"),
    ("prompt_embeds", "ids", "prompt_attention_mask"),
    ("prompt_embeds", "ids"),
)
_REMEMBERED = 64  # prompts; one of FLUX.1-dev takes 4 MB of the host's memory, one of FLUX.2-dev 16

Embeddings = dict[str, torch.Tensor]
Texts = tuple[str, str | None]  # prompt and prompt_2


@dataclass(frozen=True)
class _Encoder:
    """A text encoder as its tokenizer shows it: who it is, and how many tokens it reads."""

    name: str
    tokenizer: Any
    limit: int
    second: bool = False  # whether prompt_2 is for it

    def reads(self, texts: Texts) -> tuple[str, str]:
        """The field that it reads, and the text."""
        first, second = texts
        return ("prompt_2", second) if self.second and second else ("prompt", first)

    def warnings(self, field: str, text: str) -> Iterator[str]:
        tokens = self.tokenizer(text).input_ids
        if len(tokens) > max(self.limit, 0):  # what stands around a prompt may take it all
            read = f"the first {self.limit}" if self.limit > 0 else "none of them"
            yield f"{field} has {len(tokens)} tokens for {self.name}, which reads {read}"
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        end = {getattr(self.tokenizer, f"{name}_token_id", None) for name in ("eos", "pad")}  # CLIP's is no word's
        if unknown not in end and (count := tokens.count(unknown)):  # a whole run of Chinese may be one
            of_all = f"{count} of its {len(tokens)} tokens"
            yield f"{field} holds text that {self.name} does not know: {of_all} stand for something unknown"


class Prompts:
    """Reads the prompts of one model; the same prompt, read in the same way, costs no time again."""

    def __init__(self, pipeline: Any, redux: Redux, device: torch.device) -> None:
        self._pipeline = pipeline
        self._device = device
        self._redux = redux
        self._remembered: OrderedDict[Hashable, Embeddings] = OrderedDict()

    def read(self, plan: Plan, prompt: str) -> Embeddings:
        """Of `prompt` and of what the plan steers away from, under the names of the pipeline's arguments.

        `prompt_embeds` is [1, tokens, joint_attention_dim], `pooled_prompt_embeds` [1, pooled_projection_dim],
        `prompt_attention_mask` [1, tokens]; their negative ones alike. Raises GenerationFailed where they are not
        finite, and forgets them.
        """
        remembered = self.remember(plan, prompt)
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in remembered.items()}

    def remember(self, plan: Plan, prompt: str) -> Embeddings:
        """As `read`, in the host's memory."""
        texts = _texts(plan, prompt)
        key = (tuple(texts.items()), plan.sampling.max_sequence_length, plan.adapter_weights, _picture_key(plan))
        if key not in self._remembered:
            embeddings = {name: self._at_home(tensor) for name, tensor in self._read(plan, texts).items()}
            check_finite(embeddings, "send the request again, or with another prompt, image_prompt or adapter")
            self._remembered[key] = embeddings
            while len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(key)
        return self._remembered[key]

    def _at_home(self, tensor: torch.Tensor) -> torch.Tensor:
        """In the host's memory, pinned where a card is to fetch it from there by itself."""
        tensor = tensor.cpu()
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def warnings(self, plan: Plan) -> tuple[str, ...]:
        """What is not read of the texts: what stands past an encoder's limit, and what its vocabulary does not know."""
        found: dict[str, None] = {}  # in order, each once
        for prompt in plan.prompts:
            for prefix, texts in _texts(plan, prompt).items():
                for encoder in self._encoders(plan):
                    field, text = encoder.reads(texts)
                    found |= dict.fromkeys(encoder.warnings(f"{prefix}{field}", text))
        return tuple(found)

    def _encoders(self, plan: Plan) -> tuple[_Encoder, ...]:
        """FLUX.1's two, Chroma's T5, or FLUX.2's one, which is for whole chats."""
        pipeline, limit = self._pipeline, plan.sampling.max_sequence_length
        if (t5 := getattr(pipeline, "tokenizer_2", None)) is None:
            return (_Encoder("the model", pipeline.tokenizer, limit - self._template_tokens),)
        clip = getattr(pipeline, "tokenizer", None)
        first = () if clip is None else (_Encoder("CLIP", clip, pipeline.tokenizer_max_length),)
        return (*first, _Encoder("T5", t5, limit, second=True))

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

    @cached_property
    def _answers(self) -> tuple[str, ...]:
        """The names of what `encode_prompt` answers first."""
        taken = inspect.signature(self._pipeline.__call__).parameters
        return next(names for names in _ANSWERS if taken.keys() >= set(names) - {"ids"})

    @cached_property
    def _alone(self) -> dict[str, bool]:
        """What keeps `encode_prompt` from reading what is steered away from too: that is a text of its own here."""
        takes = inspect.signature(self._pipeline.encode_prompt).parameters
        return {name: False for name in takes if name == "do_classifier_free_guidance"}

    def _read(self, plan: Plan, texts: Mapping[str, Texts]) -> Embeddings:
        embeddings: Embeddings = {}
        for prefix, (prompt, prompt_2) in texts.items():
            second = {"prompt_2": prompt_2} if "prompt_2" in plan.spec.takes else {}
            answer = self._pipeline.encode_prompt(
                prompt=prompt, **second, **self._alone, max_sequence_length=plan.sampling.max_sequence_length
            )
            named = zip(self._answers, answer, strict=False)
            embeddings |= {f"{prefix}{name}": tensor for name, tensor in named if name != "ids"}
        for picture in plan.pictures.get("image_prompt", ()):
            scale = plan.sampling.image_prompt_scale
            seen = self._redux.read(picture, 1.0 if scale is None else scale)
            embeddings["prompt_embeds"] = torch.cat([embeddings["prompt_embeds"], seen], dim=1)
            if "negative_prompt_embeds" in embeddings:  # as long, and silent there
                padded = [embeddings["negative_prompt_embeds"], torch.zeros_like(seen)]
                embeddings["negative_prompt_embeds"] = torch.cat(padded, dim=1)
        return embeddings


def of_pictures(embeddings: Embeddings, count: int) -> Embeddings:
    """`embeddings` of one prompt for `count` pictures: transformers repeat what they embed, and no masks."""
    masks = {name: mask.expand(count, -1) for name, mask in embeddings.items() if name.endswith("_mask")}
    return embeddings | masks


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
