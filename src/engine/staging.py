"""Weights on their way to where they live: from their files by large requests, to a card through pinned memory.

What is mapped from a file is read from it, not touched: nothing waits for one page after another. Knows nothing of
FLUX or of placements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from src.engine.gguf_linear import GGUFParameter
from src.weights.file_parts import FilePart, FileReader, MappedFiles

THREADS = 4  # network volumes are fast at several requests side by side
CHUNK = 16 << 20  # bytes of a request, and of each staging buffer
_ALIGNED = 64  # bytes; as torch's own CPU memory is (c10/core/alignment.h)


class Card(Protocol):
    """Copies to a card that run beside its computing."""

    def pinned(self, size: int) -> torch.Tensor:
        """`size` bytes of the host's memory that a card can copy from by itself."""

    def begin(self) -> None:
        """What follows comes after all that the computing was asked for."""

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], object]:
        """Set out with the first of each pair to the second; what is given waits until all have arrived."""

    def end(self) -> None:
        """The computing waits for what set out."""


class CudaCard:
    """A CUDA device with a stream for copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned(self, size: int) -> torch.Tensor:
        """Pinned bytes."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def begin(self) -> None:
        """Memory that torch gives anew may still be in use by what was asked for before."""
        self._copying.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Callable[[], object]:
        """On the stream for copies, whichever thread asks."""
        arrived: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._copying):
            for here, there in pairs:
                there.copy_(here, non_blocking=True)
            arrived.record()
        wait: Callable[[], object] = arrived.synchronize
        return wait

    def end(self) -> None:
        """Work of the current stream comes after the copies."""
        torch.cuda.current_stream(self._device).wait_stream(self._copying)


