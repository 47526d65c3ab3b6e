"""Where the files of a model, or of a part, are: a folder, RunPod's cache or the hub; or why they are nowhere."""

from __future__ import annotations

import errno
import json
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from httpx2 import HTTPError  # what huggingface_hub speaks HTTP with
from huggingface_hub import HfApi, constants, errors, get_hf_file_metadata, hf_hub_url, snapshot_download
from safetensors import SafetensorError, safe_open

from src.catalog import FAMILIES, MODELS
from src.errors import Refused
from src.settings import ROOT, Settings
from src.weights.disk import free_bytes, user
from src.weights.licences import CARD
from src.weights.placement import DoesNotFit
from src.weights.single_file import SUFFIXES, SingleFile

# diffusers' own layout; a repo of FLUX also holds the same weights in one file at its root, which nobody needs.
_PATTERNS = ["*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja", "*/*.safetensors"]
_INDEX, _MODULAR_INDEX = "model_index.json", "modular_model_index.json"
_WITHOUT_FILES = ("scheduler", "guider")  # which FLUX.3's pipeline has defaults of
_UPSAMPLER = ("prompt_upsampler", "prompt_upsampler_processor")  # a model of its own, which comes with FLUX.3
_PART = ["*.json", "*.jinja", "*.safetensors"]  # of a network that is a repo by itself, with what it is read with
# Models in one file, as other programs keep them.
_SINGLE_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")
_MANY = 8  # names of files, in a message
_VOCABULARIES = ("tokenizer.json", "spiece.model", "vocab.json", "tekken.json")  # one of them is enough
_HUB_SECONDS = 10  # for an answer of the hub's, before anything is downloaded
_HUB_PAUSES = (1, 3)  # seconds, before it is asked again
_BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})  # HTTP statuses that pass


@dataclass(frozen=True)
class Source:
    """A folder in diffusers' layout, and the commit that it holds where that is known.

    Of a model in one file, `folder` has what `single_file` lacks: it is that of the model `base`.
    """

    folder: Path
    revision: str | None
    single_file: SingleFile | None = None
    base: str | None = None


@dataclass(frozen=True)
class Selection:
    """Which files of a repo are wanted, in patterns of a shell; of a `part`, whose folder the repo is, all."""

    allow: tuple[str, ...]
    ignore: tuple[str, ...] = ()
    part: bool = False
    but_for: tuple[str, ...] = ()  # networks of which no weights are wanted

    def takes(self, name: str) -> bool:
        """Whether the file of this name is wanted."""
        return any(fnmatch(name, each) for each in self.allow) and not any(fnmatch(name, each) for each in self.ignore)


def select(*, part: bool = False, but_for: Iterable[str] = ()) -> Selection:
    """A whole model in diffusers' layout, or one network of it; without the weights of the networks `but_for`."""
    without = tuple(but_for)
    if part:
        return Selection(tuple(_PART), part=True)
    others = (*(f"{name}/*" for name in _UPSAMPLER), *(f"{name}/*.safetensors*" for name in without))
    return Selection(tuple(_PATTERNS), others, but_for=without)


def one_file(name: str) -> Selection:
    """The file of this name alone."""
    return Selection((re.sub(r"([*?[])", r"[\1]", name),))


# What the hub may answer, by status.
_ANSWERS: Mapping[int, str] = {
    401: "the hub refuses HF_TOKEN: it is wrong or has expired",
    403: "the hub forbids it: HF_TOKEN has no access to this repo",
}
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_RIGHT = (errno.EACCES, errno.EPERM, errno.EROFS)

INSTEAD = "MODEL_NAME=flux-shapes runs the small model that ships with this worker"
CACHE = Path(constants.HF_HUB_CACHE)  # where the hub's files are kept
BAKED = ROOT / "weights"  # the same for what src/weights/bake.py put into the image


