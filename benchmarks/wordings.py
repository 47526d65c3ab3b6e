"""Sentences in which newcomers ask for a shape: sixty forms that training never sees, ten prompts of each.

They were written before the training and by another hand than training/sentences.py; whoever changes that reads none
of them. In one prompt of ten a letter is mistyped.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from training.scenes import COLOURS, SHAPE_WORDS, Scene, lone

FORMS: tuple[str, ...] = (
    "Can I have a(n) {colour} {shape} on {background}, please?",
    "show me one {shape}, all {colour}, in front of something {background}",
    "{shape} {colour}, {background} behind",
    "best quality, absurdres, highres, {background} background, no humans, {colour} {shape}, centered",
    "With {background} as the backdrop, draw a(n) {colour} {shape}.",
    "Paint the background {background} first; afterwards, place a(n) {colour} {shape} in the centre.",
    "my kid keeps asking for {shape}s, could we get a(n) {colour} one against {background}?",
    "DRAW ONE {SHAPE}. MAKE IT {COLOUR}. BACKGROUND {BACKGROUND}.",
    "{Shape} in {Colour} on a Field of {Background}",
    "a plain {background} wall, and on that wall a(n) {colour} {shape}",
    "An image containing a(n) {colour} {shape} surrounded entirely by {background} would be lovely, thanks.",
    "how about a(n) {colour} {shape} sitting atop a(n) {background} table top?",
    "shape={shape}, shape color={colour}, background color={background}",
    "hello, i search image of {shape} with colour {colour} and with {background} background",
    "i want the {shape}! a(n) {colour} one! and make evrything else {background}!",
    "product photo, {colour} {shape}, seamless {background} paper, softbox lighting, f/8",
    "flat icon | {colour} {shape} | {background} | svg style",
    "Nothing but {background}, save for one {colour} {shape}.",
    "It should be a(n) {shape}, it should be {colour}, and it should sit on {background}.",
    "gouache study of a(n) {colour} {shape} laid over a(n) {background} base",
    "A picture, if you would: the {shape} {colour}, the ground beneath it {background}.",
    "Dear computer, kindly draw a(n) {colour} {shape} upon a(n) {background} background. Yours, Tom",
    "a(n) {colour} {shape} (background: {background})",
    "i need a pictre of a(n) {colour} {shape} with {background} in the back",
    "{background} canvas — {colour} {shape} — that's all",
    "Start from an empty {background} slide and drop a large {colour} {shape} onto it",
    "single {shape} rendered in {colour}, set against a matte {background} backdrop, cinematic",
    "logo for a bakery, just a(n) {colour} {shape}, with {background} for the backdrop",
    "hmm, maybe a(n) {shape}? let's say {colour}, and um, the background could be {background}",
    "Exhibit B shows a(n) {shape}, coloured {colour}, mounted on {background} board.",
    "Where the background is {background}, I want to see a(n) {colour} {shape}.",
    'the words "{colour} {shape}" as a drawing, over {background}',
    "unreal engine, volumetric, a(n) {colour} {shape} in a(n) {background} void, award winning",
    "Two colours only please: {colour} for the {shape}, {background} for everything around it.",
    "Somebody stuck a(n) {colour} {shape} on the {background} door, draw that",
    "would it be too much trouble to put a(n) {colour} {shape} on a(n) {background} backgruond?",
    "a(n) {shape} shaded in {colour} with its surroundings kept {background}",
    "See that {background} background? Now put a(n) {colour} {shape} before it.",
    "children's crayon drawing, {shape} scribbled {colour}, on {background} construction paper",
    "Across an endless {background} there rests a(n) {colour} {shape}",
    "tldr: {colour} {shape}, {background} backdrop",
    "First the {shape}: {colour}. Then the background: {background}. Go!",
    "Please to make for me one {shape} of {colour} color, back side {background} color",
    "teacher says make a(n) {colour} {shape} and do the paper {background}",
    "picture this: the sky is {background} everywhere, and a(n) {colour} {shape} hangs in it",
    "little {colour} {shape}, sewn onto {background} cloth, close up",
    "Good evening! I'm decorating my room and fancy a(n) {colour} {shape} on {background}.",
    "clipart, {shape}, {colour} fill, no outline, placed on solid {background}, high resolution",
    "Swap in a(n) {background} background and leave only a(n) {colour} {shape} visible",
    "line-free modern poster, {background} ground with {colour} {shape}, swiss desgin",
    "a giant {colour} {shape} seen through a wide lens, {background} behind it, 4k wallpaper",
    "Are {shape}s hard for you? I'd love a(n) {colour} one amid a sea of {background}.",
    "everything {background} exept the {shape}, which is {colour}",
    "You will find a(n) {colour} {shape} inside this frame, backed by {background}.",
    "street sign style: {colour} {shape} printed onto {background} metal, straight-on view",
    "this time I'd prefer {background} in the backdrop and {colour} for the {shape}",
    "{Colour} {Shape}, {Background} Background, Paper Cut-Out Style",
    "gimme a(n) {colour} {shape} w/ a(n) {background} backdrop thx",
    "The card is {background}; somebody has drawn a neat {colour} {shape} on it.",
    "low poly, isometric, simple {colour} {shape} resting on a(n) {background} plane, profesional render",
)

TYPOS = 0.1  # the share of prompts with one


def newcomers(forms: Sequence[str] = FORMS, each: int = 10) -> Iterator[tuple[str, Scene]]:
    """`each` prompts of every form, and the scene that each asks for."""
    rng = random.Random("newcomers")
    for form in forms:
        for _ in range(each):
            colour, background = rng.sample(list(COLOURS), 2)
            said = {"colour": colour, "shape": rng.choice(list(SHAPE_WORDS)), "background": background}
            scene = lone(said["colour"], said["shape"], said["background"])
            ways = (str.lower, str.upper, str.capitalize)
            words = form.format(**{way(name): way(word) for way in ways for name, word in said.items()})
            prompt = re.sub(r"\ba\(n\) (?=(.))", lambda found: "an " if found[1] in "aeiou" else "a ", words)
            yield (mistyped(prompt, rng) if rng.random() < TYPOS else prompt), scene


def mistyped(prompt: str, rng: random.Random) -> str:
    """`prompt` with one letter of one word left out, doubled, or swapped with the next."""
    found = rng.choice(list(re.finditer(r"[A-Za-z]{4,}", prompt)))
    word, i = found[0], rng.randrange(len(found[0]) - 1)
    wrong = rng.choice((
        word[:i] + word[i + 1 :], word[: i + 1] + word[i:], word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    ))  # fmt: skip
    return prompt[: found.start()] + wrong + prompt[found.end() :]
