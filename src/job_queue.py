"""The thread that owns the device, or one for each of several, and the queue of jobs in front of them.

One thread a device, because CUDA keeps handles and workspaces for each that ever used it; one queue, so that jobs get
a device in the order in which they arrived, however long their requests take to read.

Knows nothing of what is done on the device.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from typing import Any, TypeVar, cast

T = TypeVar("T")
_here = threading.local()


def current_device() -> int:
    """The number of the device that the calling thread owns, from 0; 0 on threads that own none."""
    return getattr(_here, "device", 0)


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
    """Runs the work of the tickets that it gives out, in their order, each on the thread of a device that is free."""

    def __init__(self, devices: int = 1) -> None:
        self._tickets: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self._next = threading.Lock()  # of whoever waits for the next ticket: the one behind it must not pass
        self._threads: list[threading.Thread] = []
        self.serve(devices)

    def serve(self, devices: int) -> None:
        """Have this many devices from now on, and never fewer than before."""
        for device in range(len(self._threads), devices):
            name = f"device-{device}" if device else "device"
            self._threads.append(threading.Thread(target=self._work, args=(device,), name=name, daemon=True))
            self._threads[-1].start()

    def ticket(self) -> Ticket:
        """The next ticket."""
        ticket = Ticket()
        self._tickets.put(ticket)
        return ticket

    def close(self) -> None:
        """End the threads after the tickets that are given out."""
        for _ in self._threads:
            self._tickets.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, device: int) -> None:
        _here.device = device
        while True:
            with self._next:
                if (ticket := self._tickets.get()) is None:
                    return
                turn = ticket.wait()
            if turn:
                turn()
            del ticket, turn  # what they made must not live until the next job
