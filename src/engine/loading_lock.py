"""Keeps the engines of one process out of each other's way while one of them loads.

While networks are loaded, diffusers and transformers set torch's default type for the whole process; while layers are
added, accelerate and PEFT change for the whole process how parameters are registered.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class LoadingLock:
    """Many may draw at once; networks are loaded while nobody draws. Who draws must not load."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._changed = threading.Condition()
        self._drawing = 0
        self._loading = False

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within it no networks are loaded; one that waits for that goes first."""
        with self._changed:
            self._changed.wait_for(lambda: not self._loading)
            self._drawing += 1
        try:
            yield
        finally:
            with self._changed:
                self._drawing -= 1
                self._changed.notify_all()

    @contextmanager
    def networks(self) -> Iterator[None]:
        """Within it networks are loaded, and nobody draws: it waits for pictures that are under way."""
        with self._one_at_a_time:
            with self._changed:
                self._loading = True
                self._changed.wait_for(lambda: not self._drawing)
            try:
                yield
            finally:
                with self._changed:
                    self._loading = False
                    self._changed.notify_all()

    @contextmanager
    def layers(self) -> Iterator[None]:
        """Within it layers are added to networks that are there; others may draw."""
        with self._one_at_a_time:
            yield


LOADING = LoadingLock()  # of this process
