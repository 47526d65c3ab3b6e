"""Where the files of MODEL_NAME are: a whole model's folder, or one file and the folder of BASE_MODEL."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from src.catalog import MEMORY_MODES, base_of, families_like, find_model, repo_of, settle_model
from src.errors import Refused
from src.redaction import redact
from src.request.addresses import HubFile, WebFile, read_address
from src.request.schema import Lora
from src.settings import ROOT, Settings
from src.weights.files import (
    BAKED,
    CACHE,
    Files,
    Source,
    check_class,
    check_folders,
    is_guided,
    one_file,
    read_index,
    select,
    shifts_dynamically,
)
from src.weights.single_file import SUFFIXES, SingleFile, explain_folder, read_single_file
from src.weights.web_file import WebModel, beginning, read_beginning
from src.wording import show

log = logging.getLogger("worker")

FROM_THE_WEB = "single-files"  # the folder of CACHE, and of the image, for what came from addresses
_HUB_SECONDS = 10
_ALLOWED = "the path of a file, owner/repo/file or an https address"
_QUANT = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:hf\.co|huggingface\.co)/)?([\w.-]+/[\w.-]+):([\w.-]+)", re.IGNORECASE
)
_ADDRESSES = ("huggingface.co/", "hf.co/", "civitai.", "www.", "urn:air:", "air:", "civitai:")


class Wanted(Protocol):
    """What a start wants, as an operator calls it."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def is_part(self) -> bool:
        """Whether it is a network beside the model."""

    @property
    def is_gated(self) -> bool:
        """Whether the catalog knows that a token is needed."""

    @property
    def revision(self) -> str | None:
        """The one that is asked for."""

    def here(self) -> Source | None:
        """Where it is on this machine; nobody is asked."""

    def ask(self) -> int:
        """The bytes that are still to be downloaded; they are not. Raises where they could not be."""

    def find(self) -> Source:
        """Where it is, once it was downloaded."""

    def held_bytes(self) -> int:
        """What is kept of it, for good or in part."""


class Repo:
    """A whole model, or a `part`: one network whose repo is its folder."""

    def __init__(self, files: Files, name: str, repo: str, revision: str | None = None, *, part: bool = False) -> None:
        self.name, self.revision = name, revision
        self._files, self._repo, self.is_part = files, repo, part
        row = None if part else find_model(name)
        self.is_gated = bool(row and row.gated)

    def here(self) -> Source | None:
        """A folder, or what a cache has whole."""
        return self._checked(self._files.here(self.name, self._repo, self.revision, part=self.is_part))

    def ask(self) -> int:
        """By the hub's list."""
        return self._files.ask_hub(self._repo, self.revision, select(part=self.is_part))

    def find(self) -> Source:
        """From the hub, where it is not here."""
        found = self._files.find(self.name, self._repo, self.revision, part=self.is_part)
        self._checked(found)
        return found

    def held_bytes(self) -> int:
        """Of all revisions."""
        return self._files.held_bytes(self._repo)

    def _checked(self, source: Source | None) -> Source | None:
        if source and not self.is_part and read_index(source.folder) is None:
            raise Refused(explain_folder(source.folder))
        return source


class OneFile:
    """A model in one file: a path, a file of a repo, or an address. `single_file` is what it is, once that is known."""

    is_gated = is_part = False

    def __init__(self, files: Files, settings: Settings, place: Path | HubFile | WebFile, web: list[Path]) -> None:
        self.name, self.revision = settings.model_name, None
        self.single_file: SingleFile | None = None
        self._files, self._settings, self._place = files, settings, place
        self._web = WebModel(place, settings, web) if isinstance(place, WebFile) else None
        if isinstance(place, HubFile):
            self.revision = place.revision

    def here(self) -> Source | None:
        """Read by its header where it is on this machine."""
        match self._place:
            case Path() as path:
                return self._read(path.absolute(), None)
            case HubFile(repo=repo, weight_name=str(name), revision=revision):
                found = self._files.file_here(repo, name, revision)
                return self._read(found.folder / name, found.revision) if found else None
        file = self._web.here() if self._web else None
        return self._read(file, None) if file else None

    def ask(self) -> int:
        """By its header, which alone is fetched: what is no FLUX is refused before all of it comes."""
        if self._web:
            missing, self.single_file = self._web.peek()
            return missing
        place = self._on_the_hub()
        missing = self._files.ask_hub(place.repo, place.revision, one_file(str(place.weight_name)))
        token = self._settings.hf_token.get_secret_value() if self._settings.hf_token else None
        url = hf_hub_url(place.repo, str(place.weight_name), revision=place.revision)
        size = get_hf_file_metadata(url, token=token, timeout=_HUB_SECONDS).size or 0
        asked = get_session().stream(
            "GET", url, headers=build_hf_headers(token=token), timeout=_HUB_SECONDS, follow_redirects=True
        )
        with asked as answer:
            hf_raise_for_status(answer)
            begins = beginning(answer.iter_bytes())
        self.single_file = read_beginning(begins, size, Path(str(place.weight_name)).name)
        return missing

    def find(self) -> Source:
        """Downloaded, where it is not here, and looked at."""
        if found := self.here():
            return found
        if self._web:
            return self._read(self._web.fetch(), None)
        place = self._on_the_hub()
        found = self._files.find_file(place.repo, str(place.weight_name), place.revision)
        return self._read(found.folder / str(place.weight_name), found.revision)

    def held_bytes(self) -> int:
        """Of its repo or of its address."""
        if self._web:
            return self._web.held_bytes()
        return self._files.held_bytes(self._place.repo) if isinstance(self._place, HubFile) else 0

    def _on_the_hub(self) -> HubFile:
        assert isinstance(self._place, HubFile)  # noqa: S101 - of the three, what is neither here nor on the web
        return self._place

    def _read(self, path: Path, revision: str | None) -> Source:
        self.single_file = read_single_file(path)
        return Source(path.parent, revision, self.single_file)


