"""Pictures by their files' names, as a request's values."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.request.aliases import ALIASES
from src.request.schema import PICTURES
from src.request.texts import PICTURE_LISTS


def each_picture(name: str, value: object, change: Callable[[str], str]) -> object:
    """`value` of the field `name` with each text that stands for a picture changed."""
    field = ALIASES.get(name, name)
    if field in PICTURES and isinstance(value, str):
        return change(value)
    if field in PICTURE_LISTS and isinstance(value, list):
        return [change(entry) if isinstance(entry, str) else entry for entry in value]
    if field == "controls" and isinstance(value, list):
        return [_with_picture(entry, change) for entry in value]
    return value


def _with_picture(entry: Any, change: Callable[[str], str]) -> Any:
    if isinstance(entry, dict) and isinstance(entry.get("image"), str):
        return {**entry, "image": change(entry["image"])}
    return entry


def picture(text: str, folder: Path = Path()) -> str:
    """The file of that name, in `folder`, as a request carries it; what names no file stays."""
    try:
        return base64.b64encode((folder / text).read_bytes()).decode("ascii")
    except (OSError, ValueError):
        return text