class Files:
    """Finds files by the worker's settings; `download` takes what huggingface_hub's snapshot_download takes."""

    def __init__(
        self, settings: Settings, download: Callable[..., str] = snapshot_download, baked: Path = BAKED
    ) -> None:
        self._settings = settings
        self._download = download
        self._baked = baked

    def find(
        self,
        name: str,
        repo: str,
        revision: str | None = None,
        *,
        part: bool = False,
        but_for: Iterable[str] = (),
        before_download: Callable[[], None] = lambda: None,
    ) -> Source:
        """The files of `repo`, which a client or an operator calls `name`: `here`, or else from the hub.

        A `part` is one network, whose repo is its folder; of the networks `but_for` no weights are wanted.

        Raises Refused or what huggingface_hub raises; `explain` words both.
        """
        if found := self.here(name, repo, revision, part=part, but_for=but_for):
            return found
        before_download()
        return _source(self._from_hub(repo, revision, select(part=part, but_for=but_for)))

    def find_file(self, repo: str, name: str, revision: str | None = None) -> Source:
        """The folder below which the file `name` of `repo` is, as `find`."""
        return self.file_here(repo, name, revision) or _source(self._from_hub(repo, revision, one_file(name)))

    def file_here(self, repo: str, name: str, revision: str | None = None) -> Source | None:
        """The folder below which the file `name` of `repo` is, on this machine."""
        folders = self._in_caches(repo, revision, one_file(name))
        return next((_source(folder) for folder in folders if (folder / name).is_file()), None)

    def _from_hub(self, repo: str, revision: str | None, wanted: Selection) -> Path:
        with_card = replace(wanted, allow=(*wanted.allow, CARD))  # not looked for here: it may do without one
        return Path(self._download(**_arguments(repo, revision, with_card), token=self._token()))

    def here(
        self, name: str, repo: str, revision: str | None = None, *, part: bool = False, but_for: Iterable[str] = ()
    ) -> Source | None:
        """What is on this machine, without asking the hub: a folder, HF_HOME, RunPod's cache or the image.

        Without a `revision` that is the one which main was when it was downloaded. Raises Refused where `name` can be
        nothing.
        """
        for folder in (Path(name).expanduser(), ROOT / repo):
            if folder.is_dir():
                if revision:
                    raise Refused(f"is a folder, which has no revisions: unset MODEL_REVISION={revision}")
                return _source(folder.resolve())
        if name.lower().endswith(_SINGLE_FILES):
            kind = name.rpartition(".")[2]
            raise Refused(
                f"is a .{kind} file: give the folder or hub id of a whole model, or in MODEL_NAME a model in one "
                f"{' or '.join(SUFFIXES)} file"
            )
        if name.startswith(("/", ".", "~")) or not _is_hub_id(repo):
            known = ", ".join(model.name for model in MODELS)
            raise Refused(f"is not a folder, not a hub id (owner/name) and not one of: {known}")
        wanted = select(part=part, but_for=but_for)
        folders = self._in_caches(repo, revision, wanted)
        return next((_source(folder) for folder in folders if _is_whole(folder, wanted)), None)

    def _in_caches(self, repo: str, revision: str | None, wanted: Selection) -> Iterator[Path]:
        """Snapshots that may have what is `wanted`."""
        others = ({"cache_dir": folder} for folder in (self._settings.runpod_model_cache, self._baked))
        for cache in ({}, *others):  # HF_HOME comes first
            with suppress(errors.LocalEntryNotFoundError):
                yield Path(self._download(**_arguments(repo, revision, wanted), **cache, local_files_only=True))

    def ask_hub(self, repo: str, revision: str | None = None, wanted: Selection | None = None) -> int:
        """The bytes that HF_HOME lacks of `repo`; nothing is downloaded, and it takes half a minute at most.

        By default a whole model is `wanted`. A hub that is busy or hangs up is asked again. Raises Refused where the
        repo has nothing of the kind, and what huggingface_hub raises where they could not be downloaded; `explain`
        words it.
        """
        wanted = wanted or select()
        for pause in _HUB_PAUSES:
            try:
                return self._ask_hub(repo, revision, wanted)
            except (HTTPError, errors.HfHubHTTPError) as error:
                if isinstance(error, errors.HfHubHTTPError) and error.response.status_code not in _BUSY:
                    raise
                time.sleep(pause)
        return self._ask_hub(repo, revision, wanted)

    def _ask_hub(self, repo: str, revision: str | None, selection: Selection) -> int:
        token = self._token()
        info = HfApi(token=token).model_info(repo, revision=revision, timeout=_HUB_SECONDS, files_metadata=True)
        there = info.siblings or ()
        wanted = [file for file in there if selection.takes(file.rfilename)]
        _check_listed([file.rfilename for file in there], repo, selection)
        if wanted:  # a gated repo shows everybody what it holds, and its files to some
            url = hf_hub_url(repo, wanted[0].rfilename, revision=info.sha)
            get_hf_file_metadata(url, token=token, timeout=_HUB_SECONDS)
        blobs = _blobs(repo)
        names = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id for file in wanted}
        return sum(file.size or 0 for file in wanted if not (blobs / str(names[file.rfilename])).exists())

    def held_bytes(self, repo: str) -> int:
        """What HF_HOME holds of `repo`, of all its revisions."""
        return sum(file.stat().st_size for file in _blobs(repo).glob("*"))

    def explain(self, error: Exception, instead: str = "") -> str:
        """Why files cannot be had or used, in one line, and what to do; `instead` is what else there is."""
        settings, hint = self._settings, f" ({instead})" if instead else ""
        match error:
            case Refused() | DoesNotFit():
                return str(error)
            case errors.GatedRepoError(repo_id=repo) if settings.hf_token is None:
                return f"is gated: accept its licence on {_page(repo)} and set HF_TOKEN{hint}"
            case errors.GatedRepoError(repo_id=repo):
                return (
                    f"is gated and the account of HF_TOKEN has no access: accept its licence on {_page(repo)}; a "
                    "fine-grained token must also be allowed to read gated repos"
                )
            case errors.RepositoryNotFoundError():
                seen = "that can be seen without HF_TOKEN" if settings.hf_token is None else "that HF_TOKEN can see"
                return f"there is no such repo on the hub {seen}"
            case errors.RevisionNotFoundError():
                asked = f"{settings.model_revision!r} (MODEL_REVISION)" if settings.model_revision else "of that name"
                return f"the repo has no revision {asked}"
            case errors.LocalEntryNotFoundError(__cause__=errors.HfHubHTTPError() as answered):
                return self.explain(answered, instead)
            case errors.HfHubHTTPError(response=answer):
                return _ANSWERS.get(answer.status_code, f"the hub answered {answer.status_code}: try again later")
            case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError() | HTTPError():
                why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
                return f"is not on this machine, or not all of it, and {why}{hint}"
            case OSError(errno=number) if number in _NO_ROOM:
                return f"the disk is full: {free_bytes(CACHE) / 1e9:.1f} GB free below {cache_name()}"
            case OSError(errno=number) if number in _NO_RIGHT and error.filename:
                return f"{error.filename} is not open to {user()} ({error.strerror})"
            case Exception() if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
                return "there is not enough memory for its weights: choose a larger card or a smaller model"
            case RuntimeError() if "allocate memory" in str(error):
                return "there is not enough memory for its weights: choose a larger machine or a smaller model"
        return " ".join(f"{type(error).__name__}: {error}".split())[:500]

    def _token(self) -> str | None:
        return self._settings.hf_token.get_secret_value() if self._settings.hf_token else None


