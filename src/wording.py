"""How an answer words what was received: in a few characters, whatever it was."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

MAX_SHOWN = 60  # characters of a text that an answer repeats
_MAX_CHARACTERS = 200  # of a list or an object

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = MAX_SHOWN
_repr.maxlevel = 3


def show(value: object) -> str:
    """`value` in a few words: never a whole picture or prompt."""
    if isinstance(value, str) and len(value) > MAX_SHOWN:
        return f"{_repr.repr(value)} ({len(value):,} characters)"
    try:
        shown = _repr.repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "an integer of thousands of digits"
    return shown if len(shown) <= _MAX_CHARACTERS else f"{shown[:_MAX_CHARACTERS]}..."


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """`; did you mean ...?` where one of `allowed` is close to `name`, else nothing."""
    if len(name) > MAX_SHOWN:
        return ""
    close = difflib.get_close_matches(name.lower(), list(allowed), n=1, cutoff=0.8)
    return f"; did you mean {close[0]}?" if close else ""
