"""Stage two: the words of flux-shapes, and text encoders that understand them.

The tokenizers are CLIP's and T5's own, with vocabularies taken from the captions and from what people ask. FLUX's text
encoders come trained on language; so do these, on captions alone: each learns to tell the scene, which takes minutes
where learning it through the flow took hours. T5 must also learn whose a word is: that "red" is the colour of what lies
on top. Nothing told it so at first, and no amount of flow made up for it.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import string
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
import torch
from diffusers import FluxPipeline
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from training import networks
from training.loop import fit
from training.scenes import COLOUR_WORDS, COLOURS, PLACES, RELATIONS, SHAPE_WORDS, SIZE_WORDS, Scene, describe, sample
from training.sentences import ask

SEQUENCE_LENGTH = 32  # FLUX attends to padding: the catalog's row asks for the very length trained with
STEPS = 4_000
BINDING_STEPS = 1_400
BATCH = 128
CAPTIONS = 20_000
_CLIP_VOCABULARY = 1_600
_PAIRS = 150  # of letters, which spell words in half the pieces
_SELDOM = CAPTIONS // 2_000  # a word of fewer sentences is spelt
_LETTER_SCORE = -20.0  # far below any word's, so that only words outside the vocabulary are spelt


def _captions() -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(CAPTIONS):
        yield describe(sample(rng), rng).lower()
        yield ask(sample(rng), rng).lower()


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
        min_frequency=_SELDOM,
        show_progress=False,
    )
    learner.train_from_iterator(_captions(), trainer)
    learnt = json.loads(learner.to_str())["model"]
    vocabulary = dict(learnt["vocab"])
    for piece in (*(f"{letter}</w>" for letter in byte_alphabet), "<|startoftext|>", "<|endoftext|>"):
        vocabulary.setdefault(piece, len(vocabulary))
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in learnt["merges"]], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces, as T5's: whole words, and printable letters to spell any other; all in lower case."""
    counts = Counter(word for caption in _captions() for word in re.findall(r"[a-z0-9']+", caption))
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": _LETTER_SCORE}
    pieces |= {
        f"▁{word}": math.log(count / counts.total()) for word, count in sorted(counts.items()) if count >= _SELDOM
    }
    pieces |= {f"▁{sign}": _LETTER_SCORE / 2 for sign in ",.?"}
    pairs = Counter(word[i : i + 2] for word in counts.elements() for i in range(len(word) - 1))
    pieces |= {pair: _LETTER_SCORE for pair, _ in sorted(pairs.most_common(_PAIRS)) if pair.isalpha()}
    pieces |= {chr(code): _LETTER_SCORE for code in range(33, 127) if not chr(code).isupper()}
    return T5Tokenizer(
        vocab=list(pieces.items()), extra_ids=0, model_max_length=512, _spm_precompiled_charsmap=_written_alike()
    )


