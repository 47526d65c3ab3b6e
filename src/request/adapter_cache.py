"""The folder of the adapters that were downloaded: only whole files, the latest used, and never too many bytes.

Knows nothing of where they come from.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar
from weakref import WeakValueDictionary

from src.errors import Refused
from src.job import Job
from src.request.addresses import SUFFIX
from src.request.fetch import NotModified, Unreachable
from src.request.tensor_file import TensorFile
from src.settings import Settings

FULL = (errno.ENOSPC, errno.EDQUOT)
_PARTIAL, _ORIGIN = ".partial", "origin.json"
_FRESH_SECONDS = 60  # jobs that come one after another ask an address once, and what changed there is seen in a minute
_LEFT_BEHIND = 600  # seconds after its last byte that an unfinished file of another host is taken for a dead one's
_LOCK_SECONDS = 5  # to wait for another process that changes the cache
_PATIENCE = 60  # seconds to wait for room that others use
_OVERHEAD = 4_096  # bytes beside a file in its folder
_AHEAD, _PIECE = 64_000_000, 4_000_000  # bytes of room ahead of what came: of what was announced, and was not
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


class Unavailable(Exception):
    """A trouble of the worker's own."""


class _Used(Protocol):
    @property
    def file(self) -> Path: ...


@dataclass(frozen=True)
class Origin:
    """What the server said of a file when it was asked last, and `note`, why it could not be asked since."""

    etag: str = ""
    last_modified: str = ""
    note: str = ""

    def conditions(self) -> dict[str, str]:
        """Headers that ask for the file where it is another by now."""
        if self.etag:
            return {"If-None-Match": self.etag}
        return {"If-Modified-Since": self.last_modified} if self.last_modified else {}


@dataclass(frozen=True)
class CachedFile:
    """A whole file, and the folder that it is kept in."""

    folder: Path
    file: Path

    def origin(self) -> Origin:
        """As it was written last; nothing is known of what an older worker left."""
        try:
            return Origin(**json.loads((self.folder / _ORIGIN).read_text()))
        except (OSError, ValueError, TypeError):
            return Origin()

    def is_fresh(self) -> bool:
        """Whether it was compared with what lies at its address a short time ago."""
        try:
            return 0 <= time.time() - (self.folder / _ORIGIN).stat().st_mtime < _FRESH_SECONDS
        except OSError:
            return False

    def checked(self, origin: Origin) -> None:
        """Remember what was found just now; on a full disk it is found again next time."""
        with suppress(OSError):
            _write(self.folder, origin)


T = TypeVar("T", bound=_Used)
Get = Callable[["Room", Origin], tuple[Path, Origin]]  # puts a file into a room, unless it is what is known of it

_in_use: WeakValueDictionary[int, _Used] = WeakValueDictionary()  # whose files somebody may still read
_changing = threading.Lock()  # what is in the cache, and the two around it
_turns: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()  # one for each file that is asked for
_swept: set[Path] = set()  # caches that this process has used


