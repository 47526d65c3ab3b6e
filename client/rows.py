"""A file of prompts -> rows, each a request, and all that is wrong with all of them before anything is paid.

CSV has a column for each field of a request, JSONL an object on each line, any other file a prompt on each line. Rows
have the numbers that a spreadsheet or an editor shows.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from client.values import each_picture, picture
from src.errors import InvalidRequest
from src.request.aliases import ALIASES, NAMES
from src.request.reading import read_request
from src.request.schema import MAX_SEED, Request
from src.request.texts import typed
from src.wording import show

MAX_INPUT_MB = 10  # megabytes (10^6) that /run carries
_DELIMITERS = ",;\t"
_LONGEST_NAME = 1_000  # characters of a file's
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]{60,}")  # too long a word for a file's name, and without a dot
_MOST_NUMBERS = 5  # of rows with one fault that are named
_MOST_FAULTS = 100
_KNOWN = NAMES | Request.model_fields.keys()
_TABLES, _LINES = (".csv", ".tsv"), (".jsonl", ".ndjson")


class InvalidRows(Exception):
    """All that is wrong with a file of prompts: `faults` are whole lines, and str() has all of them."""

    def __init__(self, faults: Sequence[str]) -> None:
        shown, more = faults[:_MOST_FAULTS], len(faults) - _MOST_FAULTS
        self.faults = (*shown, f"and {more:,} more") if more > 0 else tuple(shown)
        super().__init__("\n".join(self.faults))


@dataclass(frozen=True)
class Row:
    """One row: its fields as they were written, with pictures by their files' names; those are found in `folder`.

    Without a `seed` of its own it gets one. It asks for so many `pictures`, the i-th of them of the seed + i.
    """

    number: int
    fields: Mapping[str, Any]
    folder: Path
    seed: int | None = None
    pictures: int = 1


@dataclass(frozen=True)
class Drawing:
    """One job: a row with a seed."""

    row: Row
    seed: int

    @property
    def key(self) -> tuple[int, int]:
        """What no other drawing of the batch has: the row's number and the seed."""
        return self.row.number, self.seed

    @property
    def seeds(self) -> range:
        """Of its pictures."""
        return range(self.seed, self.seed + self.row.pictures)

    def input(self) -> dict[str, Any]:
        """What RunPod is sent, with the files of the pictures."""
        found = {
            name: each_picture(name, value, lambda text: picture(text, self.row.folder))
            for name, value in self.row.fields.items()
        }
        if isinstance(nested := found.get("parameters"), Mapping):  # Hugging Face's
            found["parameters"] = {name: value for name, value in nested.items() if name != "seed"}
        return {**found, "seed": self.seed}

    def request(self, seed: int) -> dict[str, Any]:
        """What draws the picture of that seed alone, with the files of pictures by their names."""
        fields = {name: value for name, value in self.row.fields.items() if ALIASES.get(name, name) != "num_images"}
        if isinstance(prompts := fields.get("prompt"), list) and len(prompts) > 1:
            fields["prompt"] = prompts[seed - self.seed]
        return {**fields, "seed": seed}


@dataclass(frozen=True)
class Batch:
    """The rows, each to be drawn with so many `seeds`; the digest changes where any request does."""

    rows: tuple[Row, ...]
    seeds: int
    warnings: tuple[str, ...]
    digest: str

    @property
    def pictures(self) -> int:
        """How many there will be."""
        return self.seeds * sum(row.pictures for row in self.rows)

    def picked(self) -> dict[int, int]:
        """A seed for each row that has none, by its number."""
        return {row.number: random.randrange(2**32) for row in self.rows if row.seed is None}  # noqa: S311

    def drawings(self, picked: Mapping[int, int]) -> tuple[Drawing, ...]:
        """A job for each row and seed: one picture each, so that none is lost with another, and workers share them."""
        first = {row.number: picked[row.number] if row.seed is None else row.seed for row in self.rows}
        return tuple(Drawing(row, first[row.number] + i * row.pictures) for row in self.rows for i in range(self.seeds))


