"""How many pixels of clients' pictures this process holds at once, over all its jobs."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from PIL import Image

_PAUSE = 0.02  # seconds between two looks whether there is room


class DecodeBudget:
    """Room for so many pixels at once; jobs get it in the order in which they came for it."""

    def __init__(self, pixels: int) -> None:
        self._free = pixels
        self._returned = deque[int]()  # deques are safe wherever a picture happens to be collected
        self._line = deque[object]()

    @contextmanager
    def taken(self, pixels: int, check: Callable[[], None]) -> Iterator[Callable[[Image.Image], None]]:
        """Room for all that a job is about to decode, `pixels`, once it is there; `check` may raise to end the waiting.

        What it gives is called with each picture that is to live on: its room comes free when it is no longer held.
        The rest does at the end. To take all at once keeps jobs from waiting for each other.
        """
        self._take(pixels, check)
        left = pixels

        def keep(picture: Image.Image) -> None:
            nonlocal left
            held = picture.width * picture.height
            left -= held
            weakref.finalize(picture, self._returned.append, held).atexit = False

        try:
            yield keep
        finally:
            self._returned.append(left)

    def _take(self, pixels: int, check: Callable[[], None]) -> None:
        turn = object()
        self._line.append(turn)
        try:
            while self._line[0] is not turn or self._count() < pixels:
                check()
                time.sleep(_PAUSE)
            self._free -= pixels  # only the first in the line comes here
        finally:
            self._line.remove(turn)

    def _count(self) -> int:
        while self._returned:
            self._free += self._returned.popleft()
        return self._free
