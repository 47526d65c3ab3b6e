"""Where a client's adapter comes from: the hub, an https URL or LORA_DIR -> a safetensors file here, or why not.

Only safetensors: other formats can run code. Knows nothing of torch or of what an adapter fits.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, model_info
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from src.errors import Fault, Refused, WorkerError, WorkerFault
from src.job import Job
from src.redaction import redact
from src.request.adapter_cache import FULL, Cache, CachedFile, Get, Origin, Room, Unavailable, check_whole, hold, reason
from src.request.addresses import (
    COMMIT,
    SUFFIX,
    HubFile,
    NotSafetensors,
    WebFile,
    check_beginning,
    only_for_the_hub,
    read_address,
)
from src.request.fetch import Headers, HttpError, NotModified, is_url, length_of, open_url
from src.request.schema import Lora, Request, reference
from src.request.tensor_file import TensorFile
from src.settings import Settings
from src.wording import show

_FETCH_SECONDS = 600
_HUB_SECONDS = 10  # for a word of the hub
_BEGINNING = 512  # bytes that tell what a file is
_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
_PUBLIC = "public"
_LETTERS = 100  # of a file's name in an answer


@dataclass(frozen=True, eq=False)
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


class AdapterStore:
    """Finds adapters, and keeps what it downloads, the latest used, within LORA_CACHE_GB."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.lora_dir
        self._cache = Cache(settings)
        self._allow = settings.lora_hub_allow or (_PUBLIC,)
        self._token = settings.hf_token.get_secret_value() if settings.hf_token else None

    def load(self, request: Request, job: Job) -> LoadedAdapters:
        """The request's adapters; those of the hub and of URLs are looked at anew, once in a minute.

        Whoever reads files, which may lie on a slow volume, lets others pass. Faults that the client cannot help are
        WorkerFaults.
        """
        adapters, faults, warnings = list[Adapter](), list[Fault](), list[str]()
        if request.loras:
            job.step_aside()
        for i, lora in enumerate(request.loras):
            field = request.entry_field("loras", i)
            try:
                # What is found is held until its adapter is: nobody drops the file in between.
                found, asked, note = self._find(lora, job, {adapter.file for adapter in adapters})
                adapter = Adapter(_name_of(found.file), found.file, asked, field)
                adapters.append(hold(adapter))
                if note:
                    warnings.append(redact(f"{field} {note}"))
            except Refused as error:
                faults.append(Fault(field, redact(str(error))))
            except Unavailable as error:
                faults.append(WorkerFault(field, redact(str(error))))
            except OSError as error:
                faults.append(WorkerFault(field, redact(self._cache.explain(error))))
        return LoadedAdapters(tuple(adapters), tuple(faults), tuple(warnings))

    def _find(self, lora: Lora, job: Job, others: set[Path]) -> tuple[CachedFile, Lora, str]:
        """The file, `lora` in plain words, and a warning where the file may be old; `others` are this request's."""
        path = lora.path.strip()
        if "://" not in path and (file := self._in_folder(path)):
            only_for_the_hub(lora)
            try:
                TensorFile(file)
            except OSError as error:
                raise self._unreadable(error) from error
            return CachedFile(self._folder, file), lora, ""
        get: Get
        match read_address(lora):
            case WebFile() as address:
                key, lasts = address.url, False
                get = partial(self._fetch, address)
            case address:
                named = self._is_named(address)
                # What was seen with a token that sees more is not what everybody may see.
                key = address.key if named else f"{address.key} {_PUBLIC}"
                lasts = bool(address.revision and COMMIT.fullmatch(address.revision))
                get = partial(self._download, address, named)
        cached, note = self._cache.find(key, job, get, lasts=lasts, others=others)
        return cached, address.asked, note

    def _in_folder(self, path: str) -> Path | None:
        """The file below LORA_DIR that `path` names; links and dots lead nowhere else."""
        try:
            root = self._folder.resolve()
            file = (root / path).resolve()
            if not file.is_relative_to(root) or not file.is_file():
                return None
        except (ValueError, RuntimeError):  # no name at all, or a loop of links
            return None
        except OSError as error:
            if error.errno in _NO_NAME:
                return None
            raise self._unreadable(error) from error
        if file.suffix != SUFFIX:
            raise Refused(f"is not a {SUFFIX} file, and other formats can run code")
        return file

    def _unreadable(self, error: OSError) -> Unavailable:
        return Unavailable(f"could not be read: LORA_DIR={self._folder}: {reason(error)}")

    # What fetches a file, unless it is the one that is known

    def _fetch(self, address: WebFile, room: Room, known: Origin) -> tuple[Path, Origin]:
        host = address.host
        token = None if host is None or address.has_token else getattr(self._settings, host.setting)
        headers = Headers(known.conditions())
        if token:
            headers.sent = {**headers.sent, "Authorization": f"Bearer {token.get_secret_value()}"}
        beginning = b""
        try:
            with room.open() as target:
                for chunk in open_url(address.url, self._cache.largest, _FETCH_SECONDS, room.job.check, headers):
                    if known.etag and headers.answer.get("ETag") == known.etag:
                        raise NotModified
                    if not beginning:
                        target.announce(length_of(headers.answer))
                    if len(beginning) < _BEGINNING <= len(beginning := beginning + chunk[:_BEGINNING]):
                        check_beginning(beginning)  # before all of it has come
                    target.write(chunk)
            check_whole(room.file)
        except HttpError as error:
            if host is None or error.status not in (401, 403):
                raise
            raise Refused(f"{error}: {address.login(has_token=bool(token))}") from None
        except NotSafetensors as error:
            if host is None:
                raise
            raise Refused(f"{error}; if that is a page to log in, {address.login(has_token=bool(token))}") from None
        return room.file, Origin(headers.answer.get("ETag", ""), headers.answer.get("Last-Modified", ""))

    def _download(self, address: HubFile, named: bool, room: Room, known: Origin) -> tuple[Path, Origin]:
        repo, revision = address.repo, address.revision
        with _hub_errors(address, has_token=self._token is not None):
            name = self._file_name(address, named)
            metadata = get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), token=self._token)
            if known.etag and metadata.etag == known.etag:
                raise NotModified
            url = hf_hub_url(repo, name, revision=metadata.commit_hash or revision)  # the branch may move meanwhile
            with room.open() as target:
                target.announce(metadata.size)
                # Its headers stay behind where it leads to another host.
                http_get(
                    url,
                    cast(BinaryIO, target),
                    headers=build_hf_headers(token=self._token),
                    expected_size=metadata.size,
                    displayed_filename="adapter",
                )
        return room.file, Origin(metadata.etag or "")

    def _is_named(self, address: HubFile) -> bool:
        """Whether LORA_HUB_ALLOW names the repo, which may then be private.

        Raises Refused where it allows neither that nor public ones, in the words for a repo that is not there.
        """
        named = not {"*", address.repo, f"{address.repo.partition('/')[0]}/*"}.isdisjoint(self._allow)
        if not named and _PUBLIC not in self._allow:
            raise _absent(address)
        return named

    def _file_name(self, address: HubFile, named: bool) -> str:
        """The file that is meant; only a repo that is `named` may be private."""
        if named and address.weight_name:
            return address.weight_name
        # Without the retries of list_repo_files, which take half a minute where the hub is down.
        ask = partial(model_info, address.repo, token=self._token, timeout=_HUB_SECONDS)
        try:
            info = ask(revision=address.revision or "main")
        except errors.RevisionNotFoundError:
            if not named and ask().private:
                raise _absent(address) from None
            raise
        except errors.HfHubHTTPError as error:
            if not named and error.response.status_code == 403:
                raise _absent(address) from None
            raise
        if info.private and not named:
            raise _absent(address)
        return address.weight_name or _only_file(address, [file.rfilename for file in info.siblings or ()])


