"""Where a client's adapter comes from: the hub, an https URL or LORA_DIR -> a safetensors file here, or why not.

Only safetensors: other formats can run code. Knows nothing of torch or of what an adapter fits.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, model_info
from safetensors import SafetensorError, safe_open

from src.errors import Fault, Refused, WorkerFault, redact
from src.job import Job
from src.request.addresses import (
    COMMIT,
    SUFFIX,
    Host,
    HubFile,
    NotSafetensors,
    WebFile,
    check_beginning,
    only_for_the_hub,
    read_address,
)
from src.request.fetch import Headers, HttpError, NotModified, Unreachable, is_url, open_url
from src.request.schema import Lora, Request, reference
from src.settings import Settings
from src.wording import show

_PARTIAL, _ORIGIN = ".partial", "origin.json"
_FETCH_SECONDS = 600
_HUB_SECONDS = 10  # for a word of the hub
_FRESH_SECONDS = 60  # jobs that come one after another ask an address once, and what changed there is seen in a minute
_LEFT_BEHIND = 6 * 3600  # seconds after which an unfinished file is taken for that of a process that was killed
_BEGINNING = 512  # bytes that tell what a file is
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Adapter:
    """An adapter's file on this machine, and what was asked of it; `name` is the file's own, whoever asks."""

    name: str
    file: Path
    asked: Lora
    field: str  # of the request, that named it

    def summary(self) -> dict[str, Any]:
        """What was asked, as others may read it: a URL that may hold a token by its digest."""
        path = self.asked.path.strip()
        shown = reference(path) if is_url(path) else path
        return self.asked.model_dump(exclude_none=True) | {"path": shown}


class LoadedAdapters(NamedTuple):
    """A request's adapters, the faults of those that cannot be had, and warnings of those that may be old."""

    adapters: tuple[Adapter, ...]
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]


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
    """A whole file in the cache."""

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


class _Unavailable(Exception):
    """A trouble of the worker's own."""


Get = Callable[[Path, Origin], tuple[Path, Origin]]  # puts a file into a folder, unless it is what is known of it

_alive: WeakValueDictionary[int, Adapter] = WeakValueDictionary()  # whose files somebody may still read
_trimming = threading.Lock()
_turns: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()  # one for each file that is asked for


