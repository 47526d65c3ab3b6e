"""What an adapter's address means: a repo on the hub, a file on the web or in LORA_DIR; or what to write instead.

Asks nobody.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import constants

from src.errors import Refused
from src.request.fetch import is_url
from src.request.schema import ADAPTER, Lora
from src.wording import show

SUFFIX = ".safetensors"
_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it
_LONGEST_NAME = 300  # characters of a file or a revision
COMMIT = re.compile(r"[0-9a-f]{40}")  # what stays what it is

_HUB = r"(?:huggingface\.co|hf\.co)"
_CIVITAI = r"civitai\.(?:com|red|green)"
_DOWNLOAD = "https://civitai.com/api/download/models/"
_VERSION = f"give {_DOWNLOAD}<version id>, the number behind modelVersionId= in the address of that version's page"
_NO_PAGE = "put the file where its address gives the file itself"


@dataclass(frozen=True)
class OtherFormat:
    """What is no safetensors file: how its name ends, how it begins, and what to do."""

    name: str
    suffixes: tuple[str, ...]
    begins: bytes  # a regular expression
    advice: str


_UNPACK, _CONVERT = f"unpack it and give the {SUFFIX} file in it", f"convert it to {SUFFIX}: it can run code"
_ITSELF = "give the address of the file itself"
_AS_SAFETENSORS = f"give it as {SUFFIX}"
OTHER_FORMATS = (
    OtherFormat("an empty file", (), rb"\Z", "send it again"),
    OtherFormat("a tar archive", (".tar", ".tar.gz", ".tgz"), rb".{257}ustar", _UNPACK),
    OtherFormat(
        "a pickle of PyTorch",
        (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"),
        rb"PK\x03\x04.{26}[^/]{1,200}/(?:data\.pkl|byteorder|version|\.format_version)|\x80[\x02-\x05]",
        _CONVERT,
    ),
    OtherFormat("a zip archive", (".zip",), rb"PK[\x03\x05]", _UNPACK),
    OtherFormat("a 7z or RAR archive", (".7z", ".rar"), rb"7z\xbc\xaf|Rar!", _UNPACK),
    OtherFormat("compressed", (".gz", ".xz", ".bz2", ".zst"), rb"\x1f\x8b|\xfd7zXZ|BZh|\x28\xb5\x2f\xfd", _UNPACK),
    OtherFormat(
        "an encrypted file", (".age", ".gpg", ".enc"), rb"age-encryption\.org/|Salted__|-----BEGIN ", "decrypt it first"
    ),
    OtherFormat("GGUF", (".gguf",), rb"GGUF", _AS_SAFETENSORS),
    OtherFormat("ONNX", (".onnx",), rb"\x08[\x01-\x0f]\x12", _AS_SAFETENSORS),
    OtherFormat("a NumPy or HDF5 file", (".npz", ".npy", ".h5"), rb"\x93NUMPY|\x89HDF", _AS_SAFETENSORS),
    OtherFormat("a Git LFS pointer", (), rb"version https?://git-lfs", f"{_ITSELF}, of which this is the pointer"),
    OtherFormat(
        "an HTML page", (".html", ".htm"), rb"(?:\xef\xbb\xbf)?\s*(?:<!--.*?-->\s*)?<(?:!doctype|html|head)", _ITSELF
    ),
    OtherFormat("XML", (".xml",), rb"(?:\xef\xbb\xbf)?\s*<", f"{_ITSELF}: a server's word of what is wrong looks so"),
    OtherFormat(
        "JSON", (".json",), rb"(?:\xef\xbb\xbf)?\s*[{\[]", f"{_ITSELF}: a server's word of what is wrong looks so"
    ),
    OtherFormat("a picture", (".png", ".jpg", ".jpeg", ".webp"), rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP", _ITSELF),
    OtherFormat("text", (".txt", ".md", ".yaml", ".yml"), rb"[\t\r\n\x20-\x7e]{16}", _ITSELF),
)


class NotSafetensors(Refused):
    """It is a file of another kind, or a page."""


@dataclass(frozen=True)
class Host:
    """A service whose files a token opens: how its addresses begin behind the scheme and www., the setting that holds
    the token, and the parameter of an address that may.
    """

    name: str
    hosts: re.Pattern[str]
    setting: str
    parameter: str


HOSTS = (Host("Civitai", re.compile(rf"{_CIVITAI}(?::\d+)?(?:[/?#]|\Z)", re.IGNORECASE), "civitai_token", "token"),)

# Addresses, without their scheme, that give a page, and what to write instead.
_PAGES = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), advice)
    for pattern, advice in (
        (
            rf"{_CIVITAI}/models/\d+.*[?&]modelVersionId=(\d+).*",
            rf"is a page of Civitai and not a file: give {_DOWNLOAD}\1",
        ),
        (rf"{_CIVITAI}/(?!api/download/).*", f"is a page of Civitai and not a file: {_VERSION}"),
        (r"(?:(?:urn:)?air:.*)?civitai:\d+", f"is a model of Civitai without one of its versions: {_VERSION}"),
        (rf"{_CIVITAI}/api/download/(?!models/\d+(?:[?#/]|\Z)).*", f"is no file of Civitai: {_VERSION}"),
        (
            r"github\.com/([^/?#]+)/([^/?#]+)/blob/([^?#]+).*",
            r"is a page of GitHub and not a file: give https://github.com/\1/\2/raw/\3",
        ),
        (
            r"gitlab\.com/([^?#]+)/-/blob/([^?#]+).*",
            r"is a page of GitLab and not a file: give https://gitlab.com/\1/-/raw/\2",
        ),
        (
            r"(?:drive|docs)\.google\.com/.*(?:/d/|[?&]id=)([\w-]+).*",
            r"is a page of Google Drive: give https://drive.usercontent.google.com/download?id=\1&export=download&confirm=t",
        ),
        (r"(?:drive|docs)\.google\.com(?:/.*)?", f"is a page of Google Drive and not a file: {_NO_PAGE}"),
        (
            r"dropbox\.com/(?!.*[?&](?:dl|raw)=1).*",
            "is a page of Dropbox and not a file: write dl=1 at its end instead of dl=0",
        ),
        (
            r"(?:1drv\.ms|onedrive\.live\.com|mega\.nz|we\.tl|wetransfer\.com|mediafire\.com)(?:/.*)?",
            f"is a page of a service for sharing files and not a file: {_NO_PAGE}",
        ),
        (r"replicate\.com(?:/.*)?", f"is a page of Replicate and not a file: give the {SUFFIX} file of its weights"),
    )
)

_KINDS = {"datasets": "a dataset", "spaces": "a space", "kernels": "a kernel", "buckets": "a bucket"}
_NO_OWNERS = {
    "api", "blog", "chat", "collections", "docs", "enterprise", "join", "learn", "login", "models", "new",
    "organizations", "papers", "posts", "pricing", "search", "settings", "tasks",
}  # fmt: skip
_FOLDERS, _FILES = ("tree", "commit"), ("blob", "resolve", "raw", "edit", "blame")
_PLACES = {*_FOLDERS, *_FILES}  # what may come behind a repo, before a revision
_PAGES_OF_A_REPO = {"discussions", "commits", "settings", "community"}
_REVISION = re.compile(r"@(refs(?:/|%2F)\w+(?:/|%2F)[^/@]+|[^/@]+)", re.IGNORECASE)
_AIR = re.compile(r"(?:(?:urn:)?air:.*)?civitai:\d+@(\d+)(?:[.:].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class HubFile:
    """A file of a repo on the hub: `weight_name`, or the only one in `folder`."""

    repo: str
    revision: str | None
    weight_name: str | None
    folder: str  # "" is the whole repo
    asked: Lora

    @property
    def key(self) -> str:
        """What tells it from all others."""
        name = self.weight_name or (f"{self.folder}/" if self.folder else None)
        return f"{self.repo} {name} {self.revision}"


@dataclass(frozen=True)
class WebFile:
    """A file at an https URL; `host` is the row of the service that has it, if it is one."""

    url: str
    host: Host | None
    asked: Lora

    @property
    def has_token(self) -> bool:
        """Whether the client's own token stands in it."""
        return self.host is not None and self.host.parameter in parse_qs(urlsplit(self.url).query)

    def login(self, *, has_token: bool) -> str:
        """Which token its service wants or refuses; `has_token` is whether the worker has one for it."""
        if self.host is None:
            return "the server wants to know who asks, and no setting has a token for it"
        name = self.host.setting.upper()
        if self.has_token:
            return f"{self.host.name} refuses the token in the address"
        if has_token:
            refused = f"{self.host.name} refuses the worker's {name}"
            return f"{refused}: it is wrong or old, or its account may not have this file"
        return f"{self.host.name} wants to know who asks: set {name} on the worker"