def _written_alike() -> bytes:
    """sentencepiece's map of characters, as T5's own tokenizer carries one: capitals are small, marks stand by
    themselves or for nothing."""
    alike = {letter: letter.lower() for letter in string.ascii_uppercase}
    alike |= dict.fromkeys('()[]{}<>*_#~/-+=&\\"\u201c\u201d\u201e\xab\xbb\u2013', " ")
    alike |= {
        mark: f" {sign} " for sign, marks in ((",", ",;:|\u2014"), (".", ".!\u2026"), ("?", "?")) for mark in marks
    }
    alike |= dict.fromkeys("\u2019\u2018\xb4`", "'")
    with tempfile.TemporaryDirectory() as folder:
        rules, captions, model = (Path(folder) / name for name in ("rules.tsv", "captions.txt", "words.model"))
        rules.write_text("".join(f"{_codes(mark)}\t{_codes(meant)}\n" for mark, meant in alike.items()))
        captions.write_text("\n".join(itertools.islice(_captions(), 50)))
        sentencepiece.SentencePieceTrainer.train(
            input=str(captions), model_prefix=str(model.with_suffix("")), normalization_rule_tsv=str(rules),
            vocab_size=100, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        learnt = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        learnt.ParseFromString(model.read_bytes())
    charsmap: bytes = learnt.normalizer_spec.precompiled_charsmap
    return charsmap


def _codes(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)


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

        def tokens(tokenizer: CLIPTokenizer | T5Tokenizer, length: int, padding: str) -> Tensor:
            options = {"padding": padding, "truncation": True, "return_tensors": "pt"}
            ids: Tensor = tokenizer(captions, max_length=length, **options).input_ids
            return ids

        # CLIP looks back alone, and so never at padding.
        pooled = self.text_encoder(tokens(self.tokenizer, 77, "longest")).pooler_output
        return pooled, self.text_encoder_2(tokens(self.tokenizer_2, SEQUENCE_LENGTH, "max_length"))[0]


# What there is to tell of a scene, and the answers to choose from; a lone thing's partner is "none".
_NAMES = {"colour": tuple(COLOURS), "shape": tuple(SHAPE_WORDS), "size": tuple(SIZE_WORDS)}
_QUESTIONS = {
    "background": tuple(COLOURS),
    "layout": (*PLACES, *RELATIONS),
    **{f"{what} {n}": (*names, "none") for n in (1, 2) for what, names in _NAMES.items()},
}
CHOICES = sum(len(answers) for answers in _QUESTIONS.values())


def _answers(scene: Scene) -> list[int]:
    said = {"background": scene.background, "layout": scene.layout}
    for n, thing in enumerate((*scene.things, None)[:2], start=1):
        for what in ("colour", "shape", "size"):
            said[f"{what} {n}"] = getattr(thing, what) if thing else "none"
    return [answers.index(said[question]) for question, answers in _QUESTIONS.items()]


def untrained(run: Path) -> TextEncoders:
    """Tokenizers, and encoders of their size."""
    # Kept with the run: the trainer breaks ties as it likes, and numbers must stay those that were trained with.
    for name, make in (("tokenizer", clip_tokenizer), ("tokenizer_2", t5_tokenizer)):
        if not (run / name).exists():
            make().save_pretrained(run / f"{name}.partial")
            (run / f"{name}.partial").rename(run / name)
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    tokenizer_2 = T5Tokenizer.from_pretrained(run / "tokenizer_2")
    return TextEncoders(
        tokenizer, tokenizer_2, networks.clip(len(tokenizer), tokenizer.eos_token_id), networks.t5(len(tokenizer_2))
    )


def tell_loss(logits: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """How far the scenes are missed: cross-entropy over the questions; `logits` are [scenes, CHOICES]."""
    wanted = torch.tensor([_answers(scene) for scene in scenes]).unbind(1)
    guesses = torch.split(logits, [len(answers) for answers in _QUESTIONS.values()], dim=1)
    return torch.stack([nn.functional.cross_entropy(*both) for both in zip(guesses, wanted, strict=True)]).mean()


def train(run: Path) -> TextEncoders:
    """TextEncoders that can tell the scene from its caption; a few minutes on two cores."""
    torch.manual_seed(2)
    text_encoders = untrained(run)
    parts = nn.ModuleDict({
        **text_encoders.encoders(),
        "from_clip": nn.Linear(networks.POOLED_DIM, CHOICES),
        "from_t5": nn.Linear(networks.T5_DIM, CHOICES),
    })  # fmt: skip

    def loss(_: int, rng: random.Random) -> Tensor:
        scenes = [sample(rng) for _ in range(BATCH)]
        pooled, states = text_encoders.read([describe(scene, rng) for scene in scenes])
        return (tell_loss(parts["from_clip"](pooled), scenes) + tell_loss(parts["from_t5"](states.mean(1)), scenes)) / 2

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


class Look(nn.Module):
    """Reads what lies at each spot by attention from the spots to the words, as the transformer will have to."""

    def __init__(self) -> None:
        super().__init__()
        self.spots = nn.Parameter(torch.randn(len(_SPOTS), networks.T5_DIM) / 2)
        self.attention = nn.MultiheadAttention(networks.T5_DIM, 4, batch_first=True)
        self.answer = nn.Linear(networks.T5_DIM, sum(len(table) + 1 for table in _TABLES.values()))

    def forward(self, states: Tensor) -> list[Tensor]:
        seen, _ = self.attention(self.spots.expand(len(states), -1, -1), states, states, need_weights=False)
        return list(self.answer(seen).split([len(table) + 1 for table in _TABLES.values()], -1))


def look_loss(answers: Sequence[Tensor], scenes: Sequence[Scene]) -> Tensor:
    """How far what lies at each spot is missed, by what Look answers."""
    wanted = torch.tensor([_contents(scene) for scene in scenes])
    total = torch.zeros(())
    for i, logits in enumerate(answers):
        missed = nn.functional.cross_entropy(logits.flatten(0, 1), wanted[:, :, i].flatten(), reduction="none")
        full = (wanted[:, :, i] < logits.shape[-1] - 1).flatten()
        total = total + (missed[full].mean() + missed.mean()) / 6  # most spots are empty
    return total


def bind(text_encoders: TextEncoders, run: Path) -> TextEncoders:
    """Teach T5 whose each word is; a few minutes more."""
    torch.manual_seed(4)
    kinds = {  # token -> what it says, where it is a word for a colour, a shape or a size
        tokens[0]: (what, name)
        for what, table in _TABLES.items()
        for name, synonyms in table.items()
        for word in (name, *synonyms)
        if len(tokens := text_encoders.tokenizer_2(word, add_special_tokens=False).input_ids) == 1
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
        **text_encoders.encoders(), "look": Look(), "whose": nn.Linear(networks.T5_DIM, len(_SPOTS))
    })  # fmt: skip

    def loss(_: int, rng: random.Random) -> Tensor:
        scenes = [sample(rng) for _ in range(BATCH)]
        options = {"padding": "max_length", "truncation": True, "max_length": SEQUENCE_LENGTH}
        tokens = text_encoders.tokenizer_2([describe(scene, rng) for scene in scenes], **options).input_ids
        states = text_encoders.text_encoder_2(torch.tensor(tokens))[0]
        whose = torch.tensor([owners(*both) for both in zip(scenes, tokens, strict=True)])
        total = nn.functional.cross_entropy(parts["whose"](states).flatten(0, 1), whose.flatten())
        return total + look_loss(parts["look"](states), scenes)

    fit("bind", parts, loss, run=run, steps=BINDING_STEPS, learning_rate=1e-3, average=0.99)
    return text_encoders
