"""Where the files of a model, or of a part, are: a folder, RunPod's cache or the hub; or why they are nowhere."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download
from safetensors import SafetensorError, safe_open

from src.catalog import MODELS
from src.errors import Refused
from src.settings import ROOT, Settings
from src.weights.placement import DoesNotFit

log = logging.getLogger("worker")

# diffusers' own layout; a repo of FLUX also holds the same weights in one file at its root, which nobody needs.
_PATTERNS = ["*.json", "*/*.json", "*/*.txt", "*/*.model", "*/*.jinja", "*/*.safetensors"]
_PART = ["config.json", "*.safetensors", "*.safetensors.index.json"]  # of a network that is a repo by itself
# Models in one file, as other programs keep them.
_SINGLE_FILES = (".safetensors", ".gguf", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Source:
    """A folder in diffusers' layout, and the commit that it holds where that is known."""

    folder: Path
    revision: str | None


class Files:
    """Finds files by the worker's settings; `download` takes what huggingface_hub's snapshot_download takes."""

    def __init__(self, settings: Settings, download: Callable[..., str] = snapshot_download) -> None:
        self._settings = settings
        self._download = download

    def find(
        self,
        name: str,
        repo: str,
        revision: str | None = None,
        *,
        part: bool = False,
        before_download: Callable[[], None] = lambda: None,
    ) -> Source:
        """The files of `repo`, which a client or an operator calls `name`: local, then RunPod's cache, then the hub.

        A `part` is one network, whose repo is its folder.

        Raises Refused or what huggingface_hub raises; `explain` words both.
        """
        for folder in (Path(name).expanduser(), ROOT / repo):
            if folder.is_dir():
                if revision:
                    raise Refused(f"is a folder, which has no revisions: unset MODEL_REVISION={revision}")
                return _source(folder.resolve())
        if name.lower().endswith(_SINGLE_FILES):
            kind = name.rpartition(".")[2]
            raise Refused(f"is a single .{kind} file, which is not read: give the folder or hub id of a whole model")
        if name.startswith(("/", ".", "~")) or not _is_hub_id(repo):
            known = ", ".join(model.name for model in MODELS)
            raise Refused(f"is not a folder, not a hub id (owner/name) and not one of: {known}")

        wanted = {"repo_id": repo, "revision": revision, "allow_patterns": _PART if part else _PATTERNS}
        cache = self._settings.runpod_model_cache
        try:
            return _source(Path(self._download(**wanted, cache_dir=cache, local_files_only=True)))
        except errors.LocalEntryNotFoundError:
            before_download()
            token = self._settings.hf_token.get_secret_value() if self._settings.hf_token else None
            return _source(Path(self._download(**wanted, token=token)))

    def explain(self, error: Exception, instead: str = "") -> str:
        """Why files cannot be had or used, in one line, and what to do; `instead` is what else there is."""
        settings, hint = self._settings, f" ({instead})" if instead else ""
        match error:
            case Refused() | DoesNotFit():
                return str(error)
            case errors.GatedRepoError() if settings.hf_token is None:
                return f"is gated: accept its licence on its hub page and set HF_TOKEN{hint}"
            case errors.GatedRepoError():
                return "is gated and the account of HF_TOKEN has no access: accept its licence on its hub page"
            case errors.RepositoryNotFoundError():
                seen = "that can be seen without HF_TOKEN" if settings.hf_token is None else "that HF_TOKEN can see"
                return f"there is no such repo on the hub {seen}"
            case errors.RevisionNotFoundError():
                return f"the repo has no revision {settings.model_revision!r} (MODEL_REVISION)"
            case errors.HfHubHTTPError() if error.response.status_code == 401:
                return "the hub refuses HF_TOKEN: it is wrong or has expired"
            case errors.LocalEntryNotFoundError(__cause__=errors.HfHubHTTPError(response=answer)) if (
                answer.status_code == 403
            ):
                return "the hub forbids it: HF_TOKEN has no access to this repo"
            case errors.LocalEntryNotFoundError(__cause__=errors.HfHubHTTPError(response=answer)):
                return f"the hub answered {answer.status_code}: try again later"
            case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError():
                return f"is not on this machine and the hub cannot be reached{hint}"
            case OSError(errno=errno.ENOSPC):
                return f"the disk is full: {_free(constants.HF_HOME)} free below HF_HOME={constants.HF_HOME}"
            case Exception() if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
                return "there is not enough memory for its weights: choose a larger card or a smaller model"
            case RuntimeError() if "allocate memory" in str(error):
                return "there is not enough memory for its weights: choose a larger machine or a smaller model"
        return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def check_whole(folder: Path) -> dict[str, dict[str, int]]:
    """The number of values in each tensor, by network: a folder each, "" where `folder` is a network itself.

    Raises Refused where a file is not whole.
    """
    indexes = [*folder.glob("*.index.json"), *folder.glob("*/*.index.json")]
    missing = [
        shard.relative_to(folder)
        for shards in indexes
        for shard in {shards.parent / name for name in json.loads(shards.read_text())["weight_map"].values()}
        if not shard.exists()
    ]
    if missing:
        names = ", ".join(sorted(map(str, missing)))
        raise Refused(f"the download is not complete, shards are missing: {names}; download it again")
    networks: dict[str, dict[str, int]] = {}
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]):
        network = networks.setdefault("" if file.parent == folder else file.parent.name, {})
        try:
            with safe_open(file, "np") as tensors:  # reads the header and compares the length
                network |= {name: math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118 - a handle, no mapping
        except SafetensorError as error:
            raise Refused(f"{file.relative_to(folder)} is damaged ({error}): download it again") from error
    return networks


def keep(file: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make `file` for the next worker, whole or not at all; a folder that cannot be made keeps nothing."""
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(exist_ok=True)  # on a volume that is there, that is: not its parents
        write(unfinished)
        unfinished.rename(file)
    except (OSError, RuntimeError) as error:  # torch tells of a full disk in a RuntimeError
        unfinished.unlink(missing_ok=True)
        log.info("%s is not kept: %s", file, error)


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and all(name.split("/"))


def _source(folder: Path) -> Source:
    return Source(folder, folder.name if folder.parent.name == "snapshots" else None)


def _free(folder: str) -> str:
    path = Path(folder).resolve()
    return f"{shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free / 1e9:.1f} GB"
