"""Texts of a command line or of a table as a request's values, and pictures by their files' names."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from src.request.aliases import ALIASES
from src.request.schema import PICTURES, Request

_LISTS = ("init_images",)  # of pictures, in any number


def typed(name: str, text: str) -> object:
    """`text` as JSON where the field `name` takes numbers, lists or objects; the request says whether it is right."""
    field = ALIASES.get(name, name)
    if field not in Request.model_fields:
        return text
    if field in _LISTS and not text.startswith("["):
        return [text] if text.startswith("data:") else [part.strip() for part in text.split(",")]
    kinds = _kinds(field)
    if "string" in kinds and not ("array" in kinds and text.startswith("[")):
        return text
    if "boolean" in kinds and text.lower() in ("true", "false"):  # spreadsheets write TRUE
        return text.lower() == "true"
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


@lru_cache
def _kinds(field: str) -> frozenset[str | None]:
    schema = Request.model_json_schema()["properties"][field]
    return frozenset(kind.get("type") for kind in schema.get("anyOf", [schema]))


def each_picture(name: str, value: object, change: Callable[[str], str]) -> object:
    """`value` of the field `name` with each text that stands for a picture changed."""
    field = ALIASES.get(name, name)
    if field in PICTURES and isinstance(value, str):
        return change(value)
    if field in _LISTS and isinstance(value, list):
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