class Cache:
    """A folder for each content of each address in LORA_CACHE_DIR, in all within LORA_CACHE_GB at any time.

    Other processes may share it: they lock the folder while they change what is in it, and a file that is on its way
    while it comes. A volume that knows no locks goes without, and by the age of what is unfinished.
    """

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.lora_cache_dir
        self._gigabytes = settings.lora_cache_gb
        self._most = int(settings.lora_cache_gb * 1e9)
        name = "lora_cache_gb" if settings.lora_cache_gb <= settings.max_lora_gb else "max_lora_gb"
        self.limit = f"the {getattr(settings, name):g} GB of {name.upper()}"
        self.largest = min(self._most - _OVERHEAD, int(settings.max_lora_gb * 1e9))  # bytes of one file

    def find(self, key: str, job: Job, get: Get, *, lasts: bool, others: set[Path]) -> tuple[CachedFile, str]:
        """The file of `key`, from the cache or else by `get`, and a warning where it could not be looked at anew.

        One that `lasts` is never looked at again. Jobs that want the same while it is fetched wait for it; what
        `others` of this request need stays.
        """
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        self._sweep_once()
        with _turn(f"{self._folder}/{digest}", job):
            kept = self._kept(digest)
            if kept and (lasts or kept.is_fresh()):
                return kept, kept.origin().note
            known = kept.origin() if kept else Origin()
            try:
                return self._fetched(digest, get, Room(self, job, digest, kept, others), known), ""
            except NotModified:
                origin = replace(known, note="")
            except (Unreachable, Unavailable, OSError) as error:
                if kept is None:
                    raise
                why = self.explain(error) if isinstance(error, OSError) else str(error)
                origin = replace(known, note=f"may be old: what was fetched before is used, since it {why}")
            if kept is None:  # a server that takes what it was not sent for known
                raise Unreachable("could not be fetched: the server answered HTTP 304 without having been asked to")
            kept.checked(origin)
            return kept, origin.note

    def explain(self, error: OSError) -> str:
        """What hinders the cache, and what the operator may do."""
        if isinstance(error, FileNotFoundError) and self._folder.is_dir():
            return "was dropped from LORA_CACHE_DIR by another process meanwhile: send the request again"
        remedy = (
            f"give it more room or lower LORA_CACHE_GB={self._gigabytes:g}"
            if error.errno in FULL
            else "set it to a folder that this worker may write to"
        )
        return f"could not be kept: LORA_CACHE_DIR={self._folder}: {reason(error)}; {remedy}"

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Nobody else drops, begins or ends a file in the cache meanwhile."""
        with _changing, _flock(self._folder, seconds=_LOCK_SECONDS):
            yield

    def make_room(self, size: int, old: CachedFile | None = None, *, partly: bool = False) -> bool:
        """Delete what was not used for longest and nobody holds, `old` last, `size` bytes of it; whether that was done.

        Where there is less than that nothing is deleted, or all of it: `partly`.
        """
        held = {folder for used in list(_in_use.values()) if used is not old for folder in used.file.parents}
        folders = [folder for folder in self._folder.iterdir() if folder.suffix != _PARTIAL and folder not in held]
        folders.sort(key=lambda folder: (old is not None and folder == old.folder, _used_at(folder)))
        sizes = {folder: _size(folder) for folder in folders}
        enough = sum(sizes.values()) >= size
        for folder in folders if enough or partly else ():
            if size <= 0:
                break
            size -= sizes[folder]
            shutil.rmtree(folder, ignore_errors=True)
        return enough or (partly and bool(folders))

    def missing(self, size: int) -> int:
        """Bytes by which the cache would be too large with `size` more."""
        return sum(map(_size, self._folder.iterdir())) + size - self._most

    def is_used_by_others(self, room: Room) -> bool:
        """Whether jobs other than the one that wants `room` hold files in the cache, or fetch some."""
        mine = {room.old.file if room.old else None, *room.others}
        held = {used.file for used in list(_in_use.values())} - mine
        return any(self._folder in file.parents for file in held) or any(
            folder != room.folder for folder in self._folder.glob(f"*{_PARTIAL}")
        )

    def sweep(self) -> None:
        """Delete what is unfinished and comes from a process that is gone."""
        for folder in self._folder.glob(f"*{_PARTIAL}"):
            with suppress(OSError), _flock(folder) as locked:
                age = time.time() - max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
                here = f".{_HOST}-" in folder.name  # locks of other hosts may not be seen on a network volume
                if (locked and here) or (locked is not False and age > _LEFT_BEHIND):
                    shutil.rmtree(folder, ignore_errors=True)

    def refuse(self) -> Unavailable:
        """Why there is no room for another file."""
        return Unavailable(
            f"could not be kept: LORA_CACHE_DIR={self._folder}: running jobs use all of LORA_CACHE_GB="
            f"{self._gigabytes:g}; send the request again later, or give it more room"
        )

    def begin(self, digest: str) -> Path:
        """A folder for a file that is on its way."""
        return self._folder / f"{digest}.{_HOST}-{time.monotonic_ns()}{_PARTIAL}"

    def _sweep_once(self) -> None:
        """What processes before this one left, and what was allowed to them, goes before anything is fetched."""
        if self._folder in _swept:
            return
        _swept.add(self._folder)
        with suppress(OSError), self.changing():
            self.sweep()
            if (missing := self.missing(0)) > 0:
                self.make_room(missing, partly=True)

    def _kept(self, digest: str) -> CachedFile | None:
        """The latest file of an address; what is not whole is dropped."""
        folders = [folder for folder in self._folder.glob(f"{digest}*") if folder.suffix != _PARTIAL]
        for folder in sorted(folders, key=_used_at, reverse=True):
            for file in sorted(path for path in folder.rglob(f"*{SUFFIX}") if path.is_file()):
                kept = hold(CachedFile(folder, file))
                with suppress(Refused, FileNotFoundError):  # or dropped meanwhile
                    check_whole(file)
                    _touch(folder)
                    return kept
                del kept
            with _changing:
                shutil.rmtree(folder, ignore_errors=True)
        return None

    def _fetched(self, digest: str, get: Get, room: Room, known: Origin) -> CachedFile:
        """What `get` puts into the cache, whole or not at all; on a full disk in the place of what was used least."""
        with room:
            while True:
                try:
                    file, origin = get(room, known)
                    check_whole(file)
                    _write(room.folder, origin)
                    break
                except OSError as error:
                    if error.errno not in FULL:
                        raise
                    with self.changing():
                        if not self.make_room(max(_size(room.folder), 1), room.old, partly=True):
                            raise
            folder = self._folder / f"{digest}-{_digest(file)}"
            with self.changing():
                if folder.exists():  # the same once more: its name stays, and the engine has it already
                    _write(folder, origin)
                else:
                    room.folder.rename(folder)
                _touch(folder)
                return hold(CachedFile(folder, folder / file.relative_to(room.folder)))


class Room:
    """Where one file comes to lie: bytes of the cache are set apart before they come, as the length of the file.

    `old` is what the cache has of the same address: of all that nobody uses it goes last.
    """

    def __init__(self, cache: Cache, job: Job, digest: str, old: CachedFile | None, others: set[Path]) -> None:
        self.job = job
        self.old = old
        self.folder = cache.begin(digest)
        self.file = self.folder / f"adapter{SUFFIX}"
        self.cache = cache
        self.others = others
        self._lock = ExitStack()

    def __enter__(self) -> Room:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with self.cache.changing():
            self.folder.mkdir()
            self._lock.enter_context(_flock(self.folder))
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def open(self) -> Iterator[Incoming]:
        """The file, for writing."""
        with self.file.open("w+b") as opened:
            target = Incoming(opened, self)
            yield target
            opened.flush()
            opened.truncate(target.end)

    def set_apart(self, opened: BinaryIO, *sizes: int) -> int:
        """Let the file be of the first of these `sizes`, in bytes, that there is room for; the last is waited for.

        Raises Unavailable where others need the room for long.
        """
        until = time.monotonic() + _PATIENCE
        while True:
            with self.cache.changing():
                self.cache.sweep()
                for size in sizes:
                    missing = self.cache.missing(size - _size(self.folder) + _OVERHEAD)
                    if missing <= 0 or self.cache.make_room(missing, self.old):
                        opened.truncate(size)
                        return size
                waits = self.cache.is_used_by_others(self)
            if not waits or time.monotonic() > until:
                raise self.cache.refuse()
            self.job.check()
            time.sleep(0.1)


class Incoming:
    """A file on its way, no longer than was announced; what nobody announced gets its room piece by piece."""

    def __init__(self, opened: BinaryIO, room: Room) -> None:
        self.end = 0
        self._opened = opened
        self._room = room
        self._announced: int | None = None
        self._set_apart = 0

    def announce(self, size: int | None) -> None:
        """Set apart the first of what is to come, `size` bytes where that is known; Refused where it is too large."""
        self._announced = size
        if size is not None:
            self._check(size)
            self._grow(min(size, _AHEAD))  # who announces much and sends little takes no room from others

    def write(self, chunk: bytes) -> int:
        """Raises Refused where it is larger than it may be, Unavailable where it is larger than was announced."""
        self._room.job.check()
        end = self._opened.tell() + len(chunk)
        if self._announced is not None and end > self._announced:
            raise Unavailable(f"could not be downloaded: more came than the {self._announced:,} bytes of it")
        self._check(end)
        if end > self._set_apart:
            known = self._announced is not None
            self._grow(min(end + (_AHEAD if known else _PIECE), self._announced or self._room.cache.largest), end)
        self._opened.write(chunk)
        self.end = end
        return len(chunk)

    def tell(self) -> int:
        """Where the next bytes come to lie."""
        return self._opened.tell()

    def seek(self, place: int) -> int:
        """Begin anew at `place`."""
        return self._opened.seek(place)

    def truncate(self) -> None:
        """What was written behind that counts no more; its room stays."""
        self.end = self._opened.tell()

    def _check(self, size: int) -> None:
        if size > self._room.cache.largest:
            raise Refused(f"has {size:,} bytes, more than {self._room.cache.limit}")

    def _grow(self, *sizes: int) -> None:
        self._set_apart = self._room.set_apart(self._opened, *sizes)


def _touch(folder: Path) -> None:
    """It was used just now, by a clock that tells any two uses apart; on a read-only volume nobody counts."""
    with suppress(OSError):
        os.utime(folder, ns=(time.time_ns(), time.time_ns()))


@contextmanager
def _turn(key: str, job: Job) -> Iterator[None]:
    """Nobody else of this process asks for `key` meanwhile; whoever waits for that lets others pass."""
    with _changing:  # a WeakValueDictionary's setdefault is not one stroke
        turn = _turns.setdefault(key, threading.Lock())
    if not turn.acquire(blocking=False):
        job.step_aside()
        while not turn.acquire(timeout=0.1):
            job.check()
    try:
        yield
    finally:
        turn.release()


def _write(folder: Path, origin: Origin) -> None:
    (folder / _ORIGIN).write_text(json.dumps(asdict(origin)))


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _size(folder: Path) -> int:
    """Bytes of all files in it that are still there."""
    size = 0
    for file in folder.rglob("*"):
        with suppress(OSError):
            size += file.lstat().st_size if file.is_file() else 0
    return size


def _used_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # dropped meanwhile
        return 0


def hold(used: T) -> T:
    """Its file stays for as long as anybody refers to `used`."""
    _in_use[id(used)] = used
    return used


@contextmanager
def _flock(folder: Path, seconds: float = 0) -> Iterator[bool | None]:
    """Lock a folder against other processes: False where one holds it for `seconds`, None where locks do not work."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # whoever uses it will see
        yield None
        return
    try:
        yield _locked(descriptor, time.monotonic() + seconds)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, until: float) -> bool | None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
            time.sleep(0.02)
        except OSError:
            return None
        else:
            return True


def reason(error: OSError) -> str:
    """What the system says of it."""
    return (error.strerror or type(error).__name__).lower()


def check_whole(file: Path) -> None:
    """Raise Refused where it is no safetensors file, from its header to its last byte."""
    TensorFile(file)
