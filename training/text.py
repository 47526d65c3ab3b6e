"""Stage two: the words of flux-shapes, and text encoders that understand them.

The tokenizers are CLIP's and T5's own, with vocabularies taken from the captions. FLUX's text encoders come
trained on language; so do these, on captions alone: each learns to tell the scene, which takes minutes where
learning it through the flow took hours. T5 must also learn whose a word is: that "red" is the colour of what lies
on top. Nothing told it so at first, and no amount of flow made up for it.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxPipeline
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from training import networks
from training.loop import fit
from training.scenes import COLOUR_WORDS, COLOURS, PLACES, RELATIONS, SHAPE_WORDS, SIZE_WORDS, Scene, describe, sample

SEQUENCE_LENGTH = 32  # FLUX attends to padding: the catalog's row asks for the very length trained with
STEPS = 4_000
BINDING_STEPS = 1_400
BATCH = 128
CAPTIONS = 20_000
_CLIP_VOCABULARY = 900
_LETTER_SCORE = -20.0  # far below any word's, so that only words outside the vocabulary are spelt


def _captions() -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(CAPTIONS):
        yield describe(sample(rng), rng).lower()


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding in lower case, as CLIP's; a word outside the captions falls apart into letters."""
    byte_alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=_CLIP_VOCABULARY,
        end_of_word_suffix="</w>",
        initial_alphabet=byte_alphabet,
        min_frequency=CAPTIONS // 500,  # every real word, no filler of random letters
        show_progress=False,
    )
    learner.train_from_iterator(_captions(), trainer)
    learnt = json.loads(learner.to_str())["model"]
    vocabulary = dict(learnt["vocab"])
    for piece in (*(f"{letter}</w>" for letter in byte_alphabet), "<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(piece, len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in learnt["merges"]], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces, as T5's: whole words in three cases, and printable letters to spell any other word."""
    counts = Counter(word for caption in _captions() for word in re.findall(r"[a-z0-9]+", caption))
    words = {word: count for word, count in counts.items() if count >= CAPTIONS // 500}
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": _LETTER_SCORE}
    for case in (str.lower, str.capitalize, str.upper):
        for word, count in sorted(words.items()):
            pieces.setdefault(f"▁{case(word)}", math.log(count / counts.total()))
    for code in range(33, 127):
        pieces.setdefault(chr(code), _LETTER_SCORE)
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=512)


@dataclass(frozen=True)
class TextEncoders:
    """Both tokenizers and their encoders."""

    tokenizer: CLIPTokenizer
    tokenizer_2: T5Tokenizer
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel

    @classmethod
    def of(cls, pipeline: FluxPipeline) -> TextEncoders:
        """Those of a pipeline."""
        return cls(pipeline.tokenizer, pipeline.tokenizer_2, pipeline.text_encoder, pipeline.text_encoder_2)

    def encoders(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

    def read(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """CLIP's pooled vectors [captions, POOLED_DIM] and T5's states [captions, SEQUENCE_LENGTH, T5_DIM]."""

        def tokens(tokenizer: CLIPTokenizer | T5Tokenizer, length: int) -> Tensor:
            options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
            ids: Tensor = tokenizer(captions, max_length=length, **options).input_ids
            return ids

        pooled = self.text_encoder(tokens(self.tokenizer, 77)).pooler_output
        return pooled, self.text_encoder_2(tokens(self.tokenizer_2, SEQUENCE_LENGTH))[0]


# What there is to tell of a scene, and the answers to choose from; a lone thing's partner is "none".
_NAMES = {"colour": tuple(COLOURS), "shape": tuple(SHAPE_WORDS), "size": tuple(SIZE_WORDS)}
_QUESTIONS = {
    "background": tuple(COLOURS),
    "layout": (*PLACES, *RELATIONS),
    **{f"{what} {n}": (*names, "none") for n in (1, 2) for what, names in _NAMES.items()},
}


def _answers(scene: Scene) -> list[int]:
    said = {"background": scene.background, "layout": scene.layout}
    for n, thing in enumerate((*scene.things, None)[:2], start=1):
        for what in ("colour", "shape", "size"):
            said[f"{what} {n}"] = getattr(thing, what) if thing else "none"
    return [answers.index(said[question]) for question, answers in _QUESTIONS.items()]


def train(run: Path) -> TextEncoders:
    """TextEncoders that can tell the scene from its caption; a few minutes on two cores."""
    torch.manual_seed(2)
    # Kept with the run: the trainer breaks ties as it likes, and numbers must stay those that were trained with.
    if not (run / "tokenizer").exists():
        clip_tokenizer().save_pretrained(run / "tokenizer.partial")
        (run / "tokenizer.partial").rename(run / "tokenizer")
    tokenizer, tokenizer_2 = CLIPTokenizer.from_pretrained(run / "tokenizer"), t5_tokenizer()
    text_encoders = TextEncoders(
        tokenizer, tokenizer_2, networks.clip(len(tokenizer), tokenizer.eos_token_id), networks.t5(len(tokenizer_2))
    )
    choices = [len(answers) for answers in _QUESTIONS.values()]
    parts = nn.ModuleDict({
        **text_encoders.encoders(),
        "from_clip": nn.Linear(networks.POOLED_DIM, sum(choices)),
        "from_t5": nn.Linear(networks.T5_DIM, sum(choices)),
    })  # fmt: skip

    def loss(_: int, rng: random.Random) -> Tensor:
        scenes = [sample(rng) for _ in range(BATCH)]
        pooled, states = text_encoders.read([describe(scene, rng) for scene in scenes])
        wanted = torch.tensor([_answers(scene) for scene in scenes]).unbind(1)
        total = torch.zeros(())
        for logits in (parts["from_clip"](pooled), parts["from_t5"](states.mean(1))):
            for guess, answer in zip(logits.split(choices, 1), wanted, strict=True):
                total = total + nn.functional.cross_entropy(guess, answer)
        return total / (2 * len(choices))

    fit("text", parts, loss, run=run, steps=STEPS, learning_rate=1e-3, average=0.99)
    return text_encoders


_TABLES = {"colour": COLOUR_WORDS, "shape": SHAPE_WORDS, "size": SIZE_WORDS}
_SPOTS = list(
    dict.fromkeys([*(centre for centre, _ in PLACES.values()), *(c for a, b, _ in RELATIONS.values() for c in (a, b))])
)


def _centres(scene: Scene) -> list[int]:
    """The numbers of the spots that the scene's things were meant for."""
    centres = PLACES[scene.layout][:1] if len(scene.things) == 1 else RELATIONS[scene.layout][:2]
    return [_SPOTS.index(centre) for centre in centres]


def _contents(scene: Scene) -> list[list[int]]:
    """What lies at each spot: the numbers of its colour, shape and size, one past the last where nothing does."""
    contents = [[len(table) for table in _TABLES.values()] for _ in _SPOTS]
    for spot, thing in zip(_centres(scene), scene.things, strict=True):
        contents[spot] = [list(table).index(getattr(thing, what)) for what, table in _TABLES.items()]
    return contents


class _Look(nn.Module):
    """Reads what lies at each spot by attention from the spots to the words, as the transformer will have to."""

    def __init__(self) -> None:
        super().__init__()
        self.spots = nn.Parameter(torch.randn(len(_SPOTS), networks.T5_DIM) / 2)
        self.attention = nn.MultiheadAttention(networks.T5_DIM, 4, batch_first=True)
        self.answer = nn.Linear(networks.T5_DIM, sum(len(table) + 1 for table in _TABLES.values()))

    def forward(self, states: Tensor) -> list[Tensor]:
        seen, _ = self.attention(self.spots.expand(len(states), -1, -1), states, states, need_weights=False)
        return list(self.answer(seen).split([len(table) + 1 for table in _TABLES.values()], -1))


def bind(text_encoders: TextEncoders, run: Path) -> TextEncoders:
    """Teach T5 whose each word is; a few minutes more."""
    torch.manual_seed(4)
    kinds = {  # token -> what it says, where it is a word for a colour, a shape or a size
        tokens[0]: (what, name)
        for what, table in _TABLES.items()
        for name, synonyms in table.items()
        for word in (name, *synonyms)
        for case in (str.lower, str.capitalize, str.upper)
        if len(tokens := text_encoders.tokenizer_2(case(word), add_special_tokens=False).input_ids) == 1
    }

    def owners(scene: Scene, tokens: list[int]) -> list[int]:
        """The spot of the thing that each token speaks of; -100, which the loss skips, where that is not certain."""
        spots = []
        for token in tokens:
            what, name = kinds.get(token, ("", ""))
            own = [i for i, thing in enumerate(scene.things) if what and getattr(thing, what) == name]
            certain = len(own) == 1 and (what != "colour" or name != scene.background)
            spots.append(_centres(scene)[own[0]] if certain else -100)
        return spots

    parts = nn.ModuleDict({
        **text_encoders.encoders(), "look": _Look(), "whose": nn.Linear(networks.T5_DIM, len(_SPOTS))
    })  # fmt: skip

    def loss(_: int, rng: random.Random) -> Tensor:
        scenes = [sample(rng) for _ in range(BATCH)]
        options = {"padding": "max_length", "truncation": True, "max_length": SEQUENCE_LENGTH}
        tokens = text_encoders.tokenizer_2([describe(scene, rng) for scene in scenes], **options).input_ids
        states = text_encoders.text_encoder_2(torch.tensor(tokens))[0]
        whose = torch.tensor([owners(*both) for both in zip(scenes, tokens, strict=True)])
        total = nn.functional.cross_entropy(parts["whose"](states).flatten(0, 1), whose.flatten())
        wanted = torch.tensor([_contents(scene) for scene in scenes])
        for i, logits in enumerate(parts["look"](states)):
            missed = nn.functional.cross_entropy(logits.flatten(0, 1), wanted[:, :, i].flatten(), reduction="none")
            full = (wanted[:, :, i] < logits.shape[-1] - 1).flatten()
            total = total + (missed[full].mean() + missed.mean()) / 6  # most spots are empty
        return total

    fit("bind", parts, loss, run=run, steps=BINDING_STEPS, learning_rate=1e-3, average=0.99)
    return text_encoders
