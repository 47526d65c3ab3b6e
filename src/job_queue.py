"""The thread that owns the device, and the queue of jobs in front of it.

One thread, because CUDA keeps handles and workspaces for each that ever used it; one queue, so that jobs get the
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
    """The ticket was given back before its turn came, or the turn did not come in time."""


class Ticket:
    """A place in the queue; the queue waits for its holder, who brings work or gives it back."""

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
            # An error would hold its frames, the frames this ticket, and the ticket the error.
            self._turn = self._outcome = Future()
            self._outcome.cancel()

    def give_back(self) -> None:
        """Give the turn up; work that has begun goes on."""
        self._turn.cancel()
        self._outcome.cancel()

    def wait(self) -> Callable[[], None] | None:
        """For the device's thread: what there is to do in this ticket's turn."""
        try:
            return self._turn.result()
        except CancelledError:
            return None


class JobQueue:
    """Runs the work of the tickets that it gives out, one after another, on a thread of its own."""

    def __init__(self) -> None:
        self._tickets: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="device", daemon=True)
        self._thread.start()

    def ticket(self) -> Ticket:
        """The next ticket."""
        ticket = Ticket()
        self._tickets.put(ticket)
        return ticket

    def close(self) -> None:
        """End the thread after the tickets that are given out."""
        self._tickets.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (ticket := self._tickets.get()) is not None:
            if turn := ticket.wait():
                turn()
            del ticket, turn  # what they made must not live until the next job