class Base:
    """Where a file's model takes from what the file lacks: BASE_MODEL, or the model whose family and widths it has."""

    revision, is_part = None, False

    def __init__(self, files: Files, settings: Settings, single_file: SingleFile | None) -> None:
        self._files, self._settings, self._single_file = files, settings, single_file
        self._but_for = tuple(single_file.parts) if single_file else ("transformer",)

    @property
    def model(self) -> str:
        """A row's name, a hub id or a folder. Raises Refused where BASE_MODEL must say it."""
        if self._settings.base_model:
            return self._settings.base_model
        assert self._single_file  # noqa: S101 - nobody asks before the file is known
        file = self._single_file
        if row := base_of(file.family, file.configuration):
            return row.name
        raise Refused(
            f"must name the whole model that {file.path.name} was made from: it is of the family {file.family}, for "
            f"words of {file.configuration['joint_attention_dim']:,} numbers, as no model of that family here does"
        )

    @property
    def name(self) -> str:
        """With the setting, which the operator may not have set."""
        try:
            return f"BASE_MODEL={self.model}"
        except Refused:
            return "BASE_MODEL"

    @property
    def is_gated(self) -> bool:
        """By its row."""
        row = find_model(self.model)
        return bool(row and row.gated)

    def here(self) -> Source | None:
        """Without the weights that the file has."""
        self._check_row()
        return self._checked(self._files.here(self.model, repo_of(self.model), but_for=self._but_for))

    def ask(self) -> int:
        """By the hub's list."""
        return self._files.ask_hub(repo_of(self.model), None, select(but_for=self._but_for))

    def find(self) -> Source:
        """From the hub, where it is not here."""
        found = self._checked(self._files.find(self.model, repo_of(self.model), but_for=self._but_for))
        assert found  # noqa: S101 - or `find` has raised
        return found

    def held_bytes(self) -> int:
        """Of all revisions."""
        return self._files.held_bytes(repo_of(self.model))

    def _checked(self, source: Source | None) -> Source | None:
        """With the file, whose family it settles. Raises Refused where it is of another."""
        if source is None or self._single_file is None:
            return source
        index = read_index(source.folder)
        if index is None:
            raise Refused(explain_folder(source.folder))
        check_class(index)
        check_folders(index, source.folder)
        file, name = self._single_file, self.model
        transformer = json.loads((source.folder / "transformer" / "config.json").read_text())
        family = settle_model(
            name,
            class_name=str(index["_class_name"]),
            guided=is_guided(index, transformer),
            dynamic_shift=shifts_dynamically(source.folder),
        ).family
        self._check_family(family, file)
        if sum(axes := transformer.get("axes_dims_rope", ())) not in (0, file.configuration["attention_head_dim"]):
            heads = file.configuration["attention_head_dim"]
            raise Refused(
                f"has axes_dims_rope of {show(axes)}, and {file.path.name} attention heads of {heads}: they do not fit"
            )
        for key in ("joint_attention_dim", "pooled_projection_dim"):
            theirs, ours = transformer.get(key), file.configuration.get(key)
            if theirs is not None and ours is not None and theirs != ours:
                raise Refused(f"has a {key} of {theirs:,}, and {file.path.name} one of {ours:,}: they do not fit")
        return Source(source.folder, source.revision, replace(file, family=family), name)

    def _check_row(self) -> None:
        """Raise Refused where its row alone says that it is of another family, before a byte of it comes."""
        if self._single_file and (row := find_model(self.model)):
            self._check_family(row.family, self._single_file)

    @staticmethod
    def _check_family(family: str, file: SingleFile) -> None:
        like = families_like(file.configuration)
        if family not in like:
            raise Refused(
                f"is of the family {family}, and the tensors of {file.path.name} are of {' or '.join(like)}: give a "
                "model of that family, or leave BASE_MODEL unset"
            )


