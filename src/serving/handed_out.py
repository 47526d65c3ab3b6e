"""What job-take hands out -> jobs that the SDK can carry.

One that cannot be read is refused or left out by itself, and never the others with it.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from src.wording import show

_MOST_DIGITS = 4_000  # Python reads no longer integers
_MOST_TOKENS = 3_000_000  # that are looked at to find the id of a job that is nested too deeply
_TOKENS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]+|[\]}]+|,', re.DOTALL)
_ID = re.compile(r'\s*"id"\s*:\s*("[^"\\]*(?:\\.[^"\\]*)*")\s*', re.DOTALL)


@dataclass
class HandedOut:
    """`jobs`, by id, have an id that can be written into an address, and an input, which may be anything.

    `refused` has what is wrong of those that cannot be run, by id; `left_out` a line for what nobody can be told of.
    """

    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def add(self, element: object) -> None:
        """One job as RunPod sent it."""
        id = element.get("id") if isinstance(element, dict) else None
        if not isinstance(element, dict) or not isinstance(id, str) or not id or not _is_writable(id):
            what = f"a {type(element).__name__}" if not isinstance(element, dict) else f"a job with the id {show(id)}"
            self.left_out.append(f"{what}, which cannot be answered")
        elif id in self.jobs:
            self.left_out.append(f"job {show(id)} a second time")
        else:
            # The SDK keeps a job's fields as attributes.
            fields = {name: value for name, value in element.items() if name != "self" and not name.startswith("__")}
            self.jobs[id] = {"input": None, **fields}


def read_jobs(body: bytes) -> HandedOut:
    """The jobs of a body: one, or a list of them."""
    handed_out, text = HandedOut(), body.decode(errors="replace")
    try:
        found = _read(text) if text.strip() else None
        for element in found if isinstance(found, list) else [found] if found else []:
            handed_out.add(element)
    except RecursionError:
        _read_one_by_one(text, handed_out)
    except ValueError:
        handed_out.left_out.append(f"{len(body):,} bytes that are no JSON")
    return handed_out


def _read(text: str) -> Any:
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) <= _MOST_DIGITS else float(digits))


def _read_one_by_one(text: str, handed_out: HandedOut) -> None:
    """Of a body that is nested more deeply than Python reads: what can be read, and the ids of the rest."""
    elements = [text] if text.lstrip().startswith("{") else (text[start:end] for start, end in _items(text))
    for element in elements:
        try:
            handed_out.add(_read(element))
        except RecursionError:
            names = (_ID.fullmatch(element, start, end) for start, end in _items(element))
            id = next((json.loads(name[1]) for name in names if name), None)
            handed_out.add({"id": id})
            if id in handed_out.jobs:
                handed_out.refused[id] = "is nested more deeply than can be read: no field of a request is"
        except ValueError:
            handed_out.left_out.append(f"{len(element):,} characters that are no JSON")
    if not (handed_out.jobs or handed_out.left_out):
        handed_out.left_out.append(f"{len(text):,} characters that are no JSON")


def _items(text: str) -> Iterator[tuple[int, int]]:
    """Where the items of the outermost list or object begin and end."""
    depth = start = 0
    for token in itertools.islice(_TOKENS.finditer(text), _MOST_TOKENS):
        match token[0][0]:
            case "[" | "{":
                if depth == 0:
                    start = token.start() + 1
                depth += len(token[0])
            case "]" | "}":
                if len(token[0]) >= depth:
                    yield start, token.start() + depth - 1
                    return
                depth -= len(token[0])
            case "," if depth == 1:
                yield start, token.start()
                start = token.end()


def _is_writable(id: str) -> bool:
    """Whether it can be sent at all."""
    try:
        id.encode()
    except UnicodeEncodeError:
        return False
    return True
