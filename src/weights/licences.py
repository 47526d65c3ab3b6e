"""Under which licence a model's weights are: what its row says, its own file, or its card on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import ModelCard

from src.catalog import MODELS, Model

UNKNOWN = "unknown: the model's card says none"
CARD = "README.md"  # beside a model's files: https://huggingface.co/docs/hub/model-cards
# What a file's metadata may call it: https://github.com/Stability-AI/ModelSpec and
# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_KEYS = ("modelspec.license", "general.license.name", "general.license")
_SAYS_NOTHING = frozenset({"", "none", "null", "unknown", "unspecified"})
_MOST_READ = 1 << 18  # bytes of a card; its metadata stand first
_MOST_SHOWN = 200  # characters
_NON_COMMERCIAL = re.compile(r"non[-_. ]?commercial|(?<![a-z])nc(?![a-z])|research[-_ ]only", re.IGNORECASE)


def licence_of(model: Model, folder: Path | None, metadata: Mapping[str, Any] = MappingProxyType({})) -> str:
    """What `model` is licensed under, in words for people; UNKNOWN where nobody says.

    `folder` holds its files and perhaps its card, `metadata` is a single file's own. A row of the catalog is believed,
    a copy of such a model what is said with it, a fine-tune nothing else: its licence need not be that of its base.
    """
    if model in MODELS:
        return model.licence
    own = (_words(metadata.get(key)) for key in _KEYS)
    return next(filter(None, own), "") or _of_card(folder) or model.licence or UNKNOWN


def is_non_commercial(licence: str) -> bool:
    """Whether its name says that it bounds commercial use."""
    return bool(_NON_COMMERCIAL.search(licence))


def _of_card(folder: Path | None) -> str:
    """What the card in `folder` says; nothing where there is none, or none that can be read: anybody writes them."""
    try:
        if folder is None or not (folder / CARD).is_file():  # of a pipe nothing ever comes
            return ""
        with (folder / CARD).open("rb") as file:
            text = file.read(_MOST_READ).decode("utf-8-sig", errors="replace")
        said = vars(ModelCard(text, ignore_metadata_errors=True).data)
    except Exception:  # noqa: BLE001 - whatever a reader of YAML raises, it ends no start
        return ""
    written = said.get("license")
    several = written if isinstance(written, list) else [written]
    name = _words(said.get("license_name")) or ", ".join(filter(None, map(_words, several)))
    link = _words(said.get("license_link"))
    return f"{name} ({link})" if name and link.startswith("https://") else name


def _words(value: object) -> str:
    """A text in one line; "" for what is none, or says nothing."""
    if not isinstance(value, str):
        return ""
    words = " ".join("".join(each if each.isprintable() else " " for each in value).split())
    return "" if words.lower() in _SAYS_NOTHING else words[:_MOST_SHOWN]
