"""What the header of a safetensors file may cost, and that it is read as safetensors reads it."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from src.errors import Refused
from src.request.tensor_file import MAX_HEADER, MAX_NAME, MAX_TENSORS, TensorFile

NAME = "transformer.x.lora_A.weight"
SECONDS = 5  # what took minutes takes some hundredths of it, also on a busy machine
LARGE = MAX_HEADER - 1_000


def entry(shape: Any = (0,), offsets: Any = (0, 0), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def written(folder: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file = folder / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


HOSTILE: dict[str, object] = {
    "a header of 100 MB": b"{" + b" " * 100_000_000 + b"}",
    "a million names": {f"{NAME}{i}": entry() for i in range(1_000_000)},
    "more tensors than are read": {f"{NAME}{i}": entry() for i in range(MAX_TENSORS + 1)},
    "a name of 40 kB": {"a" * 40_000 + ".lora_A.weight": entry()},
    "a name of 4 MB": {"https:///?" + "sig" * 1_300_000: entry()},
    "a name of dots": {"." * 4_000_000: entry()},
    "a name longer than is read": {"a" * (MAX_NAME + 1): entry()},
    "many long names": {f"{i}" + "x." * 20_000: entry() for i in range(240)},
    "half of a character": b'{"\\ud800": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}',
    "a NUL": {"a\0b": entry()},
    "a line break": {"a\nb": entry()},
    "metadata that is no text": {"__metadata__": {"a": 1}},
    "metadata that is a list": {"__metadata__": ["a"]},
    "a million words of metadata": {"__metadata__": {f"{i}": "" for i in range(500_000)}},
    "deep lists": b'{"a":' + b"[" * LARGE,
    "deep objects": b'{"a":' * (LARGE // 5),
    "deep metadata": b'{"__metadata__":{"a":' + b"[" * 200_000,
    "lists": b'{"a":[' + b"[]," * (LARGE // 3) + b"[]]}",
    "objects": b'{"a":[' + b"{}," * (LARGE // 3) + b"{}]}",
    "numbers": b'{"a":[' + b"1," * (LARGE // 2) + b"1]}",
    "a number of 5 MB": b'{"a":' + b"9" * 5_000_000 + b"}",
    "numbers of 4,000 digits": b'{"a":[' + b",".join([b"9" * 4_000] * 2_000) + b"]}",
    "a text without an end": b'{"a":"' + b"x" * LARGE,
    "a shape of a thousand dimensions": {NAME: entry([1] * 1_000, [0, 4])},
    "a shape that overflows": {NAME: entry([0, 1 << 62, 1 << 62])},
    "a negative shape": {NAME: entry([-1, -1], [0, 4])},
    "a shape that is none": {NAME: entry("4", [0, 4])},
    "true for a number": {NAME: entry([True], [0, 4])},
    "offsets the wrong way": {NAME: entry([1], [4, 0])},
    "three offsets": {NAME: entry([0], [0, 0, 0])},
    "a type that nobody knows": {NAME: entry(dtype="Q" * 1_000)},
    "no type": {NAME: entry(dtype=None)},
    "a tensor that is a number": {NAME: 4},
    "a name twice": b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": 1}',
    "bytes that nobody describes": {NAME: entry([1], [0, 4])},
    "no object": b"[]",
    "UTF-16": '{"a": 1}'.encode("utf-16-le"),
    "no UTF-8": b'{"\xff": 1}',
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_is_refused_at_once_and_in_a_few_words(kind: str, tmp_path: Path) -> None:
    file = written(tmp_path, HOSTILE[kind])
    began = time.perf_counter()
    with pytest.raises(Refused) as refused:
        TensorFile(file)
    assert time.perf_counter() - began < SECONDS
    assert len(str(refused.value)) < 600
    str(refused.value).encode()


def test_what_trainers_write_is_far_from_the_limits(tmp_path: Path) -> None:
    captions = {"ss_tag_frequency": json.dumps({"1_x": {f'a "quoted" caption, number {i}': i for i in range(50_000)}})}
    tensors = {f"lora_unet_single_blocks_{i}_linear1.lora_down.weight": entry() for i in range(5_000)}
    header = TensorFile(written(tmp_path, {"__metadata__": captions, **tensors}))
    assert (len(header.tensors), header.metadata) == (5_000, captions)
    full = {"é" * (MAX_NAME - 6) + f"{i:06}": entry() for i in range(MAX_TENSORS)}
    assert len(TensorFile(written(tmp_path, json.dumps(full, ensure_ascii=False).encode())).tensors) == MAX_TENSORS


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(save({NAME: np.ones(10_000, np.float32)}))
    header = TensorFile(file)
    file.write_bytes(b"")
    with header.opened() as opened, pytest.raises(OSError, match="it changed while it was read"):
        header.read(NAME, opened, memoryview(bytearray(40_000)))


def mutated(data: bytes, rng: random.Random) -> bytes:
    """`data` with a few bytes of its header, or of its length, others."""
    changed = bytearray(data)
    length = int.from_bytes(data[:8], "little")
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(8 + length) if rng.random() < 0.95 else rng.randrange(8)
        changed[place] = rng.choice(b'0123456789[]{},:"\\FBI \0\xff') if rng.random() < 0.8 else rng.randrange(256)
    if rng.random() < 0.1:
        del changed[rng.randrange(len(changed)) :]
    return bytes(changed)


def test_what_is_read_is_what_safetensors_reads(tmp_path: Path) -> None:
    """Of whatever is accepted here safetensors gives the same tensors."""
    rng = random.Random(13)
    tensors: dict[str, np.ndarray[Any, Any]] = {
        "a.b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "c": np.ones((), np.int64),
        "d": np.zeros((0, 2), np.float16),
    }
    good = save(tensors, {"format": "pt"})
    file, accepted = tmp_path / "x.safetensors", 0
    for i in range(3_000):
        file.write_bytes(mutated(good, rng) if i else good)
        try:
            header = TensorFile(file)
        except Refused:
            continue
        accepted += 1
        if not {info.dtype for info in header.tensors.values()} <= {"F32", "F16", "I64", "U64", "I32", "U32", "I16"}:
            continue  # NumPy has no others
        with safe_open(file, "np") as theirs, header.opened() as opened:
            assert set(theirs.keys()) == set(header.tensors)
            assert (theirs.metadata() or {}) == header.metadata
            for name, info in header.tensors.items():
                memory = bytearray(info.size)
                header.read(name, opened, memoryview(memory))
                assert tuple(theirs.get_slice(name).get_shape()) == info.shape
                assert theirs.get_tensor(name).tobytes() == bytes(memory)
    assert accepted > 50
