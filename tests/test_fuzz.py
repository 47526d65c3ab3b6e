"""What is fuzzed, without the fuzzer: each file of the corpora, and what the checks find."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fuzz import CORPUS
from fuzz.formats import PICTURE, REQUEST, SAFETENSORS, Format
from fuzz.targets import TARGETS, Target, TooLarge, TooSlow, check

SECONDS = 5.0  # where a slow machine and the measuring of coverage count too
FORMATS = {"requests": REQUEST, "pictures": PICTURE, "adapters": SAFETENSORS}


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_values_and_refusals_comes_of_the_corpus(name: str) -> None:
    TARGETS[name].prepare()
    files = sorted((CORPUS / name).iterdir())
    assert len(files) > 10, "run python -m fuzz.corpus"
    for file in files:
        try:
            check(name, file.read_bytes(), SECONDS)
        except BaseException as error:
            error.add_note(f"of {file}")
            raise


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_values_and_refusals_comes_of_broken_bytes(name: str) -> None:
    TARGETS[name].prepare()
    whole = max((CORPUS / name).iterdir(), key=lambda file: file.stat().st_size).read_bytes()
    for broken in (b"", b"\0", b"\xff" * 64, whole[:20], whole[: len(whole) // 2], whole[:-1], whole * 2):
        check(name, broken, SECONDS)


def test_the_corpora_stay_small() -> None:
    assert sum(file.stat().st_size for file in CORPUS.rglob("*") if file.is_file()) < 500_000
    assert {folder.name for folder in CORPUS.iterdir()} == set(TARGETS)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_taken_apart_can_be_put_together(name: str) -> None:
    format: Format = FORMATS[name]
    taken = [(file.read_bytes(), format.take_apart(file.read_bytes())) for file in (CORPUS / name).iterdir()]
    whole = [(data, pieces) for data, pieces in taken if pieces]
    assert len(whole) > 5
    for data, pieces in whole:
        assert format.take_apart(format.put_together(pieces)) == pieces
        if name != "requests":  # JSON has more than one way to write the same
            assert format.put_together(pieces) == data
    assert format.take_apart(b"") == []


def slow(_: bytes) -> None:
    began = time.process_time()
    while time.process_time() - began < 5:
        pass


def large(_: bytes) -> None:
    assert len(b"x" * 500_000_000)


def wrong(_: bytes) -> None:
    raise KeyError("x")


@pytest.mark.parametrize(("run", "error"), [(slow, TooSlow), (large, TooLarge), (wrong, KeyError)])
def test_what_must_not_be_is_found(
    run: Callable[[bytes], None], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuzz.targets.TARGETS", {"it": Target(run, ())})
    with pytest.raises(error):
        check("it", b"", 0.2 if run is slow else SECONDS)


def test_each_target_has_its_maker() -> None:
    source = (Path(CORPUS).parent / "corpus.py").read_text()
    assert all(f"def {name.replace('-', '_')}() -> Iterator[bytes]:" in source for name in TARGETS)
