"""The thread that owns the device, and the line in front of it.

One thread, because CUDA keeps handles and workspaces for each that ever used it; one line, so that jobs get the
device in the order in which they arrived, however long their requests take to read.

Knows nothing of what is done on the device.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from typing import Any, TypeVar, cast

T = TypeVar("T")


class NoTurn(Exception):
    """The place was left before its turn came, or the turn did not come in time."""


class Place:
    """A place in the line; the line waits for its holder, who brings work or leaves."""

    def __init__(self) -> None:
        self._turn: Future[Callable[[], None]] = Future()
        self._outcome: Future[Any] = Future()

    def run(self, work: Callable[[], T], timeout: float | None = None) -> T:
        """What `work` returns or raises; NoTurn where it did not begin within `timeout` seconds, and never will."""

        def turn() -> None:
            if self._outcome.set_running_or_notify_cancel():
                try:
                    result = work()
                except BaseException as error:  # noqa: BLE001 - it is raised again where the work came from
                    self._outcome.set_exception(error)
                else:
                    self._outcome.set_result(result)

        try:
            self._turn.set_result(turn)
            try:
                return cast(T, self._outcome.result(timeout))
            except TimeoutError:
                if self._outcome.cancel():
                    raise NoTurn from None
            return cast(T, self._outcome.result())  # it had begun
        except (CancelledError, InvalidStateError):
            raise NoTurn from None
        finally:
            # An error would hold its frames, the frames this place, and the place the error.
            self._turn = self._outcome = Future()
            self._outcome.cancel()

    def leave(self) -> None:
        """Give the place up; work that has begun goes on."""
        self._turn.cancel()
        self._outcome.cancel()

    def wait(self) -> Callable[[], None] | None:
        """For the device's thread: what there is to do in this place's turn."""
        try:
            return self._turn.result()
        except CancelledError:
            return None


class Device:
    """Runs the work of the places in its line, one after another, on a thread of its own."""

    def __init__(self) -> None:
        self._line: queue.SimpleQueue[Place | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    def arrive(self) -> Place:
        """The last place in the line."""
        place = Place()
        self._line.put(place)
        return place

    def close(self) -> None:
        """End the thread after the places that are taken."""
        self._line.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (place := self._line.get()) is not None:
            if turn := place.wait():
                turn()
            del place, turn  # what they made must not live until the next job
