"""Where a client's adapter comes from: the hub, an https URL or LORA_DIR -> a safetensors file here, or why not.

Only safetensors: other formats can run code. Knows nothing of torch or of what an adapter fits.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url, list_repo_files
from safetensors import SafetensorError, safe_open

from src.errors import Fault, Refused, redact
from src.job import Job
from src.request.fetch import is_url, open_url
from src.request.schema import ADAPTER, Lora, Request, reference
from src.settings import Settings
from src.wording import show

_SUFFIX, _PARTIAL = ".safetensors", ".partial"
_FETCH_SECONDS = 600


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


_alive: WeakValueDictionary[int, Adapter] = WeakValueDictionary()  # whose files somebody may still read
_trimming = threading.Lock()


class AdapterStore:
    """Finds adapters, and keeps what it downloads, the latest used, within LORA_CACHE_GB."""

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.lora_dir
        self._cache = settings.lora_cache_dir
        self._most_bytes = int(settings.lora_cache_gb * 1e9)
        self._token = settings.hf_token.get_secret_value() if settings.hf_token else None

    def load(self, request: Request, job: Job) -> tuple[tuple[Adapter, ...], tuple[Fault, ...]]:
        """The request's adapters, and the faults of those that cannot be had."""
        adapters, faults = [], []
        for i, lora in enumerate(request.loras):
            field = request.entry_field("loras", i)
            try:
                file = self._find(lora, job)
                _check_header(file)
                stat = file.stat()
                digest = hashlib.sha256(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
                adapter = Adapter(f"lora_{digest[:16]}", file, lora, field)
                _alive[id(adapter)] = adapter
                adapters.append(adapter)
            except Refused as error:
                faults.append(Fault(field, redact(str(error))))
            except OSError as error:  # another process dropped it from a cache that they share
                faults.append(Fault(field, f"could not be read ({type(error).__name__}): send the request again"))
        return tuple(adapters), tuple(faults)

    def _find(self, lora: Lora, job: Job) -> Path:
        path = lora.path.strip()
        if is_url(path):
            _only_for_the_hub(lora)
            return self._cached(path, job, lambda folder: _fetch(path, folder, self._most_bytes, job.check))
        if path.startswith("sha256:"):
            raise Refused("is the digest of an address that may hold a token: give the address again")
        if "://" in path:
            raise Refused(f"must be {ADAPTER}, got {show(path)}")
        if file := self._in_folder(path):
            _only_for_the_hub(lora)
            return file
        parts = path.split("/")
        if path.startswith((".", "~")) or len(parts) < 2 or not all(parts):
            raise Refused(f"names no {_SUFFIX} file in LORA_DIR and is no hub id (owner/name), got {show(path)}")
        repo, weight_name = "/".join(parts[:2]), lora.weight_name or "/".join(parts[2:]) or None
        key = f"{repo} {weight_name} {lora.revision}"
        return self._cached(key, job, lambda folder: self._download(repo, weight_name, lora, folder))

    def _in_folder(self, path: str) -> Path | None:
        """The file below LORA_DIR that `path` names; links and dots lead nowhere else."""
        root = self._folder.resolve()
        try:
            file = (root / path).resolve()
            if not file.is_relative_to(root) or not file.is_file():
                return None
        except (OSError, ValueError):  # too long for a name, or no name at all
            return None
        if file.suffix != _SUFFIX:
            raise Refused(f"is not a {_SUFFIX} file, and other formats can run code")
        return file

    def _download(self, repo: str, weight_name: str | None, lora: Lora, folder: Path) -> Path:
        try:
            if weight_name is None:
                files = list_repo_files(repo, revision=lora.revision, token=self._token)
                found = [name for name in files if name.endswith(_SUFFIX)]
                if not found:
                    raise Refused(f"holds no {_SUFFIX} file, and other formats can run code")
                if len(found) != 1:
                    raise Refused(
                        f"holds {len(found)} {_SUFFIX} files; say which with weight_name: {', '.join(found[:8])}"
                    )
                weight_name = found[0]
            if not weight_name.endswith(_SUFFIX):
                raise Refused(
                    f"names the file {weight_name!r}, which must end in {_SUFFIX}: other formats can run code"
                )
            size = get_hf_file_metadata(hf_hub_url(repo, weight_name, revision=lora.revision), token=self._token).size
            if size and size > self._most_bytes:
                raise Refused(f"has {size:,} bytes, more than the {self._most_bytes / 1e9:g} GB of LORA_CACHE_GB")
            return Path(hf_hub_download(repo, weight_name, revision=lora.revision, token=self._token, local_dir=folder))
        except errors.GatedRepoError:
            has = "the worker's HF_TOKEN has no access" if self._token else "the worker has no HF_TOKEN"
            raise Refused(f"is gated, and {has}") from None
        except errors.RepositoryNotFoundError:
            raise Refused(
                f"names the repo {repo!r}, which is not on the hub, or which the worker may not see"
            ) from None
        except errors.RevisionNotFoundError:
            raise Refused(f"names a revision that the repo has not: {lora.revision!r}") from None
        except errors.RemoteEntryNotFoundError:
            raise Refused(f"names a file that the repo has not: {weight_name!r}") from None
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"could not be downloaded: {type(error).__name__}") from error

    def _cached(self, key: str, job: Job, get: Callable[[Path], Path]) -> Path:
        """The file of `key`, from the cache or else by `get`, which puts it into the folder that it is given.

        While it is downloaded other jobs may pass `job`.
        """
        folder = self._cache / hashlib.sha256(key.encode()).hexdigest()[:32]
        with _trimming:
            known = sorted(folder.rglob(f"*{_SUFFIX}"))
            if known:
                _touch(folder)
                return known[0]
        job.step_aside()
        partial = folder.with_name(f"{folder.name}.{time.monotonic_ns()}{_PARTIAL}")
        partial.mkdir(parents=True)
        try:
            file = get(partial).relative_to(partial)
            with _trimming:
                if not folder.exists():  # or another job fetched the same meanwhile
                    partial.rename(folder)
                _touch(folder)
                self._trim(keep=folder)
            return folder / file
        finally:
            shutil.rmtree(partial, ignore_errors=True)

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
    """It was used just now, by a clock that tells any two uses apart."""
    os.utime(folder, ns=(time.time_ns(), time.time_ns()))


def _only_for_the_hub(lora: Lora) -> None:
    if lora.weight_name or lora.revision:
        raise Refused("is not a hub id, and weight_name and revision need one")


def _fetch(url: str, folder: Path, most_bytes: int, check: Callable[[], None]) -> Path:
    file = folder / f"adapter{_SUFFIX}"
    with file.open("wb") as target:
        for chunk in open_url(url, most_bytes, _FETCH_SECONDS, check):
            target.write(chunk)
    return file


def _check_header(file: Path) -> None:
    try:
        with safe_open(file, "np"):
            pass
    except (SafetensorError, OSError) as error:
        raise Refused(f"is not a complete {_SUFFIX} file ({error})"[:200]) from None
