"""Every regular expression of the worker takes time in proportion to its text, whatever that is."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import itertools
import pkgutil
import re
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from re import _parser  # type: ignore[attr-defined]  # what re itself reads patterns with
from typing import Any, NamedTuple

import pytest

import src
from src.settings import ROOT

SIZE = 100_000  # characters
SECONDS = 3.0  # of the processor; a quadratic pattern wants minutes, a linear one a hundredth of this
CALLS = ("match", "fullmatch", "search", "sub", "split", "findall", "finditer")
OF_TEXT_TOO = {"split"}


class Use(NamedTuple):
    """A pattern and how it is called."""

    where: str
    pattern: re.Pattern[Any]
    call: str


def uses() -> Iterator[Use]:
    """All patterns of src: compiled ones, those in tables, those written where they are used, and pydantic's."""
    for info in pkgutil.walk_packages(src.__path__, "src."):
        tree = (
            ast.parse((ROOT / info.name.replace(".", "/")).with_suffix(".py").read_text()) if not info.ispkg else None
        )
        if tree is None or not any(isinstance(node, ast.Name) and node.id == "re" for node in ast.walk(tree)):
            continue
        names = vars(importlib.import_module(info.name))
        of_tables: set[str] = set()
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Attribute) and node.func.attr in CALLS and node.args:
                of_re = isinstance(node.func.value, ast.Name) and node.func.value.id == "re"
                found = value_of(node.args[0] if of_re else node.func.value, names)
                if isinstance(found, (str, bytes)) and of_re:
                    yield Use(info.name, re.compile(found, flags_of(node)), node.func.attr)
                elif isinstance(found, re.Pattern):
                    yield Use(info.name, found, node.func.attr)
                elif found is None:
                    of_tables.add(node.func.attr)
            for word in node.keywords:
                if word.arg == "pattern" and isinstance(word.value, ast.Constant):
                    yield Use(info.name, re.compile(word.value.value), "search")
        tables = (value for value in names.values() if isinstance(value, (tuple, list, Mapping)))
        for pattern in dict.fromkeys(itertools.chain.from_iterable(map(patterns_in, tables))):
            for call in sorted(of_tables & set(CALLS) - OF_TEXT_TOO):
                yield Use(info.name, pattern, call)


def value_of(node: ast.expr, names: dict[str, Any]) -> Any:
    """What `node` is where its module's names alone say it, else None."""
    try:
        return eval(compile(ast.Expression(node), "src", "eval"), dict(names))  # noqa: S307 - our own source
    except Exception:  # noqa: BLE001 - a local name
        return None


def flags_of(call: ast.Call) -> int:
    text = ast.dump(call)
    return (re.IGNORECASE if "IGNORECASE" in text else 0) | (re.DOTALL if "DOTALL" in text else 0)


def patterns_in(value: Any) -> Iterator[re.Pattern[Any]]:
    if isinstance(value, re.Pattern):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for name, inner in vars(value).items():
            yield from [re.compile(inner, re.DOTALL)] if name == "begins" else patterns_in(inner)
    elif isinstance(value, (tuple, list, Mapping)):
        inners = list(value.values() if isinstance(value, Mapping) else value)
        if inners and isinstance(inners[0], bytes):  # a row of what files begin with
            yield re.compile(inners[0], re.DOTALL)
        for inner in inners:
            yield from patterns_in(inner)


def sample(tokens: Iterable[Any]) -> str:
    """A text that `tokens` of a parsed pattern match, or nearly."""
    text = ""
    for kind, value in tokens:
        match str(kind):
            case "LITERAL":
                text += chr(value)
            case "NOT_LITERAL":
                text += "a" if value != ord("a") else "b"
            case "ANY":
                text += "a"
            case "IN":
                text += in_class(value)
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                text += sample(value[2]) * max(1, min(value[0], 300))
            case "SUBPATTERN":
                text += sample(value[3])
            case "BRANCH":
                text += sample(value[1][0])
            case "ATOMIC_GROUP":
                text += sample(value)
            case "ASSERT" if value[0] < 0:  # what must stand before it
                text += sample(value[1])
    return text


