"""`python -m deploy.tables`: the tables of docs/deploy.md, made from the placement; tests hold them to each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from deploy.cards import CARDS, Card
from deploy.plan import disk_gb, estimate, init_seconds, nearest, two_digits
from src.catalog import MODELS, Model, get_model
from src.settings import ROOT, Settings
from src.weights.placement import GB, DoesNotFit

PAGE = ROOT / "docs" / "deploy.md"
_SHOWN = ("FLUX.1-dev", "FLUX.1-schnell", "FLUX.2-klein-4B", "FLUX.2-klein-9B", "FLUX.2-dev")


def cards() -> str:
    """What each card makes of each model."""
    heads = ("model", "card", "`MEMORY_MODE`", "on the card", "exact", "one picture", "1000 pictures")
    rows = [_row(get_model(name), card) for name in _SHOWN for card in CARDS]
    return _table(heads, rows)


def disks() -> str:
    """What each model wants of a worker's disk and start."""
    heads = ("model", "download", "container disk", "`RUNPOD_INIT_TIMEOUT`")
    rows = [
        (
            f"`{model.name}`",
            f"{model.download_gb:g} GB" if model.download_gb else "none",
            f"{disk_gb([model], Settings())} GB",
            f"{init_seconds([model])} s" if model.download_gb else "RunPod's own",
        )
        for model in MODELS
    ]
    return _table(heads, rows)


TABLES: Mapping[str, Callable[[], str]] = {"cards": cards, "disks": disks}


def filled(text: str) -> str:
    """`text` with each table of TABLES between its marks."""
    for name, table in TABLES.items():
        mark, end = f"<!-- python -m deploy.tables: {name} -->", "<!-- end -->"
        pattern = re.compile(f"{re.escape(mark)}.*?{re.escape(end)}", re.DOTALL)
        text = pattern.sub(f"{mark}\n{table()}\n{end}", text)
    return text


def _row(model: Model, card: Card) -> tuple[str, ...]:
    begin = (f"`{model.name}`", card.name)
    try:
        found = estimate(model, card, Settings())
        mode = "`auto`"
    except DoesNotFit:
        instead = nearest(model, card, Settings())
        if instead is None:
            return (*begin, "none fits", *[""] * 4)
        found, mode = instead, f"`{instead.placement.mode}`, asked for"
    if mode == "`auto`":
        mode += f": {found.placement.mode}"
    return (
        *begin,
        mode,
        f"{found.placement.peak / GB:.1f} of {card.memory_gb} GB",
        "yes" if found.exact else "no",
        f"{two_digits(found.seconds)} s, {found.source}",
        f"${two_digits(found.dollars)}, {found.source}",
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
