"""One start of benchmarks/cold_start.py, in a process of its own: torch imported, and weights read from a slow volume.

The volume is a file that sleeps before each answer, as one that lies behind a network does; everything else is the
worker's own.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from src.settings import Settings
from src.weights.file_parts import FileReader
from src.weights.host import HostMemory
from src.weights.read_ahead import read, read_ahead, weight_files

FAULT = 128 << 10  # bytes that the kernel reads for a page that is missing (read_ahead_kb)
ROOMY = HostMemory(1 << 40, 1 << 40)


class Volume:
    """A request takes `latency` seconds and its bytes at `rate` a second; others come beside it, each as fast."""

    def __init__(self, latency: float, rate: float) -> None:
        self._latency, self._rate = latency, rate
        self._lock = Lock()
        self._held = 0
        self.most_held = 0  # bytes in the system's cache

    def answer(self, size: int) -> None:
        """Wait as long as `size` bytes take."""
        time.sleep(self._latency + size / self._rate)
        self.hold(size)

    def hold(self, size: int) -> None:
        """The system's cache has so many bytes more."""
        with self._lock:
            self._held += size
            self.most_held = max(self.most_held, self._held)

    def open(self, file: Path) -> io.FileIO:
        """A file that lies there."""
        return _SlowFile(self, file)


class _SlowFile(io.FileIO):
    def __init__(self, volume: Volume, file: Path) -> None:
        super().__init__(file)
        self._volume = volume

    def readinto(self, memory: Any) -> int:
        """A request of its own."""
        count = super().readinto(memory)
        if count:
            self._volume.answer(count)
        return count


class _SlowReader(FileReader):
    def __init__(self, volume: Volume) -> None:
        super().__init__(drop_behind=True)
        self._volume = volume

    def request(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        """As of any other file, and later."""
        count = super().request(descriptor, views, offset)
        self._volume.answer(count)
        return count

    def drop(self, descriptor: int, offset: int, size: int) -> None:
        """What was read is not held any more."""
        super().drop(descriptor, offset, size)
        self._volume.hold(-size)


def _touch(volume: Volume, folder: Path) -> None:
    """As the kernel reads what is mapped: one missing page after another, whoever wants it waits."""
    memory = bytearray(FAULT)
    for file in weight_files(folder):
        with volume.open(file) as stream:
            while stream.readinto(memory):
                pass


def _one_by_one(volume: Volume, folder: Path) -> None:
    for file in weight_files(folder):
        read(file, volume.open)


def _side_by_side(volume: Volume, folder: Path) -> None:
    _ahead(volume, folder)()


def _ahead(volume: Volume, folder: Path) -> Callable[[], None]:
    """Begin to read ahead as a start does; what is given waits for the end."""
    slow = partial(read, opened=volume.open)
    return read_ahead(Settings(model_name=str(folder)), read=slow, memory=lambda: ROOMY).join


# What is done once torch is there, after which all weights are in memory.
AFTER: dict[str, Callable[[Volume, Path], None]] = {
    "page faults of mapped files": _touch,
    "read(), one file after another": _one_by_one,
    "read(), four files side by side": _side_by_side,
}
AHEAD = "read ahead, while torch is imported"
STREAMED = "streamed and dropped behind"
WAYS = (*AFTER, AHEAD, STREAMED)


def start(way: str, folder: Path, latency: float, rate: float) -> dict[str, Any]:
    """Seconds of the import, of the wait for the weights after it and of both; the most bytes in the system's cache."""
    volume = Volume(latency, rate)
    begun = time.perf_counter()
    arrived = _ahead(volume, folder) if way == AHEAD else None
    import torch
    from safetensors.torch import load_file
    from torch import nn

    from src.engine.staging import Staging

    imported = time.perf_counter()
    if arrived:
        arrived()
    elif way in AFTER:
        AFTER[way](volume, folder)
    reader = _SlowReader(volume) if way == STREAMED else FileReader()
    for file in weight_files(folder):
        weights = [nn.Parameter(tensor, requires_grad=False) for tensor in load_file(file).values()]
        Staging(torch.device("cpu"), reader).bring(weights)
    ended = time.perf_counter()
    return {
        "import_seconds": imported - begun,
        "wait_seconds": ended - imported,
        "seconds": ended - begun,
        "most_in_cache": volume.most_held,
    }


if __name__ == "__main__":
    print(json.dumps(start(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))))
