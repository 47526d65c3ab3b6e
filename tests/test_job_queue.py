"""The line in front of the device: order, one at a time, leaving."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from src.job_queue import JobQueue, NoTurn


@pytest.fixture
def queue() -> Iterator[JobQueue]:
    held = JobQueue()
    yield held
    held.close()


def test_work_is_done_on_one_thread_and_its_result_comes_back(queue: JobQueue) -> None:
    names = {queue.ticket().run(lambda: threading.current_thread().name) for _ in range(3)}
    assert names == {"device"}


def test_an_error_comes_back_and_the_next_work_is_done(queue: JobQueue) -> None:
    def fail() -> None:
        raise TimeoutError("of the work itself")

    with pytest.raises(TimeoutError, match="of the work itself"):
        queue.ticket().run(fail, timeout=60)
    assert queue.ticket().run(lambda: 1) == 1


def test_places_are_served_in_the_order_of_arrival_one_at_a_time(queue: JobQueue) -> None:
    done: list[int] = []
    busy = threading.Lock()

    def work(i: int) -> None:
        assert busy.acquire(blocking=False), "two at once"
        time.sleep(0.005)
        done.append(i)
        busy.release()

    tickets = [queue.ticket() for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:  # the last to arrive asks first
        for i in reversed(range(8)):
            threads.submit(tickets[i].run, lambda i=i: work(i))
            time.sleep(0.002)
    assert done == list(range(8))


def test_who_leaves_holds_nobody_up(queue: JobQueue) -> None:
    first, second = queue.ticket(), queue.ticket()
    threading.Timer(0.05, first.give_back).start()
    assert second.run(lambda: "second", timeout=60) == "second"
    with pytest.raises(NoTurn):
        first.run(lambda: pytest.fail("it has left"))


def test_who_leaves_while_waiting_never_starts(queue: JobQueue) -> None:
    go = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(queue.ticket().run, go.wait)
        ticket = queue.ticket()
        waiting = threads.submit(ticket.run, lambda: pytest.fail("it has left"))
        time.sleep(0.02)
        ticket.give_back()
        with pytest.raises(NoTurn):
            waiting.result(60)
        go.set()
        assert running.result(60)
    assert queue.ticket().run(lambda: 1) == 1


def test_a_turn_that_comes_too_late_never_starts(queue: JobQueue) -> None:
    go = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(queue.ticket().run, go.wait)
        with pytest.raises(NoTurn):
            queue.ticket().run(lambda: pytest.fail("too late"), timeout=0.05)
        go.set()


def test_work_that_began_in_time_is_waited_for(queue: JobQueue) -> None:
    def work() -> str:
        time.sleep(0.2)
        return "done"

    assert queue.ticket().run(work, timeout=0.05) == "done"


def test_two_devices_work_at_once(queue: JobQueue) -> None:
    queue.serve(2)
    both = threading.Barrier(2)
    tickets = [queue.ticket(), queue.ticket()]
    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(lambda ticket: ticket.run(lambda: both.wait(60)), tickets)) == [0, 1]


def test_who_came_later_waits_for_who_is_not_ready_also_where_a_device_is_free(queue: JobQueue) -> None:
    queue.serve(2)
    first, second = queue.ticket(), queue.ticket()
    with pytest.raises(NoTurn):
        second.run(lambda: pytest.fail("it has overtaken"), timeout=0.05)
    third = queue.ticket()
    assert first.run(lambda: 1) == 1
    assert third.run(lambda: 3) == 3


def test_of_several_devices_none_is_given_up(queue: JobQueue) -> None:
    queue.serve(3)
    queue.serve(1)
    both = threading.Barrier(3)
    tickets = [queue.ticket() for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        assert sorted(threads.map(lambda ticket: ticket.run(lambda: both.wait(60)), tickets)) == [0, 1, 2]