def in_class(items: Iterable[Any]) -> str:
    kind, value = next(iter(items))
    if str(kind) == "NEGATE":
        excluded = re.compile("".join(f"[{re.escape(chr(v))}]|" for k, v in items if str(k) == "LITERAL") + r"[\s]")
        return next(character for character in "aA0-_=/:@&" if not excluded.match(character))
    if str(kind) == "RANGE":
        return chr(value[0])
    if str(kind) == "CATEGORY":
        return {"CATEGORY_SPACE": " ", "CATEGORY_DIGIT": "0"}.get(str(value), "a")
    return chr(value)


def pieces(tokens: Iterable[Any]) -> Iterator[str]:
    """What each part of a pattern matches, from the whole down to its letters."""
    tokens = list(tokens)
    yield sample(tokens)
    for i, (kind, value) in enumerate(tokens):
        yield sample(tokens[: i + 1])
        yield sample(tokens[i:])
        match str(kind):
            case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
                yield from pieces(value[2])
            case "SUBPATTERN":
                yield from pieces(value[3])
            case "BRANCH":
                for branch in value[1]:
                    yield from pieces(branch)
            case "ASSERT" | "ASSERT_NOT":
                yield from pieces(value[1])
            case "ATOMIC_GROUP":
                yield from pieces(value)


def attacks(pattern: re.Pattern[Any]) -> Iterator[str]:
    """Texts made of a pattern's own pieces, again and again, that end in what it does not expect."""
    source = pattern.pattern.decode("latin-1") if isinstance(pattern.pattern, bytes) else pattern.pattern
    tokens = _parser.parse(source, pattern.flags & ~re.UNICODE)
    own = [piece[:400] for piece in dict.fromkeys(pieces(tokens)) if piece]
    before = list(dict.fromkeys(sample(tokens[:i]) for i in range(min(5, len(tokens) + 1))))
    for piece in own[:40]:
        body = piece * (SIZE // len(piece))
        yield from (body, *(f"{start}{body}\0" for start in before))
    for one, other in itertools.islice(itertools.permutations(own[:6], 2), 12):
        yield (one + other) * (SIZE // len(one + other)) + "\0"


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Of the processor's time: re looks for signals while it works."""

    def late(*_: object) -> None:
        pytest.fail(f"took longer than {seconds:g} s: {what}")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


USES = sorted(set(uses()), key=lambda use: (use.where, str(use.pattern.pattern), use.call))


def test_the_patterns_are_found() -> None:
    found = {use.where for use in USES}
    assert found >= {
        "src.redaction",
        "src.request.addresses",
        "src.request.images",
        "src.request.aliases",
        "src.settings",
    }
    assert len(USES) > 60


@pytest.mark.parametrize("use", USES, ids=lambda use: f"{use.where}:{use.call}:{str(use.pattern.pattern)[:40]!a}")
def test_a_pattern_takes_time_in_proportion_to_its_text(use: Use) -> None:
    for text in attacks(use.pattern):
        subject: Any = text.encode("latin-1", "replace") if isinstance(use.pattern.pattern, bytes) else text
        run = getattr(use.pattern, use.call)
        with at_most(SECONDS, f"{use.pattern.pattern!r} of {text[:80]!r}"):
            outcome = run(subject[:0], subject) if use.call == "sub" else run(subject)
            if use.call == "finditer":
                list(outcome)


@pytest.mark.parametrize("bad", [r"(?<=[?&])[\w-]*(?:token|key|sig)[\w-]*=[^&]+", r"://[^\s@]+@", r"(a+)+b", r"\s*x"])
def test_a_bad_pattern_would_be_found(bad: str) -> None:
    pattern = re.compile(bad)

    def attack() -> None:
        for text in attacks(pattern):
            with at_most(0.5, "it"):
                pattern.sub("", text)

    with pytest.raises(pytest.fail.Exception, match="took longer"):
        attack()
