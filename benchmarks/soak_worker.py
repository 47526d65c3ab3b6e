"""The process that benchmarks/soak.py watches: handler.py as it is, which on SIGUSR1 writes to FILE what it holds.

The allocator hands back first what is free (glibc's malloc_trim): what is left is held.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil

from src.settings import ROOT


def _kind(handle: Path) -> str:
    """Socket, pipe, anon_inode, or a file's path."""
    with suppress(OSError):  # the handle of the listing itself is closed by now
        return os.readlink(handle).partition(":")[0]
    return "closed"


def main() -> None:
    file = Path(sys.argv.pop())
    process = psutil.Process()

    def measure(*_: object) -> None:
        before = process.memory_info().rss
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        pool = [thread for thread in threading.enumerate() if thread.name.startswith("job_")]  # at most MAX_PREFETCH
        held = {
            "megabytes_before_trim": round(before / 1e6, 1),
            "megabytes": round(process.memory_info().rss / 1e6, 1),
            "handles": process.num_fds(),
            "handles_of": Counter(_kind(handle) for handle in Path("/proc/self/fd").iterdir()),
            "threads": process.num_threads() - len(pool),
            "pool": len(pool),
        }
        written = file.with_suffix(".new")
        written.write_text(json.dumps(held))
        written.rename(file)

    signal.signal(signal.SIGUSR1, measure)
    runpy.run_path(str(ROOT / "handler.py"), run_name="__main__")


if __name__ == "__main__":
    main()