class Refusal:
    """What cannot even be looked for, and why."""

    is_gated, is_part, revision = False, False, None

    def __init__(self, name: str, error: Exception) -> None:
        self.name, self._error = name, error

    def here(self) -> Source | None:
        """Raises it."""
        raise self._error

    def ask(self) -> int:
        """Raises it."""
        raise self._error

    def find(self) -> Source:
        """Raises it."""
        raise self._error

    def held_bytes(self) -> int:
        """Nothing."""
        return 0


class ModelFiles:
    """Finds what MODEL_NAME and BASE_MODEL name; `download` and `baked` as `Files` takes them."""

    def __init__(
        self, settings: Settings, download: Callable[..., str] = snapshot_download, baked: Path = BAKED,
        cache: Path = CACHE,
    ) -> None:  # fmt: skip
        self.files = Files(settings, download, baked)
        self._settings = settings
        self._web = [cache / FROM_THE_WEB, baked / FROM_THE_WEB]

    @property
    def shown_name(self) -> str:
        """MODEL_NAME as everybody may read it: an address may hold a token."""
        name = self._settings.model_name
        return redact(name) if "://" in name else name

    def wanted(self) -> Iterator[Wanted]:
        """What is to be found, in this order: each is looked at before the next is asked for."""
        settings, name = self._settings, self._settings.model_name
        try:
            place = place_of(name, settings.model_revision)
            if place is None and settings.base_model:
                raise Refused(
                    f"is a whole model, and BASE_MODEL={settings.base_model} is for a model in one file: unset it"
                )
        except (Refused, OSError) as error:
            yield Refusal(name, error)
            return
        if place is None:
            yield Repo(self.files, name, repo_of(name), settings.model_revision)
            return
        file = OneFile(self.files, settings, place, self._web)
        yield file
        if file.single_file or settings.base_model:
            yield Base(self.files, settings, file.single_file)

    def here(self) -> Source | None:
        """All of it where it is on this machine, or None. Raises as `find`."""
        return _together(wanted.here() for wanted in self.wanted())

    def find(self) -> Source:
        """All of it, downloaded where it is not here.

        Raises Refused or what huggingface_hub raises; `Files.explain` words both.
        """
        found = _together(wanted.find() for wanted in self.wanted())
        assert found  # noqa: S101 - or `find` has raised
        return found


def quantized_again(settings: Settings, file: SingleFile) -> str | None:
    """What is wrong where `settings` ask for another kind of weights than `file` has packed; what PROFILE alone would
    make smaller stays as it is.
    """
    asked = MEMORY_MODES[settings.placement_mode].quantization
    if not asked or not file.is_packed or settings.quantization == settings.memory_mode == "auto":
        return None
    return (
        f"{asked} is asked for, and the weights of {file.path.name} stay as GGUF has them: set QUANTIZATION=none, and "
        f"MEMORY_MODE=auto where it is {asked}; or take a file of 16 bits"
    )


def place_of(name: str, revision: str | None) -> Path | HubFile | WebFile | None:
    """Where a model in one file is that is called `name`; None where that is a whole model's name.

    Raises Refused with what to write instead, and OSError for what no file can be called.
    """
    if (tag := _QUANT.fullmatch(name)) and not Path(name).exists():
        raise Refused(f"names {tag[2]} of {tag[1]} as other programs do: give that file, {tag[1]}/file.gguf")
    is_address = "://" in name or name.lower().startswith(_ADDRESSES)
    path = _home(name)
    places = () if is_address else (path, ROOT / name)
    path = next((place for place in places if place.is_symlink() or place.exists()), path)
    is_local = path.is_symlink() or path.exists()
    is_file = any(each.lower().endswith(SUFFIXES) for each in (name, name.rpartition("@")[0]))  # @revision
    if path.is_dir() or not (is_address or is_local or is_file):
        return None
    on_the_hub = name.count("/") >= 2 and all(name.split("/")) and not name.startswith((".", "~"))
    if is_local or not (is_address or on_the_hub):
        place: Path | HubFile | WebFile = path
    else:
        place = read_address(Lora(path=name), SUFFIXES, allowed=_ALLOWED)
        if revision and isinstance(place, HubFile):
            place = read_address(Lora(path=name, revision=revision), SUFFIXES)
    if revision and not isinstance(place, HubFile):
        raise Refused(f"is a file that no repo holds, and so has no revisions: unset MODEL_REVISION={revision}")
    if isinstance(place, HubFile) and place.weight_name is None:
        within = f" and its folder {place.folder}" if place.folder else ""
        raise Refused(
            f"is the address of the repo {place.repo}{within}: give {place.repo} for the whole model, or the name of a "
            f"file in it that ends in {' or '.join(SUFFIXES)}"
        )
    return place


def _home(name: str) -> Path:
    """The path `name`, in whose beginning ~ is a user's home. Raises Refused where there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise Refused(f"begins with {name.partition('/')[0]}, and there is no such user here: give the path") from None


def _together(found: Iterator[Source | None]) -> Source | None:
    """The last of what was found, the base of a file, with the file's revision; None where one is not here."""
    whole: Source | None = None
    for source in found:
        if source is None:
            return None
        whole = replace(source, revision=whole.revision) if whole else source
    return whole
