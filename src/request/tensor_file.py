"""A safetensors file, taken for hostile: its header is counted before it is parsed, and says all but the values.

https://huggingface.co/docs/safetensors: eight bytes for the header's length, the header in JSON, the tensors' bytes.
Nothing is mapped into memory: a file that shrinks while it is read is an error, and not the end of the process.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from src.errors import Refused
from src.request.addresses import SUFFIX, check_beginning
from src.wording import show

# Real files have up to 5,000 tensors, and headers below 1 MB: of a few where a trainer put every caption into it.
MAX_HEADER = 10_000_000  # bytes
MAX_TENSORS = 10_000
MAX_NAME = 300  # characters
_MAX_DIMENSIONS, _MOST_NUMBERS = 8, 1 << 60  # of a tensor
_BEGINNING = 512  # bytes that tell what a file is
# A tensor's entry has five strings, and outside of them one {, two [ and at most so many commas.
_COUNTED = {'"': 2 * 5, "{": 1, "[": 2, ",": _MAX_DIMENSIONS + 3}
_METADATA = "__metadata__"

# Bits of a number; what can be made of them, the engine knows.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header has it; `start` and `size` are bytes of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class TensorFile:
    """The header of the safetensors file at `path`: `tensors` by name, and `metadata`.

    Raises Refused where it is none, or none of this worker's limits, and OSError where it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb", buffering=0) as opened:
            whole = opened.seek(0, 2)
            opened.seek(0)
            beginning = _read(opened, min(_BEGINNING, whole))
            check_beginning(beginning)
            length = int.from_bytes(beginning[:8], "little")
            if whole >= 8 and MAX_HEADER < length <= whole - 8:
                raise Refused(f"has a header of {length:,} bytes, and at most {MAX_HEADER:,} are read")
            if whole < 8 or length > whole - 8:
                raise _incomplete(f"its header would have {length:,} bytes, and the file has {whole:,}")
            opened.seek(8)
            written = _read(opened, length)
        header = _parsed(written)
        metadata = header.pop(_METADATA, {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise _incomplete(f"{_METADATA} must hold texts alone")
        self.metadata: Mapping[str, str] = metadata
        self.tensors: Mapping[str, TensorInfo] = dict(_entries(header, 8 + length, whole))

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file, for `read`."""
        with self.path.open("rb", buffering=0) as opened:
            yield opened

    def read(self, name: str, opened: BinaryIO, into: memoryview) -> None:
        """Put the bytes of a tensor `into` memory of its size. Raises OSError."""
        opened.seek(self.tensors[name].start)
        _fill(opened, into)


def _parsed(written: bytes) -> dict[str, Any]:
    """The header, of which is known before it is parsed how many objects that makes."""
    plain = written.replace(rb"\\", b"").replace(rb"\"", b"")
    _count(plain, '"')
    outside = b"".join(plain.split(b'"')[::2])
    for character in "{[,":
        _count(outside, character)
    try:
        header = json.loads(written.decode(), object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise _incomplete(f"its header is no JSON: {error}") from None
    except (ValueError, RecursionError) as error:  # bytes that are no text, a number of thousands of digits
        raise _incomplete(f"its header is no JSON that can be read: {type(error).__name__}") from None
    if not isinstance(header, dict):
        raise _incomplete("its header is no JSON object")
    return header


def _count(text: bytes, character: str) -> None:
    most, found = _COUNTED[character] * (MAX_TENSORS + 2), text.count(character.encode())  # 2: the header, its metadata
    if found > most:
        raise Refused(
            f"has a header with {found:,} times the character {character}, and at most {most:,} are read: those of "
            f"{MAX_TENSORS:,} tensors"
        )


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each of whose names comes once."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _incomplete("a name comes twice in its header")
    return found


def _entries(header: Mapping[str, Any], start: int, whole: int) -> Iterable[tuple[str, TensorInfo]]:
    """The tensors, which must lie one behind the other and be all of the file."""
    entries = [(name, _entry(name, value, start)) for name, value in header.items()]
    if len(entries) > MAX_TENSORS:
        raise Refused(f"holds {len(entries):,} tensors, and at most {MAX_TENSORS:,} are read")
    for _, entry in sorted(entries, key=lambda each: (each[1].start, each[1].size)):
        if entry.start != start:
            raise _incomplete("its tensors have holes between them, or lie over each other")
        start += entry.size
    if start != whole:
        raise _incomplete(f"its header describes {start:,} bytes, and it has {whole:,}")
    return entries


def _entry(name: str, value: Any, start: int) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise Refused(f"names a tensor {show(name)}, and names of at most {MAX_NAME} characters are read")
    if not name.isprintable():  # half of a character, a NUL or a line break
        raise _incomplete(f"{show(name)} is no name")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _incomplete(f"{show(name)} must have a dtype, a shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or len(shape) > _MAX_DIMENSIONS:
        raise _incomplete(f"{show(name)} has the shape {show(shape)} and the data_offsets {show(offsets)}")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise Refused(f"holds numbers of the type {show(dtype)} in {show(name)}; known are {', '.join(_BITS)}")
    size = offsets[1] - offsets[0]
    if math.prod(max(length, 1) for length in shape) > _MOST_NUMBERS or size * 8 != math.prod(shape) * _BITS[dtype]:
        raise _incomplete(f"{show(name)} is {dtype} of the shape {show(shape)}, and has {size:,} bytes")
    return TensorInfo(dtype, tuple(shape), start + offsets[0], size)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _incomplete(why: str) -> Refused:
    return Refused(f"is not a complete {SUFFIX} file ({why})")


def _read(opened: BinaryIO, size: int) -> bytes:
    memory = bytearray(size)
    _fill(opened, memoryview(memory))
    return bytes(memory)


def _fill(opened: BinaryIO, into: memoryview) -> None:
    start = 0
    while start < len(into):
        count = opened.readinto(into[start:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(errno.ESTALE, "it changed while it was read")
        start += count