def values_of(networks: Mapping[str, Mapping[str, int]]) -> int:
    """How many numbers all of what `check_whole` found are."""
    return sum(sum(tensors.values()) for tensors in networks.values())


def check_whole(folder: Path, but_for: Collection[str] = ()) -> dict[str, dict[str, int]]:
    """The number of values in each tensor, by network: a folder each, "" where `folder` is a network itself.

    Networks `but_for` are not looked at. Raises Refused where a file is not whole.
    """
    if missing := _missing_shards(folder, but_for):
        raise Refused(f"the download is not complete, shards are missing: {', '.join(missing)}; download it again")
    networks: dict[str, dict[str, int]] = {}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]):
        if file.parent != folder and file.parent.name in but_for:
            continue
        network = networks.setdefault("" if file.parent == folder else file.parent.name, {})
        try:
            with safe_open(file, "np") as tensors:  # reads the header and compares the length
                network |= {name: math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - a handle, no mapping
        except SafetensorError as error:
            raise Refused(f"{file.relative_to(folder)} is damaged ({error}): download it again") from error
    return networks


def read_index(folder: Path) -> dict[str, Any] | None:
    """What `folder` says that it holds, as a model_index.json says it; None where it says nothing.

    A modular index names a repo and a folder of it for each component: only those of its own are read. Raises Refused
    where a component is elsewhere.
    """
    if (file := folder / _INDEX).is_file():
        index: dict[str, Any] = json.loads(file.read_text())
        return _without_upsampler(index)
    if not (file := folder / _MODULAR_INDEX).is_file():
        return None
    plain: dict[str, Any] = {}
    for name, value in _without_upsampler(json.loads(file.read_text())).items():
        if not isinstance(value, list):
            plain[name] = value
            continue
        library, class_name, place = value
        is_here, elsewhere = (folder / name).is_dir(), place.get("pretrained_model_name_or_path")
        if is_here or name not in _WITHOUT_FILES:
            plain[name] = [library, class_name] if library else list(place.get("type_hint") or (None, None))
        if not is_here and name not in _WITHOUT_FILES and elsewhere:
            raise Refused(
                f"has no folder {name}: modular_model_index.json takes it from {elsewhere}, and this worker reads "
                "models whose parts are all in one repo or folder; put it there, or take the model as it was published"
            )
    return plain


def _without_upsampler(index: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in index.items() if name not in (*_UPSAMPLER, "image_processor")}


def is_guided(index: Mapping[str, Any], transformer: Mapping[str, Any]) -> bool:
    """Whether guidance_scale has an effect: FLUX.2-klein's index says it, of others the transformer's configuration.

    FLUX.3 is guided by a second call of the transformer, unless it was distilled into a flow map. Where a class has no
    word for it, its families say it.
    """
    if "is_distilled" in index:
        return not index["is_distilled"]
    if "flow_map" in transformer:
        return not transformer["flow_map"]
    alike = (row for row in FAMILIES.values() if row.transformer["_class_name"] == transformer.get("_class_name"))
    silent = any(row.guided for row in alike if "guidance_embeds" not in row.transformer)
    return bool(transformer.get("guidance_embeds", silent))


def shifts_dynamically(folder: Path) -> bool | None:
    """Whether the scheduler of the model in `folder` shifts by the picture's size; None where nothing says it."""
    file = folder / "scheduler" / "scheduler_config.json"
    return bool(json.loads(file.read_text()).get("use_dynamic_shifting")) if file.is_file() else None


def check_class(index: Mapping[str, Any]) -> None:
    """Raise Refused unless `index` is that of a pipeline of FLUX."""
    known = sorted({model.base.class_name for model in MODELS})
    if index.get("_class_name") not in known:
        raise Refused(f"is a {index.get('_class_name')}; this worker runs {', '.join(known)}")


def check_folders(index: Mapping[str, Any], folder: Path) -> None:
    """Raise Refused where a component of `index`, a model's, has no folder or no vocabulary."""
    for name, class_name in components(index).items():
        if not (folder / name).is_dir():
            raise Refused(f"has no folder {name}, and its index names it; download it again")
        is_tokenizer = "Tokenizer" in class_name or re.search(r"(?<!Image)Processor$", class_name)
        if is_tokenizer and not any((folder / name / file).is_file() for file in _VOCABULARIES):
            raise Refused(f"has no vocabulary in {name}: none of {', '.join(_VOCABULARIES)}; download it again")


def components(index: Mapping[str, Any]) -> dict[str, str]:
    """Each component of a model_index.json with the name of its class; those that a model goes without are null."""
    return {name: str(value[1]) for name, value in index.items() if isinstance(value, list) and value[0]}


def _blobs(repo: str) -> Path:
    return CACHE / f"models--{repo.replace('/', '--')}" / "blobs"


def cache_name() -> str:
    """The variable that says where the hub's files are kept, and where that is."""
    home = Path(constants.HF_HOME)
    return f"HF_HOME={home}" if home / "hub" == CACHE else f"HF_HUB_CACHE={CACHE}"


def _arguments(repo: str, revision: str | None, wanted: Selection) -> dict[str, Any]:
    ignored = {"ignore_patterns": list(wanted.ignore)} if wanted.ignore else {}
    return {"repo_id": repo, "revision": revision, "allow_patterns": list(wanted.allow), **ignored}


def _check_listed(names: Collection[str], repo: str, wanted: Selection) -> None:
    """Raise Refused where a repo of files with these `names` has nothing of what is wanted."""
    found = any(wanted.takes(name) for name in names)
    if wanted.part or (found and (len(wanted.allow) == 1 or not {_INDEX, _MODULAR_INDEX}.isdisjoint(names))):
        return
    files = sorted(name for name in names if name.lower().endswith(_SINGLE_FILES[:2]))
    shown = ", ".join(f"{repo}/{name}" for name in files[:_MANY]) + (" ..." if len(files) > _MANY else "")
    has = f"; for a model in one file give it, one of {shown}" if files else ""
    if len(wanted.allow) == 1:
        raise Refused(f"names a file that the repo {repo} has not{has}")
    raise Refused(f"is a repo without {_INDEX}, and so no model in diffusers' layout{has}")


def _is_whole(folder: Path, wanted: Selection) -> bool:
    """Whether a snapshot has all that its own indexes name; a download that was cut off leaves the rest out.

    Where the hub's library keeps a list of what there is, it has compared that before.
    """
    if (folder.parent.parent / "trees" / f"{folder.name}.json").exists():
        return True
    try:
        networks = [folder]
        if not wanted.part:
            if (index := read_index(folder)) is None:
                return False
            check_folders(index, folder)
            networks = [folder / name for name in components(index) if name not in wanted.but_for]
        described = {network for network in networks if (network / "config.json").exists()}
        filled = {network for network in networks if any(network.glob("*.safetensors"))}
        return described == filled and bool(filled or wanted.but_for) and not _missing_shards(folder, wanted.but_for)
    except (OSError, ValueError, Refused):
        return False


def _missing_shards(folder: Path, but_for: Collection[str] = ()) -> list[str]:
    """Files that an index of `folder` names, and that are not there, but for some networks'."""
    indexes = [*folder.glob("*.index.json"), *folder.glob("*/*.index.json")]
    indexes = [index for index in indexes if index.parent.name not in but_for or index.parent == folder]
    shards = {
        index.parent / name for index in indexes for name in set(json.loads(index.read_text())["weight_map"].values())
    }
    return sorted(str(shard.relative_to(folder)) for shard in shards if not shard.exists())


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and all(name.split("/"))


def _page(repo: str | None) -> str:
    return f"{constants.ENDPOINT}/{repo}" if repo else "its hub page"


def _source(folder: Path) -> Source:
    return Source(folder, folder.name if folder.parent.name == "snapshots" else None)