def read_batch(file: Path, for_all: Mapping[str, Any] | None = None, *, seeds: int = 1) -> Batch:
    """The rows of `file`, with the fields `for_all` over each row's own. Raises InvalidRows, OSError."""
    given = for_all or {}
    faults, warnings = defaultdict[str, list[int]](list), defaultdict[str, list[int]](list)
    rows: list[Row] = []
    files = _Files()
    digest = hashlib.sha256(str(seeds).encode())
    for number, fields in _read(file, given):
        if isinstance(fields, str):
            faults[fields].append(number)
            continue
        row, wrong, odd = _checked(Row(number, {**fields, **given}, file.parent), seeds, files)
        rows.append(row)
        for line in wrong:
            faults[line].append(number)
        for line in odd:
            warnings[line].append(number)
        digest.update(json.dumps([number, row.fields, files.digests(row)], sort_keys=True).encode())
    if faults:
        raise InvalidRows(list(_lines(faults)))
    if not rows:
        raise InvalidRows([f"{file} holds no row: it needs one for each picture"])
    return Batch(tuple(rows), seeds, tuple(_lines(warnings)), digest.hexdigest())


def _checked(row: Row, seeds: int, files: _Files) -> tuple[Row, list[str], tuple[str, ...]]:
    """The row with its seed and its number of pictures, what is wrong with it and what is odd."""
    faults = [f"{name}: there is no file {show(text)}" for name, text in files.missing(row)]
    try:
        request, wrong, odd = read_request({"input": row.fields})
    except InvalidRequest as error:
        return row, [*faults, *map(str, error.faults)], ()
    faults += map(str, wrong)
    faults += (f"{name}: makes no picture, leave it out" for name in ("describe", "dry_run") if getattr(request, name))
    if (size := files.bytes(row)) > MAX_INPUT_MB * 1e6:
        faults.append(f"its pictures take {size / 1e6:.1f} MB, and RunPod carries {MAX_INPUT_MB} MB to a worker")
    count = len(request.prompt) if len(request.prompt) > 1 else request.num_images
    if request.seed is not None and request.seed + seeds * count - 1 > MAX_SEED:
        faults.append(f"seed: {request.seed} leaves no room for {seeds * count} pictures below 2^63")
    return replace(row, seed=request.seed, pictures=count), faults, odd


class _Files:
    """The pictures that rows name, each looked at once."""

    def __init__(self) -> None:
        self._found: dict[Path, tuple[str, int] | None] = {}  # digest, bytes

    def missing(self, row: Row) -> Iterator[tuple[str, str]]:
        """Fields and what in them can only be the name of a file, and of one that is not there."""
        for name, text in _pictures(row):
            other = "://" in text[:20] or text.startswith("data:") or _BASE64.fullmatch(text)
            if not other and len(text) <= _LONGEST_NAME and self._of(row.folder / text) is None:
                yield name, text

    def digests(self, row: Row) -> list[str]:
        return [found[0] for _, text in _pictures(row) if (found := self._of(row.folder / text))]

    def bytes(self, row: Row) -> int:
        """Of the whole row, as it is sent."""
        sizes = [(len(text), self._of(row.folder / text)) for _, text in _pictures(row)]
        return sum(4 * -(-found[1] // 3) if found else length for length, found in sizes)

    def _of(self, file: Path) -> tuple[str, int] | None:
        if file not in self._found:
            try:
                with file.open("rb") as opened:
                    self._found[file] = (hashlib.file_digest(opened, "sha256").hexdigest(), opened.tell())
            except (OSError, ValueError):
                self._found[file] = None
        return self._found[file]


def _pictures(row: Row) -> list[tuple[str, str]]:
    """Every text of `row` that stands for a picture, and its field."""
    found: list[tuple[str, str]] = []
    for name, value in row.fields.items():

        def note(text: str, name: str = name) -> str:
            found.append((name, text))
            return text

        each_picture(name, value, note)
    return found


def _lines(found: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """A line for each fault, with the numbers of its rows."""
    for line, numbers in found.items():
        first = ", ".join(map(str, numbers[:_MOST_NUMBERS]))
        more = f" and {len(numbers) - _MOST_NUMBERS:,} more" if len(numbers) > _MOST_NUMBERS else ""
        yield f"{'row' if len(numbers) == 1 else 'rows'} {first}{more}: {line}"


# ---- files

_Found = tuple[int, dict[str, Any] | str]  # a row's number, and its fields or what is wrong with all of it


def _read(file: Path, given: Mapping[str, Any]) -> Iterator[_Found]:
    text = _decoded(file)
    suffix = file.suffix.lower()
    if suffix in _TABLES:
        return _table(text, given)
    if suffix == ".json":
        return _document(text)
    lines = enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1)
    said = ((number, line.strip()) for number, line in lines if line.strip())
    if suffix in _LINES:
        return ((number, _fields(line)) for number, line in said)
    return ((number, {"prompt": line}) for number, line in said)


def _decoded(file: Path) -> str:
    written = file.read_bytes()
    utf_16 = written.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))  # Excel's "Unicode text"
    try:
        return written.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = written[: error.start].count(b"\n") + 1
        odd = f"line {line} holds the byte {written[error.start]:#04x}"
        raise InvalidRows([f"{file} is no text in UTF-8: {odd}; save it as CSV UTF-8"]) from None