@contextmanager
def _hub_errors(address: HubFile, *, has_token: bool) -> Iterator[None]:
    """What the hub answered, in words: faults of the address as Refused, the worker's own as Unavailable."""
    try:
        yield
    except errors.GatedRepoError:
        has = "the worker's HF_TOKEN has no access" if has_token else "the worker has no HF_TOKEN"
        raise Refused(f"is gated, and {has}") from None
    except errors.RepositoryNotFoundError:
        raise _absent(address) from None
    except errors.RevisionNotFoundError:
        raise Refused(f"names a revision that the repo has not: {show(address.revision)}") from None
    except errors.RemoteEntryNotFoundError:
        raise Refused(f"names a file that the repo has not: {show(address.weight_name)}") from None
    except errors.HFValidationError:
        raise Refused(f"names the repo {show(address.repo)}, which is no hub id (owner/name)") from None
    except (Refused, NotModified, Unavailable, WorkerError):
        raise
    except Exception as error:
        raise _no_answer(error) from error


def _absent(address: HubFile) -> Refused:
    """What is told of a repo that is not there, and of one that is not for clients."""
    hint = "; an address begins with https://" if "." in address.repo.partition("/")[0] else ""
    return Refused(
        f"names the repo {show(address.repo)}, which is not on the hub, or which the worker may not see{hint}"
    )


def _only_file(address: HubFile, files: Sequence[str]) -> str:
    """The name of the safetensors file in a repo or its folder that holds one alone."""
    inside, where = (f"{address.folder}/", f" in {show(address.folder)}") if address.folder else ("", "")
    found = [name for name in files if name.startswith(inside) and name.endswith(SUFFIX)]
    if not found:
        raise Refused(f"holds no {SUFFIX} file{where}, and other formats can run code")
    if len(found) != 1:
        raise Refused(
            f"holds {len(found)} {SUFFIX} files{where}; say which with weight_name: "
            f"{', '.join(name[:_LETTERS] for name in found[:8])}"
        )
    return found[0]


def _no_answer(error: Exception) -> Exception:
    """What `error` of huggingface_hub means: Refused, Unavailable, or the OSError of a disk."""
    cause = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if status == 401:
            return Unavailable("could not be downloaded: the hub refuses the worker's HF_TOKEN, which is wrong or old")
        kind = Refused if status < 500 and status not in (408, 429) else Unavailable
        return kind(f"could not be downloaded: the hub answered HTTP {status}")
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return Unavailable("is not on this worker, and HF_HUB_OFFLINE forbids to ask the hub: unset it")
    if isinstance(cause, OSError) and cause.errno and (cause.filename or cause.errno in FULL):
        return cause
    return Unavailable(
        f"could not be downloaded: the hub ({constants.ENDPOINT}) cannot be reached ({type(cause).__name__})"
    )


def _name_of(file: Path) -> str:
    """A name for this content of the file: it is another once somebody wrote to it."""
    stat = file.stat()
    said = f"{file.resolve()} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"
    return f"lora_{hashlib.sha256(said.encode(errors='surrogateescape')).hexdigest()[:16]}"
