"""A GGUF file's header, taken for hostile: counted while it is read, and no value of a tensor with it.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: a magic word, a version, two counts, then keys with their
values and the tensors' names, sizes and places, all little-endian.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any

from src.errors import Refused
from src.request.tensor_file import MAX_NAME, MAX_TENSORS, TensorInfo
from src.wording import show

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_KEYS = 10_000
_MAX_HEADER = 100_000_000  # bytes: a language model's vocabulary stands in it
_MAX_DIMENSIONS, _MOST_NUMBERS = 4, 1 << 50  # of a tensor
_ALIGNMENT, _MAX_ALIGNMENT = 32, 1 << 20  # bytes
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?", 10: "<Q", 11: "<q", 12: "<d"}
_KEPT = 64  # of an array's values
_MAX_TEXTS = 1_000_000  # of an array: a vocabulary has some 250,000


@dataclass(frozen=True)
class GgmlType:
    """How `block` values lie in `size` bytes."""

    name: str
    block: int
    size: int


# By their numbers in a file: gguf.GGMLQuantizationType and GGML_QUANT_SIZES, which a test holds them against.
TYPES: Mapping[int, GgmlType] = MappingProxyType(
    {
        number: GgmlType(name, block, size)
        for number, name, block, size in (
            (0, "F32", 1, 4), (1, "F16", 1, 2), (2, "Q4_0", 32, 18), (3, "Q4_1", 32, 20), (6, "Q5_0", 32, 22),
            (7, "Q5_1", 32, 24), (8, "Q8_0", 32, 34), (9, "Q8_1", 32, 40), (10, "Q2_K", 256, 84),
            (11, "Q3_K", 256, 110), (12, "Q4_K", 256, 144), (13, "Q5_K", 256, 176), (14, "Q6_K", 256, 210),
            (15, "Q8_K", 256, 292), (16, "IQ2_XXS", 256, 66), (17, "IQ2_XS", 256, 74), (18, "IQ3_XXS", 256, 98),
            (19, "IQ1_S", 256, 50), (20, "IQ4_NL", 32, 18), (21, "IQ3_S", 256, 110), (22, "IQ2_S", 256, 82),
            (23, "IQ4_XS", 256, 136), (24, "I8", 1, 1), (25, "I16", 1, 2), (26, "I32", 1, 4), (27, "I64", 1, 8),
            (28, "F64", 1, 8), (29, "IQ1_M", 256, 56), (30, "BF16", 1, 2), (34, "TQ1_0", 256, 54),
            (35, "TQ2_0", 256, 66), (39, "MXFP4", 32, 17), (40, "NVFP4", 64, 36), (41, "Q1_0", 128, 18),
        )
    }
)  # fmt: skip


class GgufHeader:
    """The header of the GGUF file at `path`: `tensors` by name, and `metadata`, of long arrays the beginning.

    Raises Refused where it is none, or not whole, and OSError where it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with path.open("rb") as opened:
            self._opened = opened
            self._whole = path.stat().st_size
            self._read_in = 0
            if self._bytes(4) != MAGIC:
                raise Refused("is no GGUF file")
            version = self._number("<I")
            if version not in _VERSIONS:
                raise Refused(f"is GGUF of version {version}, and {' and '.join(map(str, _VERSIONS))} are read")
            tensors, keys = self._number("<Q"), self._number("<Q")
            if tensors > MAX_TENSORS or keys > _MAX_KEYS:
                raise Refused(
                    f"says that it holds {tensors:,} tensors and {keys:,} keys, and at most {MAX_TENSORS:,} and "
                    f"{_MAX_KEYS:,} are read"
                )
            self.metadata: Mapping[str, Any] = {self._text(): self._value(self._number("<I")) for _ in range(keys)}
            listed = [self._listed() for _ in range(tensors)]
            self.tensors: Mapping[str, TensorInfo] = self._laid_out(listed)

    # What stands in the file, piece by piece

    def _bytes(self, count: int) -> bytes:
        self._read_in += count
        if self._read_in > _MAX_HEADER:
            raise Refused(f"is GGUF with a header of more than {_MAX_HEADER:,} bytes, and no more are read")
        read = self._opened.read(count) if self._read_in <= self._whole else b""
        if len(read) < count:
            raise _incomplete(f"it ends within its header, after {self._whole:,} bytes")
        return read

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))[0]

    def _text(self) -> str:
        length = self._number("<Q")
        if length > _MAX_HEADER:
            raise _incomplete(f"a text in it would have {length:,} bytes")
        return self._bytes(length).decode(errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            return self._number(self._form(kind))
        kind, length = self._number("<I"), self._number("<Q")
        if kind == _STRING:
            if length > _MAX_TEXTS:
                raise Refused(f"is GGUF with an array of {length:,} texts, and at most {_MAX_TEXTS:,} are read")
            texts = [self._text()[:MAX_NAME] for _ in self._counted(length, 8)]
            return texts[:_KEPT]
        form = self._form(kind)
        size = struct.calcsize(form)
        self._counted(length, size)
        read = self._bytes(length * size)
        return [value for (value,) in struct.iter_unpack(form, read[: _KEPT * size])]

    def _counted(self, length: int, size: int) -> range:
        if length * size > self._whole:
            raise _incomplete(f"an array in it would have {length:,} values")
        return range(length)

    def _form(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise _incomplete(f"it names the kind {kind} of a value, which there is not")
        return _SCALARS[kind]

    def _listed(self) -> tuple[str, GgmlType, tuple[int, ...], int]:
        name, dimensions = self._text(), self._number("<I")
        if len(name) > MAX_NAME or not name.isprintable():
            raise _incomplete(f"{show(name)} is no name of a tensor")
        if dimensions > _MAX_DIMENSIONS:
            raise _incomplete(f"{show(name)} would have {dimensions:,} dimensions")
        shape = tuple(reversed([self._number("<Q") for _ in range(dimensions)]))
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in TYPES:
            raise Refused(f"holds {show(name)} in the GGML type number {kind}, which is not known here")
        if math.prod(max(length, 1) for length in shape) > _MOST_NUMBERS or (shape or (1,))[-1] % TYPES[kind].block:
            raise _incomplete(f"{show(name)} is {TYPES[kind].name} of the shape {list(shape)}")
        return name, TYPES[kind], shape, offset

    def _laid_out(self, listed: list[tuple[str, GgmlType, tuple[int, ...], int]]) -> dict[str, TensorInfo]:
        """The tensors, none of which may lie over another or behind the file's end."""
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT:
            raise _incomplete(f"its alignment is {show(alignment)}")
        begin = -(-self._read_in // alignment) * alignment
        found: dict[str, TensorInfo] = {}
        end = begin
        for name, kind, shape, offset in sorted(listed, key=lambda each: each[3]):
            size = math.prod(shape) // kind.block * kind.size
            start = begin + offset
            if name in found or start < end:
                raise _incomplete(f"{show(name)} comes twice, or lies over another tensor")
            found[name] = TensorInfo(kind.name, self._shape_before(name, shape), start, size)
            end = start + size
        if end > self._whole:
            raise _incomplete(f"its header describes {end:,} bytes, and it has {self._whole:,}")
        return found

    def _shape_before(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What a tensor was before ComfyUI-GGUF made its rows as long as GGML's blocks."""
        written = self.metadata.get(f"comfy.gguf.orig_shape.{name}")
        if written is None:
            return shape
        if not isinstance(written, list) or not all(isinstance(each, int) and each >= 0 for each in written):
            raise _incomplete(f"{show(name)} would have had the shape {show(written)}")
        if math.prod(written) != math.prod(shape):
            raise _incomplete(f"{show(name)} has the shape {list(shape)}, and would have had {written}")
        return tuple(written)

    _opened: BufferedReader


def _incomplete(why: str) -> Refused:
    return Refused(f"is not a complete GGUF file ({why})")
