"""A process that draws its share of another's pictures, on a card of its own: it does what it is sent, call by call."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed
from torch.utils._pytree import tree_map_only

from src.engine.loading import load_engine
from src.engine.machine import on_device
from src.engine.memory import free_memory, is_out_of_memory
from src.engine.ulysses import Ulysses
from src.errors import first_line
from src.request.adapters import Adapter
from src.settings import Settings

_LOOKS = 1.0  # seconds between two looks at whether the leader is there
_LONGEST = timedelta(seconds=120)  # until a process that waits for the others gives up


@dataclass(frozen=True)
class Failure:
    """Why a follower could not do what it was sent."""

    words: str
    out_of_memory: bool = False
    ended: bool = False  # its process


@dataclass(frozen=True)
class BroadcastTensor:
    """A tensor of a call, by its place among those that the leader broadcasts."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str  # cuda or cpu


def join(store: Any, rank: int, processes: int, device: torch.device) -> None:
    """Be one of torch's default group, which finds itself by the TCPStore `store`: NCCL on cards, gloo on the CPU."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=_LONGEST)


def follow(connection: Connection, leader: int, device: torch.device) -> None:
    """The whole life of the process: ends with the process `leader`, or with its connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches it too; its leader ends it
    logging.getLogger("worker").addHandler(logging.NullHandler())  # the leader writes the log
    threading.Thread(target=_end_with, args=(leader,), daemon=True).start()
    follower = _Follower(device)
    while True:
        try:
            name, arguments = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        reply = None
        try:
            with torch.inference_mode(), on_device(device):
                getattr(follower, name)(*arguments)
        except Exception as error:  # noqa: BLE001 - the leader is told
            reply = Failure(first_line(error), is_out_of_memory(error))
            free_memory(error)
        connection.send(reply)


class _Follower:
    """What a leader may ask for, by name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ulysses: Callable[..., Any] | None = None

    def load(self, settings: Settings, sharing: int) -> None:
        with torch.inference_mode(False):
            self._engine = load_engine(settings, device=self._device, sharing=sharing)

    def join(self, port: int, rank: int, processes: int) -> None:
        store = distributed.TCPStore("127.0.0.1", port, processes)  # type: ignore[attr-defined]
        join(store, rank, processes, self._device)
        self._ulysses = Ulysses(self._engine.transformer, self._device)

    def use_adapters(self, adapters: Sequence[Adapter]) -> None:
        self._engine.use_adapters(adapters)

    def forget_adapters(self) -> None:
        self._engine.forget_adapters()

    def call(self, inputs: dict[str, Any], incoming: Sequence[BroadcastTensor]) -> None:
        assert self._ulysses is not None  # noqa: S101 - it has joined
        tensors = [torch.empty(each.shape, dtype=each.dtype, device=self._where(each)) for each in incoming]
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)
        self._ulysses(**tree_map_only(BroadcastTensor, lambda each: tensors[each.number], inputs))

    def _where(self, tensor: BroadcastTensor) -> torch.device:
        return self._device if tensor.device == self._device.type else torch.device(tensor.device)


def _end_with(leader: int) -> None:
    """End the process once its leader is gone, however that ended: this one may be waiting for it on the card."""
    while os.getppid() == leader:
        time.sleep(_LOOKS)
    os._exit(1)
