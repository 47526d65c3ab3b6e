"""How the process ends: at once, and with all that it started."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

import psutil

from src.stages import START

log = logging.getLogger("worker")

_CHILDREN_SECONDS = 0.5  # to end by themselves


def leave_at_once(number: int = signal.SIGTERM, *_: object) -> None:
    """Answer a signal where nothing is in hand: a clean end would wait for downloads and for the device's thread."""
    if multiprocessing.parent_process() is None:  # the SDK's process for pings has this from its parent
        log.info("stopping because of %s%s", signal.Signals(number).name, START.under_way())
    leave(0)


def leave(status: int) -> NoReturn:
    """End the process: the interpreter's own way takes seconds to tear torch down."""
    try:
        _end_children()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # a signal may have come in the midst of a write, which cannot be flushed then
        os._exit(status)


def _end_children() -> None:
    """The SDK's process for pings, which would go on telling RunPod that this worker is alive, and compilers."""
    children = psutil.Process().children(recursive=True)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for child in children:
            with suppress(psutil.NoSuchProcess):
                end(child)
        _, children = psutil.wait_procs(children, _CHILDREN_SECONDS)
