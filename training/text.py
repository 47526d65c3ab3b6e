"""The words of flux-shapes: CLIP's and T5's own tokenizers, with vocabularies taken from the captions."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from training.scenes import describe, sample

SEQUENCE_LENGTH = 32  # FLUX attends to padding: the catalog's row asks for the very length trained with
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
