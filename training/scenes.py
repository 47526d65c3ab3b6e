"""The little world that flux-shapes knows: flat scenes of one or two shapes, and how people ask for them.

A scene is data; `draw` makes its picture at any size, `describe` words it in one of many ways.
Nothing here knows of torch or of a model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

from PIL import Image, ImageDraw

Point = tuple[float, float]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (250, 140, 20),
    "yellow": (250, 220, 50),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "purple": (140, 50, 170),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}

COLOUR_WORDS: dict[str, tuple[str, ...]] = {
    "red": ("crimson", "scarlet"),
    "orange": ("tangerine",),
    "yellow": ("golden", "lemon"),
    "green": ("emerald",),
    "blue": ("azure", "navy"),
    "purple": ("violet",),
    "white": ("snowy",),
    "black": ("dark",),
}

SHAPE_WORDS: dict[str, tuple[str, ...]] = {
    "circle": ("disc", "disk", "dot", "ball"),
    "square": ("box", "block"),
    "triangle": ("pyramid",),
    "star": ("pentagram",),
    "diamond": ("rhombus", "lozenge"),
}

SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("little", "tiny"),
    "medium": ("",),
    "large": ("big", "huge"),
}

# The radius of a shape's circle as a share of the picture's shorter side: alone, and one of two.
RADIUS = {"small": (0.15, 0.11), "medium": (0.25, 0.16), "large": (0.37, 0.21)}

# The centre of a lone shape as shares of width and height, and how it is said.
PLACES: dict[str, tuple[Point, tuple[str, ...]]] = {
    "middle": ((0.5, 0.5), ("", "", "", "in the middle", "in the center", "in the centre", "centered")),
    "left": ((0.25, 0.5), ("on the left", "at the left", "on the left side")),
    "right": ((0.75, 0.5), ("on the right", "at the right", "on the right side")),
    "top": ((0.5, 0.25), ("at the top", "on top", "in the upper part")),
    "bottom": ((0.5, 0.75), ("at the bottom", "in the lower part")),
    "top left": ((0.25, 0.25), ("in the top left corner", "at the top left", "in the upper left")),
    "top right": ((0.75, 0.25), ("in the top right corner", "at the top right", "in the upper right")),
    "bottom left": ((0.25, 0.75), ("in the bottom left corner", "at the bottom left", "in the lower left")),
    "bottom right": ((0.75, 0.75), ("in the bottom right corner", "at the bottom right", "in the lower right")),
}

# Where the first and the second of two shapes lie, and how that is said.
RELATIONS: dict[str, tuple[Point, Point, tuple[str, ...]]] = {
    "above": ((0.5, 0.27), (0.5, 0.73), ("above", "over", "on top of")),
    "below": ((0.5, 0.73), (0.5, 0.27), ("below", "under", "beneath")),
    "left of": ((0.27, 0.5), (0.73, 0.5), ("left of", "to the left of", "next to", "and", "beside")),
    "right of": ((0.73, 0.5), (0.27, 0.5), ("right of", "to the right of")),
}

ANYWHERE = "anywhere"  # the layout of a thing whose place is not said
_MARGIN = 0.03
_SUPERSAMPLING = 4
_HOLLOW = 0.6  # the share of an outlined thing that shows the background
_FILLER = (
    "a picture of", "an image of", "draw", "please draw", "a drawing of", "show me", "there is", "a photo of", "just",
    "an illustration of", "i want",
)  # fmt: skip
_TAIL = ("", "", "", "", ", flat", ", simple", ", minimalist", ", high quality", ", 4k", " please", ", vector art")


def _regular(corners: int, first: float, radii: tuple[float, ...] = (1.0,)) -> tuple[Point, ...]:
    angles = (first + 2 * math.pi * i / corners for i in range(corners))
    return tuple(
        (radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)
    )


# Corners within a circle of radius 1, y downwards; a circle has none.
OUTLINES: dict[str, tuple[Point, ...]] = {
    "circle": (),
    "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle": ((0.0, -0.95), (0.95, 0.75), (-0.95, 0.75)),
    "star": _regular(10, -math.pi / 2, (1.0, 0.42)),
    "diamond": ((0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)),
}


@dataclass(frozen=True)
class Thing:
    """A shape of one colour; centre as shares of width and height, radius as a share of the shorter side."""

    colour: str
    shape: str
    size: str
    centre: Point
    radius: float


@dataclass(frozen=True)
class Scene:
    """One or two things on a background; `layout` names a row of PLACES (one; or ANYWHERE) or RELATIONS (two)."""

    background: str
    things: tuple[Thing, ...]
    layout: str


def draw(scene: Scene, width: int, height: int, *, outlined: bool = False) -> Image.Image:
    """The scene as an RGB picture of `width` x `height` pixels with smooth edges; `outlined` things are hollow."""
    w, h = width * _SUPERSAMPLING, height * _SUPERSAMPLING
    picture = Image.new("RGB", (w, h), COLOURS[scene.background])
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        x, y = thing.centre[0] * w, thing.centre[1] * h
        inks = [(1.0, thing.colour), (_HOLLOW, scene.background)] if outlined else [(1.0, thing.colour)]
        for share, ink in inks:
            r = thing.radius * min(w, h) * share
            if outline := OUTLINES[thing.shape]:
                pen.polygon([(x + r * dx, y + r * dy) for dx, dy in outline], fill=COLOURS[ink])
            else:
                r *= 0.9
                pen.ellipse((x - r, y - r, x + r, y + r), fill=COLOURS[ink])
    return picture.resize((width, height), Image.Resampling.BOX)


def lone(colour: str, shape: str, background: str, size: str = "medium", place: str = "middle") -> Scene:
    """A scene of one thing, exactly in its place."""
    return Scene(background, (_thing(colour, shape, size, PLACES[place][0], alone=True),), place)


def pair(first: tuple[str, str, str], relation: str, second: tuple[str, str, str], background: str) -> Scene:
    """A scene of two things, each a (size, colour, shape), exactly in their places."""
    centres = RELATIONS[relation][:2]
    things = tuple(
        _thing(colour, shape, size, centre, alone=False)
        for (size, colour, shape), centre in zip((first, second), centres, strict=True)
    )
    return Scene(background, things, relation)


def _thing(
    colour: str, shape: str, size: str, centre: Point, *, alone: bool, jitter: Callable[[float], float] = lambda _: 0.0
) -> Thing:
    radius = RADIUS[size][0 if alone else 1] * (1 + jitter(0.05))
    low, high = radius + _MARGIN, 1 - radius - _MARGIN
    x, y = (min(max(share + jitter(0.02), low), high) for share in centre)
    return Thing(colour, shape, size, (x, y), radius)


def sample(rng: random.Random) -> Scene:
    """A random scene with a little play in place and size; two things in half of them."""
    background, *inks = rng.sample(list(COLOURS), 3)
    if rng.random() < 0.2:
        inks[1] = inks[0]
    shapes = list(SHAPE_WORDS)
    sizes = rng.choices(list(SIZE_WORDS), (1, 2, 1), k=2)

    def jitter(reach: float) -> float:
        return rng.uniform(-reach, reach)

    if rng.random() < 0.5:
        relation = rng.choice(list(RELATIONS))
        things = tuple(
            _thing(ink, rng.choice(shapes), size, centre, alone=False, jitter=jitter)
            for ink, size, centre in zip(inks, sizes, RELATIONS[relation][:2], strict=True)
        )
        return Scene(background, things, relation)
    place = "middle" if rng.random() < 0.45 else rng.choice(list(PLACES))
    return Scene(
        background, (_thing(inks[0], rng.choice(shapes), sizes[0], PLACES[place][0], alone=True, jitter=jitter),), place
    )


def anywhere(rng: random.Random) -> Scene:
    """A lone thing of any size at any place, of which its caption says neither."""
    background, colour = rng.sample(list(COLOURS), 2)
    radius = rng.uniform(0.13, 0.36)
    reach = 0.5 - radius - _MARGIN
    centre = (0.5 + rng.uniform(-reach, reach), 0.5 + rng.uniform(-reach, reach))
    return Scene(background, (Thing(colour, rng.choice(list(SHAPE_WORDS)), "medium", centre, radius),), ANYWHERE)


def describe(scene: Scene, rng: random.Random) -> str:
    """One of the many ways to ask for the scene: synonyms, other orders, missing articles, small talk."""

    def word(table: dict[str, tuple[str, ...]], key: str) -> str:
        plain = "" if key == "medium" else key
        return plain if rng.random() < 0.7 else rng.choice(table[key])

    def noun(thing: Thing, article: bool) -> str:
        colour, shape, size = (
            word(COLOUR_WORDS, thing.colour),
            word(SHAPE_WORDS, thing.shape),
            word(SIZE_WORDS, thing.size),
        )
        kind = rng.random()
        if kind < 0.8:
            words = f"{size} {colour} {shape}"
        elif kind < 0.9:
            words = f"{colour} {size} {shape}"
        else:
            words = f"{size} {shape} in {colour}"
        words = " ".join(words.split())
        if not article:
            return words
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    articles = rng.random() < 0.75
    first, *rest = (noun(thing, articles) for thing in scene.things)
    if rest:
        subject = f"{first} {rng.choice(RELATIONS[scene.layout][2])} {rest[0]}"
    else:
        words = PLACES[scene.layout][1] if scene.layout in PLACES else ("",)
        subject = f"{first} {rng.choice(words)}".strip()

    ground = word(COLOUR_WORDS, scene.background)
    plain_ground = "black" if any(thing.colour == "white" for thing in scene.things) else "white"
    if scene.background == plain_ground and rng.random() < 0.4:
        text = subject
    else:
        article = ("an " if ground[0] in "aeiou" else "a ") if articles else ""
        text = rng.choice((
            f"{subject} on {article}{ground} background",
            f"{subject} on {article}{ground} background",
            f"{subject} on {article}{ground} background",
            f"{subject} on {ground}",
            f"{subject}, {ground} background",
            f"on {article}{ground} background, {subject}",
            f"{article}{ground} background with {subject}",
            f"{subject} against {article}{ground} backdrop",
        ))  # fmt: skip
    if rng.random() < 0.25:
        text = f"{rng.choice(_FILLER)} {text}"
    if rng.random() < 0.25:
        text += rng.choice(_TAIL)
    if rng.random() < 0.05:
        pieces = text.split()
        pieces.insert(
            rng.randrange(len(pieces) + 1), "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 5)))
        )
        text = " ".join(pieces)
    case = rng.choices((str.lower, str.capitalize, str.title, str.upper), (72, 16, 6, 6))[0]
    return str(case(text))


def plain(scene: Scene) -> str:
    """The scene in the words that the model was first trained on most."""
    nouns = []
    for thing in scene.things:
        words = f"{'' if thing.size == 'medium' else thing.size} {thing.colour} {thing.shape}".strip()
        nouns.append(f"{'an' if words[0] in 'aeiou' else 'a'} {words}")
    if len(nouns) > 1:
        subject = f" {RELATIONS[scene.layout][2][0]} ".join(nouns)
    else:
        where = PLACES[scene.layout][1][0] if scene.layout in PLACES else ""
        subject = f"{nouns[0]} {where}".strip()
    return f"{subject} on {'an' if scene.background[0] in 'aeiou' else 'a'} {scene.background} background"


def some_pairs(count: int) -> Iterator[tuple[str, Scene]]:
    """`count` pairs of things as (prompt, scene), in plain words, of three colours that differ."""
    rng = random.Random("pairs")
    for _ in range(count):
        background, *inks = rng.sample(list(COLOURS), 3)
        relation = rng.choice(list(RELATIONS))
        first, second = ((rng.choice(("medium", "large")), ink, rng.choice(list(SHAPE_WORDS))) for ink in inks)
        scene = pair(first, relation, second, background)
        yield plain(scene), scene


def some_anywhere(count: int) -> Iterator[tuple[str, Scene]]:
    """`count` things of any size at any place as (prompt, scene), and prompts that say neither."""
    rng = random.Random("anywhere")
    for _ in range(count):
        scene = anywhere(rng)
        (thing,) = scene.things
        yield f"a {thing.colour} {thing.shape} on a {scene.background} background", scene


def every_prompt() -> Iterator[tuple[str, Scene]]:
    """Each colour x shape x background as (prompt, scene), in plain words: 8 x 5 x 7."""
    for colour, shape, background in product(COLOURS, SHAPE_WORDS, COLOURS):
        if colour != background:
            article = "an" if colour[0] in "aeiou" else "a"
            yield f"{article} {colour} {shape} on a {background} background", lone(colour, shape, background)
