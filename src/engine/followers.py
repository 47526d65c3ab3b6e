"""Several cards on one picture: this process draws, and others, one a card, take their share of each call.

They are in step by the transformer's calls and know nothing of plans: whatever happens between two calls, a picture
that is cancelled or decoded again, keeps nobody waiting.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed
from torch.utils._pytree import tree_map_only

from src.engine.follower import BroadcastTensor, Failure, follow, join
from src.engine.ulysses import Ulysses
from src.errors import DeviceFailed, GenerationFailed, InvalidSettings, ModelUnavailable, OutOfMemory
from src.request.adapters import Adapter
from src.settings import Settings

_IN_STEP = 10.0  # seconds after this process's call until the others' must have ended too


class Followers:
    """One process for each of `devices` but the first, which is this process's; `close` ends them."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = tuple(devices)
        self._broken: DeviceFailed | None = None
        self._not_calling = threading.Event()  # cleared while this process may be waiting for the others
        self._not_calling.set()
        self._store: Any = None
        spawn = multiprocessing.get_context("spawn")
        self._processes = []
        self._connections: list[Connection] = []
        self._replies: list[queue.SimpleQueue[Failure | None]] = []
        self._awaited = 0  # replies that each still owes
        for device in self._devices[1:]:
            here, there = spawn.Pipe()
            process = spawn.Process(target=follow, args=(there, os.getpid(), device), name=str(device), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._connections.append(here)
            self._replies.append(queue.SimpleQueue())
        self._end = weakref.finalize(self, _end, self._processes)

    @property
    def devices(self) -> tuple[str, ...]:
        """All that draw, this process's first."""
        return tuple(map(str, self._devices))

    def lead(self, transformer: Any, settings: Settings) -> None:
        """Have the model loaded by all, and `transformer` called by all from now on.

        Raises ModelUnavailable, InvalidSettings or DeviceFailed.
        """
        for number, device in enumerate(self._devices[1:]):
            threading.Thread(target=self._read, args=(number,), name=f"reads {device}", daemon=True).start()
        alone = {"controlnets": (), "prompt_upsampler": None}  # which work here
        shared = settings.model_copy(update=alone)
        for number, device in enumerate(self._devices[1:]):  # one after another: each passes through the host's memory
            self._send("load", shared, len(self._devices) - 1 - number, to=number)
            failure = self._replies[number].get()
            self._check()
            if failure:
                raise ModelUnavailable(f"the model cannot be loaded on {device} too: {failure.words}")
        processes = len(self._devices)
        self._store = distributed.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, processes, is_master=True, wait_for_workers=False
        )
        for number in range(processes - 1):
            self._send("join", self._store.port, number + 1, processes, to=number)
        self._awaited = 1
        join(self._store, 0, processes, self._devices[0])
        try:
            ulysses = Ulysses(transformer, self._devices[0])
        except ValueError as error:
            raise InvalidSettings(f"ATTENTION_BACKEND={settings.attention_backend}: {error}") from error
        if failures := self._settle(timeout=None):
            raise DeviceFailed(f"the cards cannot reach each other: {failures[0].words}")

        @functools.wraps(transformer.forward)
        def forward(**inputs: Any) -> Any:
            return self._call(ulysses, inputs)

        transformer.forward = forward

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within it a plan is drawn; raises DeviceFailed at its end where a follower was lost, whatever came of it."""
        try:
            yield
            if failures := self._settle():
                self._lose(failures[0].words)
        finally:
            self._check()

    def use_adapters(self, adapters: Sequence[Adapter]) -> None:
        """As Engine.use_adapters, in all of them; raises OutOfMemory or GenerationFailed where one cannot."""
        for failure in self._ask("use_adapters", tuple(adapters)):
            if failure.out_of_memory:
                raise OutOfMemory(f"there is no room for the adapters on every card: {failure.words}")
            raise GenerationFailed(f"the adapters could not be set on every card: {failure.words}")

    def forget_adapters(self) -> None:
        """As Engine.forget_adapters, in all of them."""
        if self._broken is None:
            self._ask("forget_adapters")

    def close(self) -> None:
        """End them."""
        self._broken = self._broken or DeviceFailed("the other cards were let go")
        self._end()
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def _call(self, ulysses: Ulysses, inputs: dict[str, Any]) -> Any:
        """One call of the transformer, by all at once."""
        if failures := self._settle():
            self._lose(failures[0].words)
        self._check()
        tensors: dict[int, torch.Tensor] = {}  # by id: ControlNets give one to several blocks

        def outgoing(tensor: torch.Tensor) -> BroadcastTensor:
            number = list(tensors).index(id(tensor)) if id(tensor) in tensors else len(tensors)
            tensors[id(tensor)] = tensor
            return BroadcastTensor(number, tuple(tensor.shape), tensor.dtype, tensor.device.type)

        described = tree_map_only(torch.Tensor, outgoing, inputs)
        incoming = [
            BroadcastTensor(number, tuple(each.shape), each.dtype, each.device.type)
            for number, each in enumerate(tensors.values())
        ]
        self._not_calling.clear()
        try:
            for number in range(len(self._processes)):
                self._send("call", described, incoming, to=number)
            self._awaited += 1
            for tensor in tensors.values():
                distributed.broadcast(tensor.contiguous(), src=0)
            return ulysses(**inputs)
        except Exception as error:
            self._not_calling.set()
            self._settle()  # where all of them failed alike they are in step, and the call may be made again
            if self._broken:
                raise self._broken from error
            raise
        finally:
            self._not_calling.set()

    def _ask(self, name: str, *arguments: Any) -> list[Failure]:
        """What they could not do."""
        failures = self._settle()
        self._check()
        for number in range(len(self._processes)):
            self._send(name, *arguments, to=number)
        self._awaited += 1
        return failures + self._settle(timeout=None)

    def _settle(self, timeout: float | None = _IN_STEP) -> list[Failure]:
        """Wait for all replies that are owed, and say what failed; who owes one for too long is lost."""
        failures = []
        for replies in self._replies:
            for _ in range(self._awaited):
                if self._broken:
                    break
                try:
                    failure = replies.get(timeout=timeout)
                except queue.Empty:
                    self._lose("they are out of step")
                    break
                if failure:
                    failures.append(failure)
        self._awaited = 0
        return failures

    def _send(self, name: str, *arguments: Any, to: int) -> None:
        try:
            self._connections[to].send((name, arguments))
        except OSError:
            self._lose(f"the process of {self._devices[to + 1]} ended")
            self._check()

    def _read(self, number: int) -> None:
        """On a thread of its own: what a follower replies, also while this process waits for it on the card."""
        while True:
            try:
                reply = self._connections[number].recv()
            except (EOFError, OSError):
                self._lose(f"the process of {self._devices[number + 1]} ended")
                self._replies[number].put(Failure("its process ended", ended=True))
                return
            self._replies[number].put(reply)
            if reply and not self._not_calling.wait(_IN_STEP):
                self._lose(reply.words)

    def _lose(self, words: str) -> None:
        """Nothing goes on from here: whoever waits for a follower is let go."""
        if self._broken is None:
            self._broken = DeviceFailed(f"the cards of one picture failed and this worker must be replaced: {words}")
            self._end()
            if self._devices[0].type == "cuda" and distributed.is_initialized():
                with suppress(RuntimeError):
                    distributed.distributed_c10d._abort_process_group()

    def _check(self) -> None:
        if self._broken:
            raise DeviceFailed(str(self._broken))


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
