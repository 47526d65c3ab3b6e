"""Prompts, written out by a language model as the captions that the model was trained on.

Knows nothing of who asks. The words to it and the way it sees pictures are diffusers' own, as its maker trained it.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.modular_pipelines.flux3.prompt_upsampler import MAX_NEW_TOKENS, prepare_references, upsample_prompt
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from src.engine.components import check_vocabulary, load_network
from src.engine.finite import check_finite
from src.errors import GenerationFailed, Refused
from src.plan.plan import Plan
from src.request.schema import why_no_prompt
from src.weights.files import check_whole

UPSAMPLER = "prompt_upsampler"  # the pipeline's component, and the placement's network
_CLASS = "Qwen3_5ForConditionalGeneration"
_UNREAD = "mtp."  # Qwen3.5's guesses of several words at once, which its class does not have
_REMEMBERED = 256  # captions, of a few kilobytes each
_READ_WITH = ("tokenizer.json", "preprocessor_config.json")
_EMPTY = "empty caption"  # how diffusers words that nothing was written


@dataclass(frozen=True)
class _Caption:
    text: str
    whole: bool  # it came to an end by itself


class PromptUpsampler:
    """The pipeline's language model, which writes prompts out; what it wrote lately is remembered.

    It takes the likeliest word each time, without chance: the same prompt and pictures are the same caption, and no
    seed is part of what a caption is remembered by.
    """

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self._network = getattr(pipeline, UPSAMPLER, None)
        self._processor = getattr(pipeline, f"{UPSAMPLER}_processor", None)
        self._device = device
        self._remembered: OrderedDict[Hashable, _Caption] = OrderedDict()

    def write(self, plan: Plan, go_on: Callable[[], None]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """A caption for each of the plan's prompts, and warnings; `go_on` is called after each token, and may raise.

        Of a plan that starts from pictures it says what is to become of those, which are seen. Raises GenerationFailed
        where nothing was written, or what no prompt may be, or where its values are not finite.
        """
        captions = [self._caption(plan, prompt, go_on) for prompt in plan.prompts]
        cut = any(not caption.whole for caption in captions)
        said = f"prompt_upsampling stopped after {MAX_NEW_TOKENS:,} tokens: what was drawn may end within a sentence"
        return tuple(caption.text for caption in captions), (said,) if cut else ()

    def remembers(self, plan: Plan) -> bool:
        """Whether nothing is left to be written for `plan`."""
        return all(_key(plan, prompt) in self._remembered for prompt in plan.prompts)

    def _caption(self, plan: Plan, prompt: str, go_on: Callable[[], None]) -> _Caption:
        key = _key(plan, prompt)
        if key not in self._remembered:
            self._remembered[key] = self._written(plan, prompt, go_on)
            while len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        self._remembered.move_to_end(key)
        return self._remembered[key]

    def _written(self, plan: Plan, prompt: str, go_on: Callable[[], None]) -> _Caption:
        writer = _Writer(self._network, self._device, go_on)
        pictures = prepare_references(list(plan.pictures.get("init_image", ())))
        try:
            text = upsample_prompt(writer, self._processor, prompt, images=pictures)
        except RuntimeError as error:
            if _EMPTY not in str(error):
                raise
            raise GenerationFailed(
                "the prompt upsampler wrote nothing for this prompt; say more in prompt, or send it without "
                "prompt_upsampling"
            ) from error
        if why := why_no_prompt(text):
            raise GenerationFailed(
                f"the prompt upsampler wrote what is no prompt, which {why}; send another prompt, or send it without "
                "prompt_upsampling"
            )
        return _Caption(text, writer.ended)


@dataclass
class _Writer:
    """The network as diffusers calls it, on the device to which its weights come, wherever they are now."""

    network: Any
    device: torch.device
    go_on: Callable[[], None]
    ended: bool = field(default=True, init=False)  # by itself, the last time

    def generate(self, *, max_new_tokens: int, **inputs: Any) -> torch.Tensor:
        """What was read and what was written, [1, tokens]."""

        def going_on(tokens: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            self.go_on()
            return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)

        tokens: torch.Tensor = self.network.generate(
            **inputs, max_new_tokens=max_new_tokens, stopping_criteria=[going_on], logits_processor=[_finite]
        )
        written = tokens.shape[1] - inputs["input_ids"].shape[1]
        ends = self.network.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ended = written < max_new_tokens or int(tokens[0, -1]) in ends
        return tokens


def _finite(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """`scores` of the next word, [1, words]: of no numbers the likeliest is some word too, and no caption."""
    check_finite({UPSAMPLER: scores.amax(-1)}, "send the request again, or without prompt_upsampling")
    return scores


def _key(plan: Plan, prompt: str) -> Hashable:
    pictures = plan.pictures.get("init_image", ())
    return prompt, *((picture.size, hashlib.sha256(picture.tobytes()).digest()) for picture in pictures)


class _PictureProcessor(Qwen3VLProcessor):  # type: ignore[misc]
    """Reads words and pictures: without its part for films, which wants torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that it has."""
        return ["image_processor", "tokenizer"]


def check_upsampler(folder: Path) -> dict[str, int]:
    """How many values each tensor of the upsampler in `folder` has; Refused where it is none, or not whole."""
    config = folder / "config.json"
    if not config.is_file():
        raise Refused(f"{folder} holds no config.json, so it is not a prompt upsampler")
    kinds = json.loads(config.read_text()).get("architectures") or ["model of an unknown class"]
    if kinds != [_CLASS]:
        raise Refused(f"is a {', '.join(kinds)}; a prompt upsampler is a {_CLASS}")
    if missing := [name for name in _READ_WITH if not (folder / name).is_file()]:
        raise Refused(f"has no {' and no '.join(missing)}; download it again")
    sizes = check_whole(folder).get("", {})
    if not sizes:
        raise Refused("has no weights: no *.safetensors; download it again")
    return {name: values for name, values in sizes.items() if not name.startswith(_UNREAD)}


def load_upsampler(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """What the prompt upsampler in `folder` is in a pipeline, by name: the network, and what it reads with.

    Raises Refused where the files hold less than its configuration says, or more.
    """
    network = load_network(UPSAMPLER, transformers.Qwen3_5ForConditionalGeneration, folder, dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    check_vocabulary("tokenizer.json", UPSAMPLER, tokenizer, network)
    if not tokenizer.chat_template:
        raise Refused("has no chat template: no chat_template.jinja; download it again")
    pictures = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    processor = _PictureProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    return {UPSAMPLER: network, f"{UPSAMPLER}_processor": processor}
