"""A model's file from the web: fetched once, from where it was cut off, and kept for the next start."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from src.errors import Refused
from src.request.addresses import WebFile
from src.request.fetch import Headers, HttpError, Unreachable, length_of, open_url
from src.request.tensor_file import MAX_HEADER
from src.settings import Settings
from src.weights.disk import free_bytes
from src.weights.gguf_header import MAGIC
from src.weights.single_file import SUFFIXES, SingleFile, read_single_file

_SECONDS = 6 * 3600  # for a whole file; a server that says nothing is left long before
_PEEK_SECONDS = 60  # for the beginning of one
_MOST = 1 << 42  # bytes of a file; the disk's room is less
_TRIES, _PAUSE = 5, 2.0  # without a byte more; seconds between them
_PART = "part"  # of a file, beside it what says whether it may be continued
_GGUF_BEGINNING = 16 << 20  # bytes: GGUF does not say how long its header is
_BEGINNING = 512
_LONGEST_NAME = 200  # bytes: a file system has room for 255


class WebModel:
    """The file at `address`, kept in a folder of its own below the first of `folders`, or found in another of them.

    What is kept is used as it is, and asks nobody.
    """

    def __init__(self, address: WebFile, settings: Settings, folders: Iterable[Path]) -> None:
        self._address = address
        host = address.host
        token = None if host is None or address.has_token else getattr(settings, host.setting)
        self._token = token.get_secret_value() if token else None
        digest = hashlib.sha256(_without_token(address).encode()).hexdigest()[:32]
        self._folders = [folder / digest for folder in folders]

    def here(self) -> Path | None:
        """Where it is on this machine, whole."""
        files = (file for folder in self._folders for file in sorted(folder.glob("*")))
        return next((file for file in files if file.name.lower().endswith(SUFFIXES)), None)

    def held_bytes(self) -> int:
        """What there is of it."""
        return sum(file.stat().st_size for file in self._folders[0].glob("*"))

    def peek(self) -> tuple[int, SingleFile | None]:
        """Its bytes that are still to come, and what it is by its header, which alone is fetched.

        Neither is known where the server does not say its length. Raises Refused where it is no FLUX or cannot be had.
        """
        headers = Headers(self._authorization())
        with self._explained():
            begins = beginning(open_url(self._address.url, _MOST, _PEEK_SECONDS, _nothing, headers))
        size = length_of(headers.answer)
        if size is None:
            return 0, None
        name = _name(self._address.url, headers.answer, begins)
        return size - self.held_bytes(), read_beginning(begins, size, name)

    def fetch(self) -> Path:
        """Download it, whole or not at all. Raises Refused where it cannot be had, OSError where it cannot be kept."""
        folder = self._folders[0]
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder) as locked:
            if found := self.here():  # by now
                return found
            part = folder / (_PART if locked else f"{_PART}-{socket.gethostname()}-{os.getpid()}")
            name = self._whole(part)
            try:
                read_single_file(part)
            except Refused:  # what is no FLUX is never kept
                part.unlink()
                raise
            return part.rename(folder / name)

    def _whole(self, part: Path) -> str:
        """Fetch it into `part`, in as many pieces as it takes; the file's name."""
        tries = 0
        while True:
            before = self.held_bytes()
            try:
                with self._explained():
                    return self._rest(part)
            except Unreachable as error:
                tries = 0 if self.held_bytes() > before else tries + 1
                if tries >= _TRIES:
                    raise
                time.sleep(max(_PAUSE, error.pause))

    def _rest(self, part: Path) -> str:
        """Put what is missing behind what is there; the file's name."""
        origin = part.with_suffix(".json")
        have, same = (part.stat().st_size if part.exists() else 0), _read(origin).get("same", "")
        resumes = {"Range": f"bytes={have}-", "If-Range": same} if have and same else {}
        headers = Headers({**self._authorization(), **resumes})
        name = ""
        with part.open("r+b" if resumes else "wb") as opened:
            try:
                for piece in open_url(self._address.url, _MOST, _SECONDS, _nothing, headers):
                    if not name:
                        opened.seek(self._begin(headers.answer, have))
                        opened.truncate()
                        origin.write_text(json.dumps({"same": _validator(headers.answer)}))
                        name = _name(self._address.url, headers.answer, piece if opened.tell() == 0 else _first(part))
                    opened.write(piece)
            except HttpError as error:
                if error.status != 416 or not resumes:
                    raise
                opened.truncate(0)  # the server has another file by now
                raise Unreachable(str(error)) from None
        if not name:
            raise Refused("is an empty file")
        return name

    def _begin(self, answer: Mapping[str, str], have: int) -> int:
        """Where what comes belongs. Raises Refused where it has no room."""
        begin = have if answer.get("Content-Range", "").startswith(f"bytes {have}-") else 0
        folder = self._folders[0]
        size, room = length_of(answer), free_bytes(folder) + have - begin
        if size is not None and size > room:
            raise Refused(
                f"has {size / 1e9:.3g} GB still to come, and {room / 1e9:.3g} GB are free below {folder.parent}: give "
                "the container more disk (containerDiskInGb), or set HF_HOME to a folder of a volume that has room"
            )
        return begin

    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token}"} if self._token else {}

    def _explained(self) -> _Login:
        return _Login(self._address, has_token=self._token is not None)