class AdapterStore:
    """Finds adapters, and keeps what it downloads, the latest used, within LORA_CACHE_GB."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.lora_dir
        self._cache = settings.lora_cache_dir
        self._most_bytes = int(settings.lora_cache_gb * 1e9)
        self._token = settings.hf_token.get_secret_value() if settings.hf_token else None

    def load(self, request: Request, job: Job) -> LoadedAdapters:
        """The request's adapters; those of the hub and of URLs are looked at anew, once in a minute.

        While one is fetched other jobs may pass `job`. Faults that the client cannot help are WorkerFaults.
        """
        adapters, faults, warnings = [], list[Fault](), list[str]()
        for i, lora in enumerate(request.loras):
            field = request.entry_field("loras", i)
            try:
                file, asked, note = self._find(lora, job)
                stat = file.stat()
                digest = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
                adapter = Adapter(f"lora_{digest[:16]}", file, asked, field)
                _alive[id(adapter)] = adapter
                adapters.append(adapter)
                if note:
                    warnings.append(redact(f"{field} {note}"))
            except Refused as error:
                faults.append(Fault(field, redact(str(error))))
            except _Unavailable as error:
                faults.append(WorkerFault(field, redact(str(error))))
            except OSError as error:
                faults.append(WorkerFault(field, redact(self._explain(error))))
        return LoadedAdapters(tuple(adapters), tuple(faults), tuple(warnings))

    def _find(self, lora: Lora, job: Job) -> tuple[Path, Lora, str]:
        """The file, `lora` in plain words, and a warning where the file may be old."""
        path = lora.path.strip()
        if "://" not in path and (file := self._in_folder(path)):
            only_for_the_hub(lora)
            try:
                _check_whole(file)
            except OSError as error:
                raise _Unavailable(f"could not be read: LORA_DIR={self._folder}: {_reason(error)}") from error
            return file, lora, ""
        match read_address(lora):
            case WebFile() as address:
                key, lasts = address.url, False
                get = partial(self._fetch, address, job.check)
            case address:
                key, lasts = address.key, bool(address.revision and COMMIT.fullmatch(address.revision))
                get = partial(self._download, address)
        cached, note = self._cached(key, job, get, lasts=lasts)
        return cached.file, address.asked, note

    def _in_folder(self, path: str) -> Path | None:
        """The file below LORA_DIR that `path` names; links and dots lead nowhere else."""
        root = self._folder.resolve()
        try:
            file = (root / path).resolve()
            if not file.is_relative_to(root) or not file.is_file():
                return None
        except (OSError, ValueError):  # too long for a name, or no name at all
            return None
        if file.suffix != SUFFIX:
            raise Refused(f"is not a {SUFFIX} file, and other formats can run code")
        return file

    # What fetches a file, unless it is the one that is known

    def _fetch(self, address: WebFile, check: Callable[[], None], folder: Path, known: Origin) -> tuple[Path, Origin]:
        host = address.host
        token = None if host is None or address.has_token else getattr(self._settings, host.setting)
        headers = Headers(known.conditions())
        if token:
            headers.sent = {**headers.sent, "Authorization": f"Bearer {token.get_secret_value()}"}
        file, beginning = folder / f"adapter{SUFFIX}", b""
        try:
            with file.open("wb") as target:
                for chunk in open_url(address.url, self._most_bytes, _FETCH_SECONDS, check, headers):
                    if known.etag and headers.answer.get("ETag") == known.etag:
                        raise NotModified
                    if len(beginning) < _BEGINNING <= len(beginning := beginning + chunk[:_BEGINNING]):
                        check_beginning(beginning)  # before all of it has come
                    target.write(chunk)
            _check_whole(file)
        except HttpError as error:
            if host is None or error.status not in (401, 403):
                raise
            raise Refused(f"{error}: {_login(host, address, bool(token))}") from None
        except NotSafetensors as error:
            if host is None:
                raise
            raise Refused(f"{error}; if that is a page to log in, {_login(host, address, bool(token))}") from None
        return file, Origin(headers.answer.get("ETag", ""), headers.answer.get("Last-Modified", ""))

    def _download(self, address: HubFile, folder: Path, known: Origin) -> tuple[Path, Origin]:
        repo, revision = address.repo, address.revision
        with _hub_errors(address, has_token=self._token is not None):
            name = address.weight_name or self._only_file(address)
            metadata = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), token=self._token)
            if known.etag and metadata.etag == known.etag:
                raise NotModified
            size = metadata.size or 0
            if size > self._most_bytes:
                raise Refused(f"has {size:,} bytes, more than the {self._most_bytes / 1e9:g} GB of LORA_CACHE_GB")
            commit = metadata.commit_hash or revision  # the branch may move meanwhile
            file = Path(hf_hub_download(repo, name, revision=commit, token=self._token, local_dir=folder))
        return file, Origin(metadata.etag or "")

    def _only_file(self, address: HubFile) -> str:
        """The name of the safetensors file in a repo or its folder that holds one alone."""
        # Without the retries of list_repo_files, which take half a minute where the hub is down.
        info = model_info(address.repo, revision=address.revision or "main", token=self._token, timeout=_HUB_SECONDS)
        files = [file.rfilename for file in info.siblings or ()]
        inside, where = (f"{address.folder}/", f" in {show(address.folder)}") if address.folder else ("", "")
        found = [name for name in files if name.startswith(inside) and name.endswith(SUFFIX)]
        if not found:
            raise Refused(f"holds no {SUFFIX} file{where}, and other formats can run code")
        if len(found) != 1:
            raise Refused(
                f"holds {len(found)} {SUFFIX} files{where}; say which with weight_name: {', '.join(found[:8])}"
            )
        return found[0]

    # The cache: a folder for each content of each address

    def _cached(self, key: str, job: Job, get: Get, *, lasts: bool) -> tuple[CachedFile, str]:
        """The file of `key`, from the cache or else by `get`, and a warning where it could not be looked at anew.

        One that `lasts` is never looked at again. While it is fetched other jobs may pass `job`, and those that want
        the same wait for it.
        """
        digest = hashlib.sha256(key.encode()).hexdigest()[:32]
        with _turn(f"{self._cache}/{digest}", job):
            kept = self._kept(digest)
            if kept and (lasts or kept.is_fresh()):
                return kept, kept.origin().note
            job.step_aside()
            known = kept.origin() if kept else Origin()
            try:
                return self._fetched(digest, get, kept, known), ""
            except NotModified:
                origin = replace(known, note="")
            except (Unreachable, _Unavailable, OSError) as error:
                if kept is None:
                    raise
                reason = self._explain(error) if isinstance(error, OSError) else str(error)
                origin = replace(known, note=f"may be old: what was fetched before is used, since it {reason}")
            if kept is None:  # a server that takes what it was not sent for known
                raise Unreachable("could not be fetched: the server answered HTTP 304 without having been asked to")
            kept.checked(origin)
            return kept, origin.note

    def _kept(self, digest: str) -> CachedFile | None:
        """The latest file of an address; what is not whole is dropped."""
        with _trimming:
            folders = [folder for folder in self._cache.glob(f"{digest}*") if folder.suffix != _PARTIAL]
            for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True):
                for file in sorted(folder.rglob(f"*{SUFFIX}")):
                    with suppress(Refused, FileNotFoundError):  # or dropped by another process
                        _check_whole(file)
                        _touch(folder)
                        return CachedFile(folder, file)
                shutil.rmtree(folder, ignore_errors=True)
        return None

    def _fetched(self, digest: str, get: Get, old: CachedFile | None, known: Origin) -> CachedFile:
        """What `get` puts into the cache, whole or not at all; on a full disk in the place of what was used least."""
        unfinished = self._cache / f"{digest}.{time.monotonic_ns()}{_PARTIAL}"
        try:
            while True:
                try:
                    unfinished.mkdir(parents=True, exist_ok=True)
                    file, origin = get(unfinished, known)
                    _check_whole(file)
                    _write(unfinished, origin)
                    break
                except OSError as error:
                    if error.errno not in _FULL or not self._make_room(_size(unfinished), old):
                        raise
            folder = self._cache / f"{digest}-{_digest(file)}"
            with _trimming:
                if folder.exists():  # the same once more: its name stays, and the engine has it already
                    _write(folder, origin)
                else:
                    unfinished.rename(folder)
                _touch(folder)
                self._trim(keep=folder)
            return CachedFile(folder, folder / file.relative_to(unfinished))
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _make_room(self, size: int, old: CachedFile | None) -> bool:
        """Delete what was not used for longest and nobody holds, `size` bytes of it; whether there was any."""
        with _trimming:
            held = {folder for adapter in list(_alive.values()) for folder in adapter.file.parents}
            held |= {old.folder} if old else set()
            used = {folder: folder.stat().st_mtime for folder in self._cache.iterdir() if folder not in held}
            left_behind = time.time() - _LEFT_BEHIND
            freed = 0
            for folder in sorted(used, key=lambda folder: used[folder]):
                if folder.suffix == _PARTIAL and used[folder] > left_behind:
                    continue
                if freed >= max(size, 1):
                    break
                freed += _size(folder)
                shutil.rmtree(folder, ignore_errors=True)
        return freed > 0

    def _explain(self, error: OSError) -> str:
        """What hinders the cache, and what the operator may do."""
        if isinstance(error, FileNotFoundError) and self._cache.is_dir():
            return "was dropped from LORA_CACHE_DIR by another process meanwhile: send the request again"
        remedy = (
            f"give it more room or lower LORA_CACHE_GB={self._settings.lora_cache_gb:g}"
            if error.errno in _FULL
            else "set it to a folder that this worker may write to"
        )
        return f"could not be kept: LORA_CACHE_DIR={self._cache}: {_reason(error)}; {remedy}"

    def _trim(self, keep: Path) -> None:
        """Delete what was not used for longest and nobody holds, until the rest fits."""
        held = {keep, *(folder for adapter in list(_alive.values()) for folder in adapter.file.parents)}
        folders = [folder for folder in self._cache.iterdir() if folder.suffix != _PARTIAL]
        folders.sort(key=lambda folder: folder.stat().st_mtime)
        sizes = {folder: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in folders}
        for folder in folders:
            if sum(sizes.values()) <= self._most_bytes:
                return
            if folder not in held:
                shutil.rmtree(folder, ignore_errors=True)
                del sizes[folder]


def _touch(folder: Path) -> None:
    """It was used just now, by a clock that tells any two uses apart; on a read-only volume nobody counts."""
    with suppress(OSError):
        os.utime(folder, ns=(time.time_ns(), time.time_ns()))


@contextmanager
def _turn(key: str, job: Job) -> Iterator[None]:
    """Nobody else of this process asks for `key` meanwhile; whoever waits for that lets others pass."""
    with _trimming:  # a WeakValueDictionary's setdefault is not one stroke
        turn = _turns.setdefault(key, threading.Lock())
    if not turn.acquire(blocking=False):
        job.step_aside()
        while not turn.acquire(timeout=0.1):
            job.check()
    try:
        yield
    finally:
        turn.release()


@contextmanager
def _hub_errors(address: HubFile, *, has_token: bool) -> Iterator[None]:
    """What the hub answered, in words: faults of the address as Refused, the worker's own as _Unavailable."""
    try:
        yield
    except errors.GatedRepoError:
        has = "the worker's HF_TOKEN has no access" if has_token else "the worker has no HF_TOKEN"
        raise Refused(f"is gated, and {has}") from None
    except errors.RepositoryNotFoundError:
        hint = "; an address begins with https://" if "." in address.repo.partition("/")[0] else ""
        raise Refused(
            f"names the repo {address.repo!r}, which is not on the hub, or which the worker may not see{hint}"
        ) from None
    except errors.RevisionNotFoundError:
        raise Refused(f"names a revision that the repo has not: {address.revision!r}") from None
    except errors.RemoteEntryNotFoundError:
        raise Refused(f"names a file that the repo has not: {address.weight_name!r}") from None
    except errors.HFValidationError:
        raise Refused(f"names the repo {address.repo!r}, which is no hub id (owner/name)") from None
    except (Refused, NotModified):
        raise
    except Exception as error:
        raise _no_answer(error) from error