class Staging:
    """Brings weights to a device; `bytes` counts what was brought so far. Not for two threads at once."""

    def __init__(
        self,
        device: torch.device,
        reader: FileReader | None = None,
        card: Card | None = None,
        chunk: int = CHUNK,
    ) -> None:
        self.device = device
        self.bytes = 0
        self.reader = reader or FileReader()
        self._chunk = chunk
        self._card = card or (CudaCard(device) if device.type == "cuda" else None)

    def bring(self, weights: Iterable[nn.Parameter], device: torch.device | None = None) -> None:
        """Let `weights` live on `device`, the staging's own if none is named, in memory of their own.

        Those of subclasses, quantized ones, stay as they are: they know themselves how to move. On the CPU weights
        begin where torch's own memory does: on some processors MKL rounds the last bit otherwise where a matrix begins
        elsewhere, and a picture would depend on which weights are offloaded.
        """
        device, plain = device or self.device, _plain(weights)
        elsewhere = [w for w in plain if w.device.type != device.type]
        if device.type == "cpu":
            of_files = set(mapped(plain))
            elsewhere += [w for w in plain if w.device.type == "cpu" and (w in of_files or w.data_ptr() % _ALIGNED)]
        if not elsewhere:
            return
        with torch.inference_mode(False):  # weights are no tensors of inference
            there = [torch.empty_like(weight.data, device=device) for weight in elsewhere]
        self.fill(zip((weight.data for weight in elsewhere), there, strict=True))
        for weight, tensor in zip(elsewhere, there, strict=True):
            weight.data = tensor

    def fill(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy the first of each pair to the second, of the same shape; the first may be given up then.

        Raises Refused and OSError as reading does.
        """
        mapped, host, card = MappedFiles(), list[_Piece](), list[_Piece]()
        for source, there in pairs:
            self.bytes += there.nbytes
            sent = self._card is not None and there.device.type == self.device.type
            part = mapped.find(source.data_ptr(), source.nbytes) if _is_in_one_piece(source, there) else None
            if sent and _is_in_one_piece(source, there):
                card.append(_Piece(part, _bytes(source), _bytes(there)))
            elif part and there.device.type == "cpu":
                host.append(_Piece(part, _bytes(source), _bytes(there)))
            else:
                there.copy_(source)
        with ThreadPoolExecutor(THREADS, thread_name_prefix="staging") as threads:
            list(threads.map(self._read, _chunks(host, self._chunk)))
            if self._card and card:
                self._send(self._card, _chunks(card, self._chunk), threads)

    def _read(self, chunk: list[_Piece]) -> None:
        """Fill a chunk's own places, which are in the host's memory."""
        _load(self.reader, chunk, [piece.there for piece in chunk])

    def _send(self, card: Card, chunks: Iterable[list[_Piece]], threads: ThreadPoolExecutor) -> None:
        """Through pinned buffers: while one is on its way to the card, the others are filled."""
        free = SimpleQueue[tuple[torch.Tensor, Callable[[], object]]]()
        for _ in range(THREADS):
            free.put((card.pinned(self._chunk), lambda: None))

        def send(chunk: list[_Piece]) -> None:
            buffer, wait = free.get()
            try:
                wait()
                here = _cut(buffer, [piece.there.nbytes for piece in chunk])
                _load(self.reader, chunk, here)
                wait = card.copy(zip(here, (piece.there for piece in chunk), strict=True))
            finally:
                free.put((buffer, wait))

        card.begin()
        try:
            list(threads.map(send, chunks))
        finally:
            card.end()


def mapped(weights: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of `weights` whose memory is a file's."""
    files = MappedFiles()
    return [w for w in _plain(weights) if w.device.type == "cpu" and files.find(w.data_ptr(), w.nbytes)]


def _plain(weights: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Each once, without those that know themselves how to move: all but GGUF's that are of a subclass or wrap one."""
    own = (w for w in dict.fromkeys(weights) if type(w) is nn.Parameter or isinstance(w, GGUFParameter))
    return [w for w in own if type(w.data) is torch.Tensor]


class _Piece(NamedTuple):
    """Bytes to copy: from a file where they are mapped from one, and from memory elsewhere."""

    part: FilePart | None
    source: torch.Tensor  # uint8, as the next
    there: torch.Tensor

    def split(self, size: int) -> Iterator[_Piece]:
        """In pieces of at most `size` bytes."""
        for start in range(0, self.there.nbytes, size):
            part = self.part and self.part._replace(offset=self.part.offset + start)
            yield _Piece(part, self.source[start : start + size], self.there[start : start + size])

    def follows(self, other: _Piece) -> bool:
        """Whether one request can read both, `other` first."""
        if self.part is None or other.part is None:
            return self.part is other.part
        return self.part == other.part._replace(offset=other.part.offset + other.there.nbytes)


def _chunks(pieces: list[_Piece], most: int) -> Iterator[list[_Piece]]:
    """What is read by one request each: at `most` so many bytes, in the order of the files."""
    chunk, size = list[_Piece](), 0
    for whole in sorted(pieces, key=lambda piece: piece.part or FilePart(Path(), 0)):
        for piece in whole.split(most):
            if chunk and (size + piece.there.nbytes > most or not piece.follows(chunk[-1])):
                yield chunk
                chunk, size = [], 0
            chunk.append(piece)
            size += piece.there.nbytes
    if chunk:
        yield chunk


def _load(reader: FileReader, chunk: list[_Piece], into: list[torch.Tensor]) -> None:
    if first := chunk[0].part:
        reader.read(first, [memory.numpy().data for memory in into])
    else:
        for piece, memory in zip(chunk, into, strict=True):
            memory.copy_(piece.source)


def _cut(buffer: torch.Tensor, sizes: Iterable[int]) -> list[torch.Tensor]:
    """The parts of `buffer` of these sizes in bytes, one after another from its beginning."""
    ends = list(accumulate(sizes, initial=0))
    return [buffer[start:end] for start, end in pairwise(ends)]


def _is_in_one_piece(source: torch.Tensor, there: torch.Tensor) -> bool:
    """Whether a tensor's bytes can be copied as they are, from the host's memory."""
    plain = type(source) is torch.Tensor and source.device.type == "cpu" and source.dtype == there.dtype
    return plain and source.is_contiguous() and there.is_contiguous()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