def read_address(lora: Lora, suffixes: tuple[str, ...] = (SUFFIX,), *, allowed: str = ADAPTER) -> HubFile | WebFile:
    """What `lora` names, which is no file in LORA_DIR; files end in one of `suffixes`, in any case.

    Raises Refused with what to write instead: what is `allowed`.
    """
    for name in ("path", "weight_name", "revision"):
        _check_text(name, getattr(lora, name) or "")
    path = lora.path.strip()
    if air := _AIR.fullmatch(path):
        path = f"{_DOWNLOAD}{air[1]}"
    scheme, bare = _split(path)
    if scheme in ("", "http", "https", "hf"):
        hub = re.match(rf"{_hub()}(?=[/?#]|\Z)", bare, re.IGNORECASE)
        if hub or scheme == "hf":
            return _on_the_hub(bare[hub.end() if hub else 0 :], lora, suffixes)
        for pattern, advice in _PAGES:
            if page := pattern.fullmatch(bare):
                raise Refused(page.expand(advice))
        # From its first letter: libraries read user@host differently, and a token is at stake.
        host = next((row for row in HOSTS if row.hosts.match(bare)), None)
        if host or scheme == "https":
            url = f"https://{path.partition('://')[2] if scheme else path}"
            return _on_the_web(url, host, lora, suffixes)
    if path.startswith("sha256:"):
        raise Refused("is the digest of an address that may hold a token: give the address again")
    if "://" in path:
        raise Refused(f"must be {allowed}, got {show(path)}")
    return _hub_id(path, lora, suffixes)


