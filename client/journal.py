"""What became of a batch so far, in a file of the output folder: every job's id before it is waited for.

A line is whole and on the disk before anything that follows from it is done, so that no kill -9 loses a job that was
paid for. Knows nothing of RunPod or of pictures.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

NAME = "journal.jsonl"
Key = tuple[int, int]  # a row's number, and a seed


class JournalError(Exception):
    """Why a batch cannot begin or go on in a folder, and what to do, in one sentence."""


@dataclass
class Entry:
    """What is known of one job; `files` are its pictures' names by their seeds, once they are saved."""

    id: str | None = None
    files: Mapping[int, str] | None = None
    lost: Mapping[int, str] = field(default_factory=dict)  # why a seed brought no picture
    seconds: float = 0.0
    error: str | None = None
    retryable: bool = False

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return self.files is not None or self.error is not None


class Journal:
    """The journal of `folder`, locked for this process; a context manager.

    `about` says what the batch is made of: where the journal that is there is of another, `resume` is refused. Raises
    JournalError, OSError.
    """

    def __init__(self, folder: Path, *, resume: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / NAME
        self._opened = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self.entries: dict[Key, Entry] = {}
        self.about: dict[str, Any] = {}
        self.ids: list[str] = []  # of all jobs that were ever sent
        try:
            self._lock()
            self._read()
            if self.about and not resume:
                raise JournalError(
                    f"{folder} holds a batch that was begun: add --resume to go on with it, or give another --out"
                )
        except BaseException:
            os.close(self._opened)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._opened)

    def begin(self, about: Mapping[str, Any], what: Mapping[str, str]) -> None:
        """Write down what the batch is made of; where it is there already, it must be the same.

        `what` words each of the names in `about` that must not have changed.
        """
        if not self.about:
            self._write(about)
            self.about = dict(about)
        elif changed := [words for name, words in what.items() if self.about.get(name) != about[name]]:
            raise JournalError(
                f"{self._file.parent} holds a batch of other requests: {', '.join(changed)} changed since it was "
                "begun; give what it was begun with, or another --out"
            )

    def sent(self, key: Key, id: str) -> None:
        """The job has an id, and is waited for from now on."""
        self._add(key, {"sent": id})

    def lost(self, key: Key, why: str) -> None:
        """The job is to be sent again."""
        self._add(key, {"lost": why})

    def saved(self, key: Key, files: Mapping[int, str], lost: Mapping[int, str], seconds: float) -> None:
        """Its pictures are whole in the folder, by these names."""
        self._add(key, {"files": files, "missing": lost, "seconds": round(seconds, 4)})

    def failed(self, key: Key, error: str, *, retryable: bool) -> None:
        """It brought nothing; a `retryable` one is sent again by the next run."""
        self._add(key, {"error": error, "retryable": retryable})

    def _add(self, key: Key, what: Mapping[str, Any]) -> None:
        line = {"row": key[0], "seed": key[1], **what}
        self._write(line)
        self._take(line)

    def _write(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        if os.write(self._opened, data) != len(data):
            raise OSError(f"the disk is full: {self._file} took a part of a line")
        os.fsync(self._opened)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise JournalError(
                f"{self._file.parent} is in use by another run: wait for its end, or give another --out"
            ) from None

    def _read(self) -> None:
        """All whole lines; what a kill left of a last one is cut off, so that the next line begins by itself."""
        written = self._file.read_bytes()
        whole = written[: written.rfind(b"\n") + 1]
        if whole.count(b"\n") < 2:
            whole = b""  # nothing was sent yet
        if whole != written:
            os.ftruncate(self._opened, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                found = json.loads(line)
                if number == 1:
                    self.about = dict(found)
                else:
                    self._take(found)
            except (ValueError, KeyError, TypeError):
                raise JournalError(f"line {number} of {self._file} is not one that this program wrote") from None

    def _take(self, line: Mapping[str, Any]) -> None:
        entry = self.entries.setdefault((int(line["row"]), int(line["seed"])), Entry())
        if "sent" in line:
            entry.id, entry.error = str(line["sent"]), None
            self.ids.append(entry.id)
        elif "files" in line:
            entry.files, entry.lost = _by_seed(line["files"]), _by_seed(line["missing"])
            entry.seconds, entry.error = float(line["seconds"]), None
        elif "error" in line:
            entry.error, entry.retryable = str(line["error"]), bool(line["retryable"])
        else:
            entry.id = None


def _by_seed(names: Mapping[Any, Any]) -> dict[int, str]:
    return {int(seed): str(name) for seed, name in names.items()}