def _no_answer(error: Exception) -> Exception:
    """What `error` of huggingface_hub means: Refused, _Unavailable, or the OSError of a disk."""
    reason = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    if isinstance(reason, errors.HfHubHTTPError):
        status = reason.response.status_code
        if status == 401:
            return _Unavailable("could not be downloaded: the hub refuses the worker's HF_TOKEN, which is wrong or old")
        kind = Refused if status < 500 and status not in (408, 429) else _Unavailable
        return kind(f"could not be downloaded: the hub answered HTTP {status}")
    if isinstance(reason, errors.OfflineModeIsEnabled):
        return _Unavailable("is not on this worker, and HF_HUB_OFFLINE forbids to ask the hub: unset it")
    if isinstance(reason, OSError) and reason.errno and (reason.filename or reason.errno in _FULL):
        return reason
    if "No space left" in str(error):  # hf_xet tells of it in words
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return _Unavailable(
        f"could not be downloaded: the hub ({constants.ENDPOINT}) cannot be reached ({type(reason).__name__})"
    )


def _login(host: Host, address: WebFile, has_token: bool) -> str:
    """Which token a service wants or refuses."""
    name = host.setting.upper()
    if address.has_token:
        return f"{host.name} refuses the token in the address"
    if has_token:
        return f"{host.name} refuses the worker's {name}: it is wrong or old, or its account may not have this file"
    return f"{host.name} wants to know who asks: set {name} on the worker"


def _write(folder: Path, origin: Origin) -> None:
    (folder / _ORIGIN).write_text(json.dumps(asdict(origin)))


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _reason(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()


def _check_whole(file: Path) -> None:
    """Raise Refused where it is no safetensors file, from its header to its last byte."""
    with file.open("rb") as opened:
        check_beginning(opened.read(_BEGINNING))
    try:
        with safe_open(file, "np"):  # reads the header and compares the length
            pass
    except SafetensorError as error:
        raise Refused(f"is not a complete {SUFFIX} file ({error})"[:200]) from None
