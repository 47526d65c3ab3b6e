"""`python -m fuzz.run TARGET SECONDS`: one process of atheris, which the first input that breaks it ends."""

from __future__ import annotations

import hashlib
import random
import sys
import traceback
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["src", "PIL"]):
    from fuzz import CORPUS, CRASHES, FOUND
    from fuzz.targets import TARGETS, TooSlow, check

    TARGETS[sys.argv[1]].prepare()

_AS_IT_IS = 0.25  # of all mutations: they care for no format
_REPEATED = 0.02  # of all mutations: a few bytes over and over, which is what slow patterns are slow at, or one piece


def main() -> None:
    name, seconds = sys.argv[1:]
    target = TARGETS[name]
    crashes = CRASHES / name
    found = FOUND / name
    for folder in (crashes, found):
        folder.mkdir(parents=True, exist_ok=True)
    words = found.with_suffix(".words")
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in target.words))

    def run(data: bytes) -> None:
        try:
            check(name, data)
        except (Exception, TooSlow) as error:  # noqa: BLE001 - each kind is kept once, and the search goes on
            keep(data, error, crashes)

    def mutate(data: bytes, longest: int, seed: int) -> bytes:
        rng = random.Random(seed)
        pieces = [] if rng.random() < _AS_IT_IS else target.format.take_apart(data)
        if not pieces:
            return changed(data, longest, rng)
        i = rng.randrange(len(pieces))
        if rng.random() < _REPEATED:
            pieces[i : i + 1] = [pieces[i]] * rng.randint(2, longest // (len(pieces[i]) + 1) + 2)
            return target.format.put_together(pieces)[:longest]
        pieces[i] = changed(pieces[i], max(1, longest - len(data) + len(pieces[i])), rng)
        return target.format.put_together(pieces)[:longest]

    options = {
        "max_total_time": seconds,
        "max_len": str(target.longest),
        "timeout": "60",
        "report_slow_units": "3600",  # which counts what others do on the machine; `check` does not
        "rss_limit_mb": "6000",
        "artifact_prefix": f"{crashes}/",
        "dict": str(words),
        "print_final_stats": "1",
    }
    arguments = [f"-{option}={value}" for option, value in options.items()]
    atheris.Setup([sys.argv[0], *arguments, str(found), str(CORPUS / name)], run, custom_mutator=mutate)
    atheris.Fuzz()


def changed(piece: bytes, longest: int, rng: random.Random) -> bytes:
    if rng.random() >= _REPEATED or not piece:
        return bytes(atheris.Mutate(piece, longest))
    begin, length = rng.randrange(len(piece)), rng.randint(1, 8)
    unit = piece[begin : begin + length]
    return (piece[:begin] + unit * rng.randint(2, longest // len(unit) + 2) + piece[begin + length :])[:longest]


def keep(data: bytes, error: BaseException, folder: Path) -> None:
    """The first input of each kind: an error's type, and the line of the worker that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/src/" in frame.filename] or frames
    line = f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"
    file = folder / hashlib.sha256(line.encode()).hexdigest()[:12]
    if not file.exists():
        file.write_bytes(data)
        file.with_suffix(".txt").write_text(f"{line}\n\n{''.join(traceback.format_exception(error))}"[:20_000])
        print(f"{file}: {line}", file=sys.stderr)


def _escaped(word: str) -> str:
    return "".join(c if c.isalnum() or c in " _-.:/?&=@{}[],;" else f"\\x{ord(c):02x}" for c in word)


if __name__ == "__main__":
    main()
