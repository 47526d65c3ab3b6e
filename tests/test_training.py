"""The scenes, the judge that looks at pictures, the tokenizers, and a training that goes on where it was cut off."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from torch import nn

from benchmarks.wordings import FORMS
from src.settings import ROOT
from training import judge
from training.flow import Guided, velocity
from training.language import widen
from training.loop import CHECKPOINT_EVERY, fit
from training.scenes import (
    COLOUR_WORDS,
    COLOURS,
    PLACES,
    SHAPE_WORDS,
    anywhere,
    describe,
    draw,
    every_prompt,
    lone,
    pair,
    plain,
    sample,
    some_pairs,
)
from training.sentences import RULES, ask
from training.text import SEQUENCE_LENGTH, TextEncoders, clip_tokenizer, t5_tokenizer


@pytest.mark.slow
def test_the_judge_is_right_on_every_drawn_scene() -> None:
    for prompt, scene in every_prompt():
        picture = draw(scene, 128, 128)
        (thing,) = scene.things
        seen = judge.centre_colour(picture), judge.shape(picture), judge.background_colour(picture)
        assert seen == (thing.colour, thing.shape, scene.background), prompt


@pytest.mark.parametrize("size", ["small", "large"])
@pytest.mark.parametrize("shape", SHAPE_WORDS)
def test_the_judge_knows_a_shape_of_any_size_and_place(shape: str, size: str) -> None:
    for where in ("middle", "left", "top right"):
        assert judge.shape(draw(lone("red", shape, "white", size, where), 128, 128)) == shape


def test_the_judge_is_right_on_both_halves_of_drawn_pairs() -> None:
    for _, scene in some_pairs(100):
        for half, thing in zip(judge.halves(draw(scene, 128, 128), scene.layout), scene.things, strict=True):
            assert (judge.centre_colour(half), judge.shape(half)) == (thing.colour, thing.shape)


def test_the_judge_sees_nothing_where_nothing_is() -> None:
    nothing = draw(lone("red", "circle", "red"), 128, 128)
    assert judge.shape(nothing) is None


def test_a_pair_lies_as_it_is_said() -> None:
    picture = draw(pair(("small", "red", "circle"), "above", ("large", "blue", "square"), "yellow"), 128, 128)
    named = judge.name_colours(picture)
    colours = list(COLOURS)
    assert colours[named[34, 64]] == "red"
    assert colours[named[93, 64]] == "blue"


def test_a_thing_anywhere_lies_within_the_picture_and_its_caption_says_no_place() -> None:
    rng = random.Random(2)
    said = {word for _, words in PLACES.values() for word in words if word} | {"small", "large", "tiny", "huge"}
    for _ in range(200):
        scene = anywhere(rng)
        (thing,) = scene.things
        assert all(thing.radius < share < 1 - thing.radius for share in thing.centre)
        assert not any(word in describe(scene, rng).lower() for word in said)


def test_there_are_as_many_prompts_as_combinations() -> None:
    assert len(list(every_prompt())) == 8 * 5 * 7


def test_every_caption_fits_into_the_models_sequence() -> None:
    tokenizer, rng = t5_tokenizer(), random.Random(1)
    captions = [describe(sample(rng), rng) for _ in range(2_000)]
    assert max(len(tokenizer(caption).input_ids) for caption in captions) <= SEQUENCE_LENGTH


def test_what_everybody_asks_mostly_fits_too_and_is_never_unknown() -> None:
    tokenizer, rng = t5_tokenizer(), random.Random(1)
    read = [tokenizer(ask(sample(rng), rng)).input_ids for _ in range(2_000)]
    assert sum(len(ids) <= SEQUENCE_LENGTH for ids in read) >= 0.85 * len(read)
    assert not any(tokenizer.unk_token_id in ids for ids in read)


def test_sentences_name_every_colour_and_shape_unless_a_letter_slipped() -> None:
    rng, named = random.Random(3), 0
    for _ in range(1_000):
        scene = sample(rng)
        words = ask(scene, rng).lower()
        named += all(
            any(name in words for name in (colour, *COLOUR_WORDS[colour])) or colour == scene.background
            for colour in (thing.colour for thing in scene.things)
        )
    assert named >= 850  # the others have a slip, or one of the rarer synonyms
    assert len({ask(lone("red", "star", "blue"), random.Random(seed)) for seed in range(50)}) == 50


def test_every_rule_of_the_grammar_can_be_reached_and_every_name_is_one() -> None:
    said = {"said", "thing", "other", "relation", "place", "rest", "ground", "size", "ink", "form", "any", "bar"}
    used = {name for texts, _ in RULES.values() for text in texts for name in re.findall(r"\{([a-z ]+)\}", text)}
    assert used - RULES.keys() == said
    assert RULES.keys() - used == {"request", "one", "two", "noun"}


def test_no_form_of_the_test_is_in_the_grammar() -> None:
    assert len(FORMS) == len(set(FORMS)) == 60
    rng = random.Random(4)
    asked = {ask(lone("red", "star", "blue"), rng).lower().strip(" .!?") for _ in range(20_000)}
    forms = {
        f.format(
            colour="red",
            shape="star",
            background="blue",
            Colour="red",
            Shape="star",
            Background="blue",
            COLOUR="red",
            SHAPE="star",
            BACKGROUND="blue",
        )
        .replace("a(n)", "a")
        .lower()
        .strip(" .!?")
        for f in FORMS
    }
    assert not asked & forms


def test_unknown_words_are_spelt_not_lost() -> None:
    pieces = t5_tokenizer().tokenize("A redd (ZEBRA)")
    assert "".join(pieces).replace("▁", " ").split() == ["a", "redd", "zebra"]
    ids = clip_tokenizer()("zebra 🔴").input_ids
    assert ids.count(clip_tokenizer().eos_token_id) == 1, "an end token within the prompt would cut it"


def test_a_teacher_steers_away_from_the_empty_prompt() -> None:
    pipeline = FluxPipeline.from_pretrained(ROOT / "models" / "flux-shapes", dtype=torch.float32)
    transformer, text_encoders = pipeline.transformer, TextEncoders.of(pipeline)
    inputs = {
        "hidden_states": torch.randn(2, 16, 64),
        "timestep": torch.tensor([0.5, 0.9]),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, 4, 4, "cpu", torch.float32),
    }
    captions = ["a red circle", ""]
    with torch.no_grad():
        text = velocity(transformer, text_encoders, captions, inputs)
        away = velocity(transformer, text_encoders, ["", ""], inputs)
    learnt = Guided(transformer, text_encoders, 3.0).velocity(captions, inputs)
    assert torch.allclose(learnt, away + 3 * (text - away), atol=1e-5)
    assert (learnt[0] - text[0]).abs().max() > 0.1
    assert torch.allclose(learnt[1], text[1], atol=1e-5), "what the empty prompt means stays"


def test_a_wider_vocabulary_changes_nothing_of_known_words(tmp_path: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(ROOT / "models" / "flux-shapes", dtype=torch.float32)
    known = TextEncoders.of(pipeline)
    wider = widen(known, tmp_path)
    captions = ["a red circle on a blue background", "a small white star on a black background"]
    with torch.no_grad():
        for before, after in zip(known.read(captions), wider.read(captions), strict=True):
            assert torch.allclose(before, after, atol=1e-5)


def test_plain_words_are_those_that_are_measured() -> None:
    assert all(plain(scene).replace(" an ", " a ") == prompt.replace(" an ", " a ") for prompt, scene in every_prompt())
    assert all(plain(scene) == prompt for prompt, scene in some_pairs(20))


def test_a_training_that_was_cut_off_goes_on_as_if_it_never_was(tmp_path: Path) -> None:
    class Cut(Exception):
        pass

    def train(run: Path, until: int | None = None) -> nn.Module:
        torch.manual_seed(0)
        network = nn.Linear(4, 4)

        def loss(step: int, rng: random.Random) -> torch.Tensor:
            if step == until:
                raise Cut
            answer: torch.Tensor = network(torch.randn(8, 4) * rng.random())
            return answer.square().mean()

        run.mkdir(exist_ok=True)
        return fit("line", network, loss, run=run, steps=2 * CHECKPOINT_EVERY, learning_rate=1e-2, average=0.9)

    whole = train(tmp_path / "whole")
    with pytest.raises(Cut):
        train(tmp_path / "cut", until=CHECKPOINT_EVERY + 7)
    resumed = train(tmp_path / "cut")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