def _check_text(name: str, text: str) -> None:
    """Raise Refused where what is said of an adapter is no text that an address may hold."""
    if name != "path" and len(text) > _LONGEST_NAME:
        raise Refused(f"has a {name} of {len(text):,} characters, and at most {_LONGEST_NAME} are read")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Refused(f"has a {name} with half of a character in it (a lone surrogate), got {show(text)}")


def no_other_format(name: str, suffixes: tuple[str, ...] = (SUFFIX,)) -> None:
    """Raise Refused where a file's `name` says that it is none of those that end in `suffixes`."""
    for row in OTHER_FORMATS:
        if name.lower().endswith(row.suffixes) and not name.lower().endswith(suffixes):
            allowed = " or ".join(suffixes)
            raise Refused(f"names the file {show(name)}, which must end in {allowed} and is {row.name}: {row.advice}")


def check_beginning(begins: bytes) -> None:
    """Raise NotSafetensors where a file that `begins` so is no safetensors file: the length of a header and JSON."""
    if begins[8:9] == b"{" and int.from_bytes(begins[:8], "little") <= _LONGEST_HEADER:
        return
    if row := format_of(begins):
        raise NotSafetensors(f"is not a complete {SUFFIX} file but {row.name}: {row.advice}")


def format_of(begins: bytes) -> OtherFormat | None:
    """What a file is that `begins` so; None where that is no known one."""
    rows = (row for row in OTHER_FORMATS if re.match(row.begins, begins, re.DOTALL | re.IGNORECASE))
    return next(rows, None)


def only_for_the_hub(lora: Lora) -> None:
    """Raise Refused where `lora`, which is not on the hub, says which file or revision of a repo is meant."""
    if lora.weight_name or lora.revision:
        raise Refused("is not a hub id, and weight_name and revision need one")


def _split(path: str) -> tuple[str, str]:
    """The scheme, "" without one, and the rest without www."""
    found = re.match(r"(?:([a-z][a-z0-9+.-]*)://)?(?:www\.)?", path, re.IGNORECASE)
    return ((found[1] or "").lower(), path[found.end() :]) if found else ("", path)


def _hub() -> str:
    """The hub's hosts and that of its mirror, HF_ENDPOINT, as a pattern."""
    return rf"(?:{_HUB}(?::\d+)?|{re.escape(_split(constants.ENDPOINT)[1].strip('/'))})"


