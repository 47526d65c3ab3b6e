"""Pictures into a folder: their files, a sheet of them all, a table, and a page to look at them.

Knows nothing of where they come from; local_test.py saves with it too.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

_GAP = 4  # pixels between the pictures of a contact sheet
_PAGE = Path(__file__).parent / "gallery.html"
_MOST_SHOWN = 300  # characters of a value in the gallery, so that no picture in base64 stands there


def save(file: Path, content: bytes) -> None:
    """Write `file` whole or not at all, in the place of what was there; that may have been another user's."""
    unfinished = file.with_name(f".{file.name}.part")
    unfinished.unlink(missing_ok=True)
    try:
        with unfinished.open("xb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        unfinished.replace(file)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def contact_sheet(files: Sequence[Path], to: Path, *, columns: int, side: int | None = None) -> None:
    """The pictures of `files` side by side in so many columns, row by row, into the file `to`.

    Each is as large as the first, or at most `side` pixels wide and high.
    """
    with Image.open(files[0]) as first:
        width, height = first.size
    if side is not None and max(width, height) > side:
        width, height = (max(1, round(length * side / max(first.size))) for length in first.size)
    rows = -(-len(files) // columns)
    sheet = Image.new("RGB", (columns * (width + _GAP) - _GAP, rows * (height + _GAP) - _GAP), "white")
    for i, file in enumerate(files):
        with Image.open(file) as picture:
            small = picture.convert("RGB")
        if small.size != (width, height):
            small.thumbnail((width, height))
        sheet.paste(small, (i % columns * (width + _GAP), i // columns * (height + _GAP)))
    content = io.BytesIO()
    sheet.save(content, Image.registered_extensions()[to.suffix])
    save(to, content.getvalue())


@dataclass(frozen=True)
class Line:
    """One picture of a batch, or why there is none."""

    row: int
    seed: int
    file: str  # its name, empty where there is none
    seconds: float | None  # that the worker took for it
    error: str
    request: Mapping[str, Any]  # as the row says it


def save_table(lines: Iterable[Line], to: Path) -> None:
    """results.csv: row, seed, file, seconds, error."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(("row", "seed", "file", "seconds", "error"))
    for line in lines:
        seconds = "" if line.seconds is None else f"{line.seconds:.3f}"
        table.writerow((line.row, line.seed, line.file, seconds, line.error))
    save(to, text.getvalue().encode())


def save_gallery(lines: Sequence[Line], to: Path, title: str) -> None:
    """A page that opens from the disk, without a host or a network: filter by text, a request at a click."""
    page = _PAGE.read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    failures = sum(bool(line.error) for line in lines)
    parts = {
        "script-digest": digest,
        "title": html.escape(title),
        "count": f"{len(lines) - failures:,} pictures" + (f", {failures:,} failed" if failures else ""),
        "pictures": "\n".join(map(_card, lines)),
    }
    for name, part in parts.items():
        page = page.replace(f"<!-- {name} -->", part)
    save(to, page.encode())


def _card(line: Line) -> str:
    prompt = line.request.get("prompt", "")
    prompt = prompt if isinstance(prompt, str) else " | ".join(map(str, prompt))
    request = json.dumps(_short({**line.request, "seed": line.seed}), indent=2, ensure_ascii=False)
    shown = (
        f'<img src="{html.escape(line.file)}" alt="{html.escape(prompt)}" loading="lazy" decoding="async">'
        if line.file
        else f'<span class="error">{html.escape(line.error)}</span>'
    )
    seconds = "" if line.seconds is None else f", {line.seconds:.2f} s"
    return (
        f'<li><button data-request="{html.escape(request)}" data-file="{html.escape(line.file)}">{shown}'
        f'<span class="prompt">{html.escape(prompt)}</span>'
        f'<span class="about">row {line.row}, seed {line.seed}{seconds}</span></button></li>'
    )


def _short(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= _MOST_SHOWN * 20 and not _is_long_word(value) else f"{value[:_MOST_SHOWN]}..."
    if isinstance(value, Mapping):
        return {name: _short(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(inner) for inner in value]
    return value


def _is_long_word(text: str) -> bool:
    return len(text) > _MOST_SHOWN and " " not in text[:_MOST_SHOWN]
