"""Parts of files, read with large requests; and memory that is mapped from a file, found again in it.

A page of a mapping that is not in memory is a request of its own, of 128 KiB on most machines: from a network volume
gigabytes take a quarter of an hour that way, and half a minute by read().
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from src.errors import Refused

_MAPS = Path("/proc/self/maps")
_MOST_VIEWS = 512  # of one call; IOV_MAX is 1024 on Linux


class FilePart(NamedTuple):
    """Where in a file something begins; `offset` in bytes."""

    file: Path
    offset: int


class FileReader:
    """Fills memory from files. `drop_behind` takes out of the system's cache what was read: where memory is short."""

    def __init__(self, *, drop_behind: bool = False) -> None:
        self.drop_behind = drop_behind

    def read(self, part: FilePart, into: Sequence[memoryview]) -> None:
        """Fill one after another of `into`, which are of bytes, from `part` on; several threads may.

        Raises Refused where the file ends before, OSError as the system does.
        """
        offset, views = part.offset, [view for view in into if view.nbytes]
        descriptor = os.open(part.file, os.O_RDONLY)
        try:
            while views:
                count = self.request(descriptor, views[:_MOST_VIEWS], offset)
                if not count:
                    raise Refused(f"{part.file} became shorter while it was read: download it again")
                offset += count
                views = _rest(views, count)
            if self.drop_behind:
                self.drop(descriptor, part.offset, offset - part.offset)
        finally:
            os.close(descriptor)

    def request(self, descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        """Fill what comes of `views` at once; its bytes, 0 at the end of the file."""
        return os.preadv(descriptor, views, offset)

    def drop(self, descriptor: int, offset: int, size: int) -> None:
        """Take a part out of the system's cache, but for pages that somebody has mapped and touched."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_DONTNEED)


def drop(file: Path) -> None:
    """Take a whole file out of the system's cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        FileReader().drop(descriptor, 0, 0)  # 0 bytes are all to its end
    finally:
        os.close(descriptor)


def _rest(views: list[memoryview], count: int) -> list[memoryview]:
    """What is left to fill after `count` bytes."""
    done = 0
    while done < len(views) and count >= views[done].nbytes:
        count -= views[done].nbytes
        done += 1
    return [views[done][count:], *views[done + 1 :]] if done < len(views) else []


class MappedFiles:
    """The files that are mapped into this process now; nothing where the system does not list them (/proc).

    A page that somebody wrote to is not told from its file's: nobody writes to weights before they are where they live.
    """

    def __init__(self, maps: Path = _MAPS) -> None:
        # By address: first byte, byte after the last, the file and where in it. Paths are made of what is asked for
        # alone: there are a thousand mappings, and they are looked at for one tensor.
        self._mappings: list[tuple[int, int, str, int]] = []
        try:
            lines = maps.read_text().splitlines()
        except OSError:
            return
        for line in lines:  # https://man7.org/linux/man-pages/man5/proc_pid_maps.5.html
            addresses, _, offset, _, _, *path = line.split(maxsplit=5)
            if path and path[0].startswith("/"):
                begin, end = (int(address, 16) for address in addresses.split("-"))
                self._mappings.append((begin, end, path[0], int(offset, 16)))

    def find(self, address: int, size: int) -> FilePart | None:
        """Where `size` bytes at `address` come from; None where that is no file, or one that is not there any more."""
        index = bisect_right(self._mappings, address, key=lambda mapping: mapping[0]) - 1
        if index < 0:
            return None
        begin, end, path, offset = self._mappings[index]
        found = FilePart(Path(path), offset + address - begin)
        whole = address + size <= end and found.file.is_file() and found.offset + size <= found.file.stat().st_size
        return found if whole else None