def _on_the_web(url: str, host: Host | None, lora: Lora, suffixes: tuple[str, ...]) -> WebFile:
    only_for_the_hub(lora)
    with suppress(ValueError):  # an address that cannot be read, which the fetching tells
        no_other_format(unquote(urlsplit(url).path).rpartition("/")[2], suffixes)
    return WebFile(url, host, lora if is_url(lora.path) else lora.model_copy(update={"path": url}))


def _hub_id(path: str, lora: Lora, suffixes: tuple[str, ...]) -> HubFile:
    """owner/name, owner/name/file.safetensors or owner/name/folder, each also with @revision."""
    if path.startswith((".", "~", "/")) or len(path.split("/")) < 2 or not all(path.split("/")):
        raise Refused(f"names no {SUFFIX} file in LORA_DIR and is no hub id (owner/name), got {show(path)}")
    return _on_the_hub(path, lora, suffixes)


def _on_the_hub(path: str, lora: Lora, suffixes: tuple[str, ...]) -> HubFile:
    """The file that a hub's address means, of which `path` is what follows the host."""
    path = re.split(r"[?#]", path, maxsplit=1)[0].strip("/")
    at = _REVISION.search(path)
    revision = unquote(at[1]) if at else None
    parts = [unquote(part) for part in (path[: at.start()] + path[at.end() :] if at else path).split("/")]
    if kind := _KINDS.get(parts[0]):
        raise Refused(f"is the address of {kind}: give a model's repo, owner/name")
    if len(parts) < 2 or not all(parts) or parts[0] in _NO_OWNERS:
        raise Refused("is a page of the hub and no repo: give owner/name, or https://huggingface.co/owner/name")
    repo, rest, is_file = "/".join(parts[:2]), parts[2:], False
    if rest and rest[0] in _PAGES_OF_A_REPO:
        raise Refused(f"is a page of the repo {repo} and not a file: give owner/name/file{SUFFIX}")
    if len(rest) > 1 and rest[0] in _PLACES:
        length = 3 if rest[1] == "refs" and len(rest) > 3 else 1
        named, is_file = "/".join(rest[1 : 1 + length]), rest[0] in _FILES
        revision = _one("the revision", revision, named)
        rest = rest[1 + length :]
    revision = _one("the revision", revision, lora.revision)
    if revision and (".." in revision or revision == "."):  # git has none such, and libraries leave them out of paths
        raise Refused(f"names the revision {show(revision)}, which no repo can have")
    return _file((repo, revision, "/".join(rest)), lora, suffixes, is_file=is_file)


def _file(named: tuple[str, str | None, str], lora: Lora, suffixes: tuple[str, ...], *, is_file: bool) -> HubFile:
    """What is `named` is a repo, its revision, and a file in it or a folder."""
    (repo, revision, rest), weight_name, allowed = named, lora.weight_name, " or ".join(suffixes)
    for name in filter(None, (rest, weight_name)):
        no_other_format(name, suffixes)
        if ".." in name.split("/"):
            raise Refused(f"names the file {show(name)}, which leads out of the repo")
    if weight_name and not weight_name.lower().endswith(suffixes):
        raise Refused(f"names the file {show(weight_name)}, which must end in {allowed}: other formats can run code")
    folder = rest
    is_named = rest.lower().endswith(suffixes)
    if is_named or (is_file and rest):
        if not is_named:
            raise Refused(f"names the file {show(rest)}, which must end in {allowed}: other formats can run code")
        folder = ""
        if weight_name and weight_name not in (rest, rest.rpartition("/")[2]):
            _one("the file", rest, weight_name)
        weight_name = rest
    elif weight_name and folder and not weight_name.startswith(f"{folder}/"):
        weight_name = f"{folder}/{weight_name}"
    plain = lora.path.strip().split("/")[:2] == repo.split("/")
    shown = {"path": "/".join(filter(None, (repo, weight_name or folder))), "weight_name": None, "revision": revision}
    return HubFile(repo, revision, weight_name, folder, lora if plain else lora.model_copy(update=shown))


def _one(what: str, named: str | None, asked: str | None) -> str | None:
    """What both say, or the one that says something."""
    if named and asked and named != asked:
        raise Refused(f"names {what} {show(named)}, and beside it {show(asked)} is asked for: give one of them")
    return named or asked
