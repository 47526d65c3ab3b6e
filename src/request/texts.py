"""Texts of a command line, a table or a form as a request's values."""

from __future__ import annotations

import json
from functools import lru_cache

from src.request.aliases import ALIASES
from src.request.schema import Request

PICTURE_LISTS = ("init_images",)  # of pictures, in any number


def typed(name: str, text: str) -> object:
    """`text` as JSON where the field `name` takes numbers, lists or objects; the request says whether it is right."""
    field = ALIASES.get(name, name)
    if field not in Request.model_fields:
        return text
    if field in PICTURE_LISTS and not text.startswith("["):
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