class _Login:
    """What a service says that wants a token, in words."""

    def __init__(self, address: WebFile, *, has_token: bool) -> None:
        self._address, self._has_token = address, has_token

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, HttpError) and error.status in (401, 403):
            raise Refused(f"{error}: {self._address.login(has_token=self._has_token)}") from None


def beginning(pieces: Iterable[bytes]) -> bytes:
    """As much of a file as its header is long, and not many bytes more."""
    read = bytearray()
    wanted = _BEGINNING
    for piece in pieces:
        read += piece
        if wanted == _BEGINNING and len(read) >= _BEGINNING:
            wanted = _GGUF_BEGINNING if read.startswith(MAGIC) else _BEGINNING
            if read[8:9] == b"{":
                wanted = max(_BEGINNING, min(8 + int.from_bytes(read[:8], "little"), 8 + MAX_HEADER))
        if len(read) >= wanted:
            break
    return bytes(read)


def read_beginning(begins: bytes, size: int, name: str) -> SingleFile:
    """What a file of `size` bytes is that `begins` so and has this `name`. Raises Refused where it is no FLUX."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (name or "model")
        with path.open("wb") as opened:
            opened.write(begins)
            opened.truncate(max(size, len(begins)))  # a hole, which takes no room
        return read_single_file(path)


def _without_token(address: WebFile) -> str:
    if address.host is None:
        return address.url
    parts = urlsplit(address.url)
    query = [pair for pair in parse_qsl(parts.query) if pair[0] != address.host.parameter]
    return urlunsplit(parts._replace(query=urlencode(query)))


def _first(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(len(MAGIC))


def _name(url: str, answer: Mapping[str, str], begins: bytes) -> str:
    """The file's own name, as the server says it or else its address."""
    said = re.search(r"filename=\"?([^\";]+)", answer.get("Content-Disposition", ""))
    name = (said[1] if said else unquote(urlsplit(url).path)).replace("\\", "/").rpartition("/")[2].strip(". ")
    name = "".join(character for character in name if character.isprintable())
    name = name.encode()[-_LONGEST_NAME:].decode(errors="ignore")
    if name.lower().endswith(SUFFIXES):
        return name
    return f"{name or 'model'}{'.gguf' if begins.startswith(MAGIC) else '.safetensors'}"


def _validator(answer: Mapping[str, str]) -> str:
    """What says that a file is the same when it is continued: https://www.rfc-editor.org/rfc/rfc9110#section-13.1.5."""
    etag = answer.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else answer.get("Last-Modified", "")


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Other workers that want the same file wait; False on a volume that knows no locks."""
    descriptor, locked = os.open(folder, os.O_RDONLY), True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _read(origin: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        found = json.loads(origin.read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _nothing() -> None:
    pass