def _table(text: str, given: Mapping[str, Any]) -> Iterator[_Found]:
    """The rows of a CSV; empty cells say nothing, and rows of such cells alone are none."""
    if not text.strip():
        return
    names, records = _records(text)
    faults = []
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        faults.append(f"row 1: names {', '.join(twice)} more than once")
    if "prompt" not in {ALIASES.get(name, name) for name in (*names, *given)}:
        faults.append(
            f"row 1: must name the columns, each a field of a request, and one of them prompt; it holds "
            f"{show(names)}; where each line is a prompt, let the file's name end in .txt"
        )
    if faults:
        raise InvalidRows(faults)
    for number, cells in records:
        if isinstance(cells, str):
            yield number, cells
            continue
        said = {name: cell.strip() for name, cell in zip(names, cells, strict=False) if cell.strip()}
        if extra := [cell for cell in cells[len(names) :] if cell.strip()]:
            where = f"{show(extra[0])} is in none of {len(names)} columns"
            yield number, f"{where}; a text that holds the delimiter stands in double quotes"
        elif "" in said:
            yield number, f"has {show(said[''])} in a column without a name"
        elif said:
            yield number, {name: typed(name, cell) for name, cell in said.items()}


def _records(text: str) -> tuple[list[str], Iterator[tuple[int, list[str] | str]]]:
    """The columns' names, and the records below them with their numbers, or what is wrong with the last one."""
    csv.field_size_limit(1 << 30)  # a picture in base64 may stand in a cell

    def split(delimiter: str) -> Iterator[list[str]]:
        return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)

    def names(delimiter: str) -> list[str]:
        try:
            return [column(cell) for cell in next(split(delimiter))]
        except csv.Error:
            return []

    def records() -> Iterator[tuple[int, list[str] | str]]:
        number, rest = 1, split(delimiter)
        next(rest, None)
        try:
            for number, cells in enumerate(rest, 2):
                yield number, cells
        except csv.Error as error:
            yield number + 1, f"cannot be read as CSV ({error}): look at its quotes"

    delimiter = max(_DELIMITERS, key=lambda each: (sum(name in _KNOWN for name in names(each)), len(names(each))))
    return names(delimiter), records()


def column(cell: str) -> str:
    """A column's name as a field's, which people write with capitals and blanks."""
    name = cell.strip()
    plain = name.lower().replace(" ", "_").replace("-", "_")
    return name if name in _KNOWN or plain not in _KNOWN else plain


def _document(text: str) -> Iterator[_Found]:
    """A JSON file: a request, or a list of some, which are rows 1, 2 ..."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidRows([f"the file is no JSON: {error}"]) from None
    for number, entry in enumerate(found if isinstance(found, list) else [found], 1):
        yield number, _fields_of(entry)


def _fields(line: str) -> dict[str, Any] | str:
    try:
        return _fields_of(json.loads(line))
    except (ValueError, RecursionError) as error:
        return f"is no JSON: {error}"


def _fields_of(entry: object) -> dict[str, Any] | str:
    """A request's fields: the object itself, or what it has as `input`."""
    if isinstance(entry, dict) and entry.keys() == {"input"}:
        entry = entry["input"]
    return entry if isinstance(entry, dict) else f"must be an object of request fields, got {show(entry)}"
