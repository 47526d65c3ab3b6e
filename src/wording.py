"""How an answer words what was received: in a few characters, whatever it was."""

from __future__ import annotations

import difflib
import itertools
import reprlib
from collections.abc import Iterable, Mapping

from src.redaction import ends_of, without_secrets

MAX_SHOWN = 60  # characters of a text that an answer repeats
_MAX_CHARACTERS = 200  # of a list or an object
_MAX_READ = 90  # characters of a text, from each end, that are looked at; together fewer than make a picture


class _Short(reprlib.Repr):
    """Looks at no more than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = MAX_SHOWN
        self.maxlevel = 3

    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(without_secrets(ends_of(x, _MAX_READ)), level)

    def repr_dict(self, x: Mapping[object, object], level: int) -> str:
        return super().repr_dict(dict(itertools.islice(x.items(), self.maxdict + 1)), level)


_short = _Short()


def show(value: object) -> str:
    """`value` in a few words: never a whole picture or prompt, nor a part of a secret."""
    try:
        shown = _short.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "an integer of thousands of digits"
    if isinstance(value, str):
        return f"{shown} ({len(value):,} characters)" if len(value) > MAX_SHOWN else shown
    return shown if len(shown) <= _MAX_CHARACTERS else f"{shown[:_MAX_CHARACTERS]}..."


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean ...?` where one of `allowed` is close to `name`, else nothing."""
    if len(name) > MAX_SHOWN:
        return ""
    close = difflib.get_close_matches(name.lower(), list(allowed), n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""
